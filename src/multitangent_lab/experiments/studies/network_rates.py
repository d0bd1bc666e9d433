"""Learning rates of fully-connected networks: searched and suggested.

Run as ``python -m multitangent_lab.experiments.studies.network_rates FOLDER [DATASET ...]``.

Every case is stored as it ends, and not run again; any number of processes can share a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, log
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from multitangent.learning_rate import suggest
from multitangent_lab._files import write_csv
from multitangent_lab.config import TrainConfig
from multitangent_lab.experiments._draw_rates import draw_rates
from multitangent_lab.experiments._store import Cell, Row, Store
from multitangent_lab.training import AGGREGATORS, NonFiniteLoss, train

CLOSE = 0.05  # of the gap between guessing and the best loss: what counts as no worse
_AROUND = [10 ** (i / 4) for i in range(-5, 6)]  # what the suggestion is multiplied by
_GRID = [10 ** (i / 4) for i in range(-12, 3)]  # rates of the true gradient
_GUESSING = log(10)  # the loss of ten classes that are equally likely


@dataclass(frozen=True)
class Network(Cell):
    """One data set, width and gradient, trained for some epochs."""

    dataset: str
    width: int
    epochs: int
    gradient: str
    num_tangents: int


def cases() -> Iterator[Network]:
    """All cases, quick ones first."""
    for dataset, width, epochs in (
        ("digits", 64, 20),
        ("digits", 256, 20),
        ("digits", 1024, 20),
        ("mnist", 256, 2),
    ):
        for count in (1, 4, 16):
            for aggregator in ("mean", "projection"):
                yield Network(dataset, width, epochs, aggregator, count)


def losses(case: Network, rates: list[float], data_dir: Path | None) -> list[float]:
    """The least validation loss with each rate; infinite where training diverged."""

    def loss(rate: float) -> float:
        with TemporaryDirectory() as folder:
            config = TrainConfig(
                dataset=case.dataset,  # type: ignore[arg-type]
                data_dir=data_dir,
                width=case.width,
                epochs=case.epochs,
                gradient=case.gradient,  # type: ignore[arg-type]
                num_tangents=case.num_tangents,
                learning_rate=rate,
                run_dir=Path(folder),
            )
            try:
                return train(config).validation_loss
            except NonFiniteLoss:
                return inf

    return [loss(rate) for rate in rates]


def reference_rates(case: Network, data_dir: Path | None) -> list[Row]:
    """The lowest and the highest of the rates that are good for the true gradient."""
    found = losses(case, _GRID, data_dir)
    near = min(found) + CLOSE * (_GUESSING - min(found))
    good = [rate for rate, loss in zip(_GRID, found, strict=True) if loss <= near]
    return [{"lowest": min(good), "highest": max(good)}]


def run(case: Network, lowest: float, highest: float, data_dir: Path | None) -> list[Row]:
    """Search around the suggestion, which is one of the rates that are tried."""
    dimension = 2 * case.width + 10
    suggested = suggest(
        lowest,
        num_tangents=case.num_tangents,
        dimension=dimension,
        aggregator=AGGREGATORS[case.gradient],
        headroom=highest / lowest,
    )
    rates = [suggested * factor for factor in _AROUND]
    found = losses(case, rates, data_dir)
    best, own = min(found), found[len(rates) // 2]
    return [
        {
            "network": f"{case.dataset}, w = {case.width}",
            "epochs": case.epochs,
            "dimension": dimension,
            "num_tangents": case.num_tangents,
            "aggregator": case.gradient,
            "reference_rate": lowest,
            "reference_highest": highest,
            "suggested_rate": suggested,
            "searched_rate": rates[found.index(best)],
            "loss_suggested": own,
            "loss_searched": best,
            "suggested_is_no_worse": own <= best + CLOSE * (_GUESSING - best),
        }
    ]


def main(folder: Path, datasets: list[str], data_dir: Path | None) -> None:
    """Run what is missing, of some data sets or all; then write the table and draw it."""
    torch.set_num_threads(1)
    store = Store(folder)

    def of(case: Network) -> list[Row]:
        true = Network(case.dataset, case.width, case.epochs, "backpropagation", 16)
        (row,) = store.obtain(true, lambda cell: reference_rates(cell, data_dir))
        return run(case, row["lowest"], row["highest"], data_dir)

    store.work([c for c in cases() if not datasets or c.dataset in datasets], of)
    rows = store.rows(cases())
    write_csv(folder / "networks.csv", rows)
    draw_rates(rows, "network", folder / "networks.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("datasets", nargs="*")
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    main(given.folder, given.datasets, given.data_dir)
