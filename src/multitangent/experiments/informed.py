"""Gradients with guesses beside backpropagation and random tangents, on the paper's network.

Run as ``python -m multitangent.experiments.informed FOLDER [--data-dir DIR]``. Every run is stored
as it ends, and not run again; any number of processes can share a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf
from pathlib import Path

import torch

from multitangent.experiments import _training
from multitangent.experiments._experiment import Context
from multitangent.experiments._store import Store
from multitangent.experiments._training import Training, training
from multitangent.training._files import write_csv
from multitangent.training.config import Gradient

EPOCHS = 5
SEEDS = 3
# Learning rates tried with the first seed; the best by validation loss is run with the others.
GRADIENTS: Mapping[tuple[Gradient, int], Sequence[float]] = {
    ("backpropagation", 1): (0.1, 0.2, 0.4),
    ("feedback", 4): (0.05, 0.1, 0.2),
    ("projection", 4): (0.2, 0.4, 0.8),
    ("projection", 16): (0.1, 0.2, 0.4),
    ("local", 4): (0.025, 0.05, 0.1),
    ("previous", 4): (0.0125, 0.025, 0.05),
}


def searched() -> Iterator[Training]:
    """All learning rates with the first seed."""
    for (gradient, count), rates in GRADIENTS.items():
        for rate in rates:
            yield Training("fc", "mnist", gradient, count, 0, rate, epochs=EPOCHS)


def chosen(store: Store) -> Iterator[Training]:
    """The best learning rate of every gradient whose search has ended, with all seeds."""
    for key in GRADIENTS:
        cells = [cell for cell in searched() if (cell.gradient, cell.num_tangents) == key]
        if all(store.rows([cell]) for cell in cells):
            best = min(cells, key=lambda cell: _loss(store, cell))
            yield from (replace(best, seed=seed) for seed in range(SEEDS))


def _loss(store: Store, cell: Training) -> float:
    """The least validation loss of a run that has ended, infinite if it diverged."""
    rows = store.rows([cell])
    return inf if rows[-1]["diverged"] else min(float(row["validation_loss"]) for row in rows)


def converged() -> Iterator[Training]:
    """Runs to their end, with the learning rate published for backpropagation."""
    for seed in range(SEEDS):
        yield training("fc", "mnist", "backpropagation", 1, seed)
        yield training("fc", "mnist", "feedback", 4, seed)


def main(folder: Path, data_dir: Path | None) -> None:
    """Run what is missing; then write the tables."""
    torch.set_num_threads(1)
    store = Store(folder)
    context = Context(store, data_dir, "cpu")

    def table(name: str, cells: Iterable[Training]) -> None:
        cells = list(cells)
        store.work(cells, lambda cell: _training.run(cell, context))
        write_csv(folder / f"{name}.csv", _training.results(store.rows(cells)))

    table("searched", searched())
    table("chosen", chosen(store))
    table("converged", converged())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    main(given.folder, given.data_dir)
