"""Cells: the parts of an experiment that are run once, by any number of processes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from filelock import BaseFileLock, FileLock, Timeout

from multitangent_lab._files import write_text
from multitangent_lab._hashes import digest, without_defaults
from multitangent_lab._provenance import provenance

Row = dict[str, Any]


class OutOfTimeError(Exception):
    """The time budget has been used up; what was begun can be continued."""


@dataclass(frozen=True)
class Cell:
    """One part of an experiment, as a frozen value of which its result is a function.

    Examples:
        >>> @dataclass(frozen=True)
        ... class Sum(Cell):
        ...     a: int
        ...     b: int
        >>> Sum(1, 2).key == Sum(1, 2).key != Sum(1, 3).key
        True
    """

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits, the same for equal cells on every machine.

        Fields at their default are left out, so that a cell may get a further one.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        defaults = {f.name: f.default for f in fields(self)}
        return digest([type(self).__name__, without_defaults(values, defaults)])


C = TypeVar("C", bound=Cell)


class Store:
    """The results of cells, one JSON line each, appended as cells end.

    Processes share a folder: a cell that another one is at work on is left to it, and a lock that
    a killed process held is free again.

    Args:
        folder: Holds `cells.jsonl`, and in `.work` what is needed only while cells run.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> @dataclass(frozen=True)
        ... class Square(Cell):
        ...     x: int
        >>> with TemporaryDirectory() as folder:
        ...     store = Store(Path(folder))
        ...     first = store.obtain(Square(3), lambda cell: [{"y": cell.x**2}])
        ...     again = store.obtain(Square(3), lambda cell: [{"y": None}])
        >>> first, again
        ([{'y': 9}], [{'y': 9}])
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "cells.jsonl"
        self.work_folder = folder / ".work"
        self.work_folder.mkdir(parents=True, exist_ok=True)
        (self.work_folder / ".gitignore").write_text("*\n", encoding="utf-8")

    def records(self) -> dict[str, dict[str, Any]]:
        """All results by the key of the cell: `rows`, and how they came about."""
        if not self.path.exists():
            return {}
        found = {}
        for line in self.path.read_bytes().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # of a process that was killed while it wrote
                continue
            found[record["key"]] = record
        return found

    def rows(self, cells: Iterable[Cell]) -> list[Row]:
        """The rows of those cells that have ended, in the cells' order."""
        records = self.records()
        return [row for c in cells if c.key in records for row in records[c.key]["rows"]]

    def obtain(self, cell: C, run: Callable[[C], list[Row]]) -> list[Row]:
        """The rows of a cell, which is run unless it was before.

        Waits for a process that is at work on it.

        Args:
            cell: The cell.
            run: From the cell to its rows.
        """
        if cell.key not in self.records():
            with self._lock(cell).acquire():
                self._run_if_missing(cell, run)
        return self.rows([cell])

    def work(self, cells: Iterable[C], run: Callable[[C], list[Row]]) -> None:
        """Runs the cells that have not been run, but for those that others are at work on.

        Args:
            cells: The most wanted first.
            run: From a cell to its rows.
        """
        for cell in cells:
            with suppress(Timeout), self._lock(cell).acquire(blocking=False):
                self._run_if_missing(cell, run)

    def _lock(self, cell: Cell) -> BaseFileLock:
        return FileLock(self.work_folder / f"{cell.key}.lock")

    def scratch(self, cell: Cell) -> Path:
        """A folder for what a cell keeps while it runs; gone once its result is stored."""
        return self.work_folder / cell.key

    def _run_if_missing(self, cell: C, run: Callable[[C], list[Row]]) -> None:
        if cell.key in self.records():
            return
        clock = self.scratch(cell) / "seconds"  # of earlier, unfinished runs
        begun = time.perf_counter() - (float(clock.read_text()) if clock.exists() else 0.0)
        try:
            rows = run(cell)
        except BaseException:
            if self.scratch(cell).exists():
                write_text(clock, str(time.perf_counter() - begun))
            raise
        self._append(cell, rows, time.perf_counter() - begun)
        shutil.rmtree(self.scratch(cell), ignore_errors=True)

    def _append(self, cell: Cell, rows: list[Row], seconds: float) -> None:
        record = {
            "key": cell.key,
            "cell": {"kind": type(cell).__name__, **asdict(cell)},
            "rows": rows,
            "seconds": round(seconds, 1),
            **provenance(),
        }
        with FileLock(self.work_folder / "cells.lock"), self.path.open("ab+") as file:
            if file.tell() and not _ends_line(self.path):
                file.write(b"\n")  # a line that a killed process left unfinished
            file.write((json.dumps(record) + "\n").encode())


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read() == b"\n"
