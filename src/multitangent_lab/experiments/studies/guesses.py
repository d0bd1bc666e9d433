"""Gradients with guesses beside backpropagation and random tangents, on the paper's networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import inf
from pathlib import Path
from typing import Any, Literal

from multitangent_lab._files import write_csv
from multitangent_lab.config import GradientName
from multitangent_lab.experiments._experiment import Experiment
from multitangent_lab.experiments._store import Row, Store
from multitangent_lab.experiments._training import Training, results, run, training

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
    "two-layers-every-32": Study(
        "fc",
        "mnist",
        {("feedback", 4): (0.1, 0.2, 0.4), ("direct", 5): (0.1, 0.2, 0.4)},
        {"epochs": 5, "learn_every": 32},
    ),
    "three-layers-every-32": Study(
        "fc",
        "mnist",
        {
            ("backpropagation", 1): (0.1, 0.2, 0.4),
            ("feedback", 5): (0.1, 0.2, 0.4),
            ("direct", 5): (0.1, 0.2, 0.4),
        },
        {"epochs": 5, "hidden_layers": 3, "learn_every": 32},
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
    "resnet18-small-two-sites": Study(
        "resnet18",
        "cifar10",
        {("feedback", 3): (0.01, 0.03, 0.06)},
        {
            "epochs": 6,
            "images": 3200,
            "batch_size": 32,
            "recalibrate": True,
            "sites": ("stage2", "head"),
        },
    ),
    "vit-small": Study(
        "vit",
        "cifar10",
        {
            ("backpropagation", 1): (0.05, 0.1),
            ("residual", 1): (0.05, 0.1),
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
_FULL = ("resnet18", "vit")  # for a GPU
_SMALL = tuple(name for name in STUDIES if name not in _FULL)


def chosen(store: Store, cells: Sequence[Training]) -> Iterator[Training]:
    """The best learning rate of every gradient whose search has ended, with all seeds."""
    for key in dict.fromkeys((cell.gradient, cell.num_tangents) for cell in cells):
        tried = [cell for cell in cells if (cell.gradient, cell.num_tangents) == key]
        if all(store.rows([cell]) for cell in tried):
            best = min(tried, key=lambda cell: _loss(store.rows([cell])))
            yield from (replace(best, seed=seed) for seed in range(SEEDS))


def _loss(rows: Sequence[Row]) -> float:
    """The least validation loss of a run that has ended, infinite if it diverged."""
    return inf if rows[-1]["diverged"] else min(float(row["validation_loss"]) for row in rows)


def converged() -> Iterator[Training]:
    """Runs to their end, with the learning rate published for backpropagation."""
    for seed in range(SEEDS):
        yield training("fc", "mnist", "backpropagation", 1, seed)
        yield training("fc", "mnist", "feedback", 4, seed)


def _cells(names: Sequence[str]) -> list[Training]:
    return [cell for name in names for cell in STUDIES[name].searched()]


def _further(names: Sequence[str], store: Store) -> list[Training]:
    cells = [c for name in names for c in chosen(store, list(STUDIES[name].searched()))]
    return [*cells, *converged()] if "two-layers" in names else cells


def _draw(names: Sequence[str], rows: list[Row], folder: Path) -> None:
    """One table of the rates that were tried, and one of the best rates, for every network."""
    store = Store(folder)
    for name in names:
        cells = list(STUDIES[name].searched())
        tables = {"searched": cells, "chosen": list(chosen(store, cells))}
        if name == "two-layers":
            tables["converged"] = list(converged())
        for kind, of_table in tables.items():
            if stored := store.rows(of_table):
                write_csv(folder / f"{name}-{kind}.csv", results(stored))


def experiment_on(title: str, names: Sequence[str]) -> Experiment:
    return Experiment(
        title=title,
        cells=lambda quick, simulated: _cells(names),
        run=run,
        draw=partial(_draw, names),
        further=partial(_further, names),
    )


EXPERIMENT = experiment_on("Gradients with guesses, in small", _SMALL)
FULL = experiment_on("Gradients with guesses, in full", _FULL)
