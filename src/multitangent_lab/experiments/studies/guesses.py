"""Gradients with guesses beside backpropagation and random tangents, on the paper's networks.

Run as ``python -m multitangent_lab.experiments.studies.guesses FOLDER [STUDY ...]``.

Every run is stored as it ends, and not run again; any number of processes can share a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

import torch

from multitangent_lab._files import write_csv
from multitangent_lab.config import GradientName
from multitangent_lab.experiments import _training
from multitangent_lab.experiments._experiment import Context
from multitangent_lab.experiments._store import Store
from multitangent_lab.experiments._training import Training, training

SEEDS = 3


@dataclass(frozen=True)
class Study:
    """Gradients compared on one network after the same epochs.

    Args:
        model: The network.
        dataset: The data set.
        rates: For every gradient and K the learning rates tried with the first seed; the best by
            validation loss is run with the others.
        options: What all runs have in common, fields of `Training`.
        simulated: Gradients whose directional derivatives come from backpropagation, to save time.
    """

    model: Literal["fc", "resnet18", "vit"]
    dataset: Literal["mnist", "cifar10"]
    rates: Mapping[tuple[GradientName, int], Sequence[float]]
    options: Mapping[str, Any]
    simulated: Sequence[GradientName] = field(default=())

    def searched(self) -> Iterator[Training]:
        """All learning rates with the first seed."""
        for (gradient, count), tried in self.rates.items():
            for rate in tried:
                yield Training(
                    self.model,
                    self.dataset,
                    gradient,
                    count,
                    0,
                    rate,
                    simulated=gradient in self.simulated,
                    **self.options,
                )


STUDIES: Mapping[str, Study] = {
    "two-layers": Study(
        "fc",
        "mnist",
        {
            ("backpropagation", 1): (0.1, 0.2, 0.4),
            ("feedback", 4): (0.1, 0.2, 0.4),
            ("projection", 4): (0.2, 0.4, 0.8),
            ("projection", 16): (0.1, 0.2, 0.4),
            ("local", 4): (0.05, 0.1, 0.2),
            ("previous", 4): (0.025, 0.05, 0.1),
        },
        {"epochs": 5},
    ),
    "eight-layers": Study(
        "fc",
        "mnist",
        {
            ("backpropagation", 1): (0.1, 0.2, 0.4),
            ("feedback", 10): (0.1, 0.2, 0.4),
            ("projection", 12): (0.1, 0.4, 1.6),
        },
        {"epochs": 5, "hidden_layers": 8},
    ),
    "resnet18-small": Study(
        "resnet18",
        "cifar10",
        {
            ("backpropagation", 1): (0.01, 0.03),
            ("informed", 8): (0.01, 0.03),
            ("projection", 16): (0.1, 0.5),
        },
        {"epochs": 6, "images": 3200, "batch_size": 32, "recalibrate": True},
    ),
    "vit-small": Study(
        "vit",
        "cifar10",
        {
            ("backpropagation", 1): (0.05, 0.1),
            ("feedback", 4): (0.05, 0.1),
            ("projection", 16): (0.1, 0.5),
        },
        {"epochs": 6, "images": 2400, "batch_size": 32},
        simulated=("projection",),
    ),
    "resnet18": Study(
        "resnet18",
        "cifar10",
        {
            ("backpropagation", 1): (0.03, 0.1),
            ("informed", 8): (0.01, 0.03, 0.1),
            ("projection", 16): (0.4864,),
        },
        {"batch_size": 128, "recalibrate": True},
    ),
    "vit": Study(
        "vit",
        "cifar10",
        {
            ("backpropagation", 1): (0.1,),
            ("feedback", 4): (0.05, 0.1),
            ("informed", 9): (0.05, 0.1),
            ("projection", 16): (0.4864,),
        },
        {"batch_size": 128},
    ),
}
FULL = ("resnet18", "vit")  # for a GPU


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


def main(folder: Path, studies: Sequence[str], context: Context) -> None:
    """Run what is missing; then write the tables."""
    store = context.store

    def table(name: str, cells: Iterable[Training]) -> None:
        cells = list(cells)
        store.work(cells, lambda cell: _training.run(cell, context))
        if rows := store.rows(cells):
            write_csv(folder / f"{name}.csv", _training.results(rows))

    for name in studies:
        cells = list(STUDIES[name].searched())
        table(f"{name}-searched", cells)
        table(f"{name}-chosen", chosen(store, cells))
        if name == "two-layers":
            table("two-layers-converged", converged())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("study", nargs="*", help=", ".join(STUDIES))
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args()
    if unknown := [name for name in given.study if name not in STUDIES]:
        parser.error(f"unknown: {', '.join(unknown)}. Try {', '.join(STUDIES)}.")
    torch.set_num_threads(1)
    small = [name for name in STUDIES if name not in FULL]
    main(
        given.folder,
        given.study or small,
        Context(Store(given.folder), given.data_dir, given.device),
    )
