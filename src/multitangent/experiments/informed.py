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
Rates = Mapping[tuple[Gradient, int], Sequence[float]]
TWO_LAYERS: Rates = {
    ("backpropagation", 1): (0.1, 0.2, 0.4),
    ("feedback", 4): (0.1, 0.2, 0.4),
    ("projection", 4): (0.2, 0.4, 0.8),
    ("projection", 16): (0.1, 0.2, 0.4),
    ("local", 4): (0.05, 0.1, 0.2),
    ("previous", 4): (0.025, 0.05, 0.1),
}
EIGHT_LAYERS: Rates = {
    ("backpropagation", 1): (0.1, 0.2, 0.4),
    ("feedback", 10): (0.1, 0.2, 0.4),
    ("projection", 12): (0.1, 0.4, 1.6),
}


def searched(rates: Rates, hidden_layers: int) -> Iterator[Training]:
    """All learning rates with the first seed."""
    for (gradient, count), tried in rates.items():
        for rate in tried:
            yield Training(
                "fc", "mnist", gradient, count, 0, rate, epochs=EPOCHS, hidden_layers=hidden_layers
            )


def chosen(store: Store, cells: Sequence[Training]) -> Iterator[Training]:
    """The best learning rate of every gradient whose search has ended, with all seeds."""
    for key in dict.fromkeys((cell.gradient, cell.num_tangents) for cell in cells):
        own = [cell for cell in cells if (cell.gradient, cell.num_tangents) == key]
        if all(store.rows([cell]) for cell in own):
            best = min(own, key=lambda cell: _loss(store, cell))
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

    for name, rates, hidden_layers in (("two", TWO_LAYERS, 2), ("eight", EIGHT_LAYERS, 8)):
        cells = list(searched(rates, hidden_layers))
        table(f"{name}-layers-searched", cells)
        table(f"{name}-layers-chosen", chosen(store, cells))
    table("two-layers-converged", converged())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-dir", type=Path)
    given = parser.parse_args()
    main(given.folder, given.data_dir)
