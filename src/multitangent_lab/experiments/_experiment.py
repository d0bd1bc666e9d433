"""What an experiment consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from multitangent_lab.experiments._store import Cell, Row, Store


@dataclass(frozen=True)
class Claim:
    """What the paper says, and what was measured here.

    Args:
        section: Where the paper says it; `None` for what goes beyond it.
        statement: What it says.
        agrees: Whether the measurement agrees; `None` while that can not be told.
        evidence: The measurement, in a sentence.
    """

    section: str | None
    statement: str
    agrees: bool | None
    evidence: str


@dataclass(frozen=True)
class Context:
    """Where a cell runs.

    Args:
        store: The results of the experiment so far.
        data_dir: Folder of the data sets.
        device: `"auto"`, `"cpu"` or `"cuda"`.
        late: Whether it is time to stop.
    """

    store: Store
    data_dir: Path | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    late: Callable[[], bool] = lambda: False


def _no_claims(rows: list[Row]) -> list[Claim]:
    return []


def _nothing_further(store: Store) -> Iterable[Cell]:
    return ()


@dataclass(frozen=True)
class Experiment:
    """One figure or table of the paper, or a study beyond it.

    Args:
        title: What it shows.
        cells: The cells, the most wanted first; the arguments are `quick` and `simulated`.
        run: From a cell to its rows.
        draw: From the rows of all cells that have ended to the pictures and further tables.
        claims: From the same rows to what they say about the paper.
        further: Cells that depend on the results so far. The next one is asked for after the one
            before it has run, or is left to another process.
    """

    title: str
    cells: Callable[[bool, bool], Sequence[Cell]]
    run: Callable[[Any, Context], list[Row]]
    draw: Callable[[list[Row], Path], None]
    claims: Callable[[list[Row]], list[Claim]] = _no_claims
    further: Callable[[Store], Iterable[Cell]] = _nothing_further
