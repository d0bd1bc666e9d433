"""The command `multitangent reproduce`."""

from __future__ import annotations

import json as json_
from dataclasses import replace
from functools import partial
from pathlib import Path
from textwrap import fill
from time import monotonic
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from multitangent_lab._files import write_csv, write_text
from multitangent_lab._provenance import provenance
from multitangent_lab.config import NETWORKS, STUDIES, ReproduceConfig
from multitangent_lab.experiments._experiment import Claim
from multitangent_lab.experiments._store import Store
from multitangent_lab.experiments._workers import cells_of, experiment_of, run_cells
from multitangent_lab.training import ConfigError


def run_reproduce(config: ReproduceConfig, *, json: bool) -> dict[str, Any]:
    """Runs, stores, draws and compares, and prints what was found unless `json`."""
    minutes = config.budget_minutes
    deadline = None if minutes is None else monotonic() + 60 * minutes
    found = []
    for figure in config.figures:
        _check_folder(config.folder(figure))
        with _progress() as progress:
            task = progress.add_task(figure, total=len(cells_of(config, figure)))
            before = len(Store(config.folder(figure)).records())
            run_cells(config, figure, deadline, partial(_show, progress, task))
        found.append(finish(config, figure))
        run_now = len(Store(config.folder(figure)).records()) - before
        found[-1]["cells_stored"] = found[-1]["cells_run"] - run_now
        if not json:
            _print(found[-1])
    return {"figures": found}


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"`out` should be a folder that can be written. Found '{folder}': {error.strerror}. "
            "Try another --out."
        ) from error


def finish(config: ReproduceConfig, figure: str) -> dict[str, Any]:
    """Writes the table, the pictures and the comparison with the paper, of what has been run."""
    folder, experiment = config.folder(figure), experiment_of(figure)
    store = Store(folder)
    cells = [*cells_of(config, figure), *experiment.further(store)]
    cells = list({cell.key: cell for cell in cells}.values())
    records = store.records()
    ended = [records[cell.key] for cell in cells if cell.key in records]
    summary: dict[str, Any] = {
        "figure": figure,
        "folder": str(folder),
        "cells": len(cells),
        "cells_run": len(ended),
        "quick": config.quick,
        "seconds": round(sum(record["seconds"] for record in ended), 1),
        "claims": [],
    }
    if config.epochs is not None:
        summary["epochs"] = config.epochs
    if ended:
        rows = [row for record in ended for row in record["rows"]]
        write_csv(folder / f"{figure}.csv", rows)
        experiment.draw(rows, folder)
        complete = len(ended) == len(cells)
        # What takes minutes is judged as a whole; networks as far as they have been trained.
        claims = experiment.claims(rows) if complete or figure in NETWORKS else []
        if config.quick:  # too small to decide
            claims = [replace(claim, agrees=None) for claim in claims]
        if figure not in STUDIES:
            write_text(folder / "claims.md", _markdown(experiment.title, claims, summary))
        summary["claims"] = [vars(claim) for claim in claims]
    machines = {key: sorted({str(r[key]) for r in ended}) for key in ("multitangent", *_MACHINE)}
    last = {"ran_on": machines, "written_by": provenance()}
    stored = {name: value for name, value in summary.items() if name not in ("claims", "folder")}
    path = folder / "provenance.json"
    if not (path.exists() and _says(path, stored)):  # else nothing has been run since
        write_text(path, json_.dumps(stored | last, indent=1) + "\n")
    return summary


def _says(path: Path, summary: dict[str, Any]) -> bool:
    """Whether a file was written about the same cells."""
    written: dict[str, Any] = json_.loads(path.read_text(encoding="utf-8"))
    return summary.items() <= written.items()


_MACHINE = ("torch", "python", "processor", "gpu", "threads")
_SMALL = "The small version says nothing about the paper: all verdicts stay open."
_SHORT = (
    "Every network was trained for at most {epochs} {word}, with one seed; the paper trains for up "
    "to 200 epochs. A verdict says whether the statement holds that early."
)
_WORDS = {True: "yes", False: "**no**", None: "open"}


def _note(summary: dict[str, Any]) -> str:
    """What a verdict does not say, if the experiment is a smaller one than the paper's."""
    if summary["quick"]:
        return _SMALL
    epochs = summary.get("epochs")
    return _SHORT.format(epochs=epochs, word="epoch" if epochs == 1 else "epochs") if epochs else ""


def _markdown(title: str, claims: list[Claim], summary: dict[str, Any]) -> str:
    lines = [f"# {title}", "", f"{summary['cells_run']} of {summary['cells']} cells have been run."]
    if note := _note(summary):
        lines += ["", fill(note, 100)]
    said = [claim for claim in claims if claim.section]
    beyond = [claim for claim in claims if not claim.section]
    lines += ["", "| section | the paper says | measured here | agrees |", "| --- " * 4 + "|"]
    lines += [f"| {c.section} | {c.statement} | {c.evidence} | {_WORDS[c.agrees]} |" for c in said]
    if beyond:
        lines += ["", "| beyond the paper | measured | holds |", "| --- " * 3 + "|"]
        lines += [f"| {c.statement} | {c.evidence} | {_WORDS[c.agrees]} |" for c in beyond]
    return "\n".join(lines) + "\n"


def _show(progress: Progress, task: TaskID, ended: int) -> None:
    progress.update(task, completed=ended)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _print(summary: dict[str, Any]) -> None:
    hint = "" if summary["cells_run"] == summary["cells"] else "; the same command goes on"
    print(f"{summary['figure']}: {summary['cells_run']} of {summary['cells']} cells run{hint}")
    if stored := summary["cells_stored"]:
        print(f"  {stored} of them are stored results of earlier runs")
    if note := _note(summary):
        print(f"  {note}")
    for claim in summary["claims"]:
        print(f"  [{_WORDS[claim['agrees']].strip('*')}] {claim['statement']}: {claim['evidence']}")
    print(f"  {summary['folder']}")
