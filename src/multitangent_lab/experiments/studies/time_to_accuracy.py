"""How long every gradient takes until it is as good as backpropagation.

For each setting every gradient tries the same number of learning rates, in a geometric grid around
a rate that is known to suit. The best by validation loss runs with three seeds, until it reaches
the lowest loss of backpropagation with the same seed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal

from multitangent_lab.config import GradientName
from multitangent_lab.experiments._experiment import Experiment
from multitangent_lab.experiments._store import Row, Store
from multitangent_lab.experiments._timed_training import TimedTraining, run
from multitangent_lab.experiments.studies._time_tables import Outcome, draw

SEEDS = 3
FACTOR = 2.0  # between two rates of a grid
LONGER = 3  # the largest number of epochs to reach the loss, over backpropagation's

Method = tuple[GradientName | Literal["dust"], int]
BACKPROPAGATION: Method = ("backpropagation", 1)
RANDOM: Method = ("projection", 16)
# Activity perturbation with a measurement of every token (Dust, 2026): as many runs of the model as
# RANDOM pushes tangents.
DUST: Method = ("dust", 8)
_DUST = {"gradient": "mean", "credit": "token", "share": "sample", "differences": True}
_TEXT = {
    "model": "gpt",
    "dataset": "text",
    "text_file": "text/kjv.txt",
    "images": 14400,
    "batch_size": 32,
    "evaluate_every": 50,
}


@dataclass(frozen=True)
class Setting:
    """A model with its data.

    Args:
        name: The name of the setting.
        epochs: The epochs of backpropagation, and of every other gradient in the search.
        rates: The middle of the grid of learning rates, for every gradient and K.
        options: Further fields of `TimedTraining`.
        of_method: The same for one gradient and K alone.
        trials: How many learning rates every gradient tries; odd.
        hopeless: Gradients that are too far from the loss to be given more epochs.
    """

    name: str
    epochs: int
    rates: Mapping[Method, float]
    options: dict[str, Any]
    of_method: Mapping[Method, dict[str, Any]] = field(default_factory=dict)
    trials: int = 5
    hopeless: Sequence[Method] = ()

    def cell(
        self, method: Method, rate: float, seed: int, until: float | None = None
    ) -> TimedTraining:
        """One run. With a loss to reach it may take more epochs."""
        gradient, num_tangents = method
        may_go_on = until is not None and method not in self.hopeless
        values: dict[str, Any] = {
            "setting": self.name,
            "gradient": gradient,
            "num_tangents": num_tangents,
            "learning_rate": rate,
            "seed": seed,
            "epochs": LONGER * self.epochs if may_go_on else self.epochs,
            "until_loss": until,
        }
        return TimedTraining(**values | self.options | self.of_method.get(method, {}))

    def trials_of(self, method: Method) -> list[TimedTraining]:
        """The search of one gradient, in rising order of the learning rate."""
        around = self.trials // 2
        rates = [self.rates[method] * FACTOR**i for i in range(-around, around + 1)]
        return [self.cell(method, float(f"{rate:.4g}"), 0) for rate in rates]


def _rates(rate: float, projection: float, *guesses: Method) -> dict[Method, float]:
    """Rates for gradients as long as the true one, and for the projection."""
    of_guesses = dict.fromkeys((BACKPROPAGATION, *guesses), rate)
    return of_guesses | {RANDOM: projection}


SETTINGS = (
    Setting(
        "gpt",
        2,
        _rates(0.0015, 0.0015, ("residual", 1)) | {DUST: 0.0015},
        _TEXT,
        {DUST: _DUST},
        hopeless=(RANDOM, DUST),
    ),
    Setting(
        "gpt-8-blocks",
        2,
        {BACKPROPAGATION: 0.00075, ("residual", 1): 0.0015},
        _TEXT | {"blocks": 8},
        trials=3,
    ),
    Setting(
        "vit",
        6,
        _rates(0.1, 0.5, ("residual", 1), ("feedback", 4)),
        {
            "model": "vit",
            "dataset": "cifar10",
            "images": 2400,
            "batch_size": 32,
            "evaluate_every": 25,
        },
        hopeless=(RANDOM,),
    ),
    Setting(
        "resnet18",
        6,
        _rates(0.02, 0.5, ("feedback", 3), ("informed", 8)),
        {
            "model": "resnet18",
            "dataset": "cifar10",
            "images": 3200,
            "batch_size": 32,
            "evaluate_every": 25,
            "recalibrate": True,
        },
        {("feedback", 3): {"sites": ("stage2", "head")}},
        hopeless=(RANDOM,),
    ),
    Setting(
        "fc",
        5,
        _rates(0.1, 0.2, ("direct", 5), ("feedback", 4)),
        {"model": "fc", "dataset": "mnist", "evaluate_every": 100},
        {key: {"learn_every": 32} for key in (("direct", 5), ("feedback", 4))},
    ),
)
QUICK = (
    Setting(
        "digits",
        3,
        _rates(0.4, 0.4, ("informed", 8), ("feedback", 4)),
        {"model": "fc", "dataset": "digits", "width": 64, "evaluate_every": 6},
        trials=3,
    ),
    Setting(
        "python",
        1,
        {BACKPROPAGATION: 0.006, ("residual", 1): 0.006},
        {
            "model": "gpt",
            "dataset": "text",
            "images": 640,
            "batch_size": 32,
            "context": 16,
            "embedding": 32,
            "blocks": 2,
            "evaluate_every": 5,
        },
        trials=1,
    ),
)


def cells(quick: bool) -> list[TimedTraining]:
    """The searches, with the first seed."""
    settings = QUICK if quick else SETTINGS
    return [cell for s in settings for method in s.rates for cell in s.trials_of(method)]


def further(store: Store) -> Iterator[TimedTraining]:
    """The other seeds of backpropagation, and then the others until they reach its loss.

    A gradient waits until its search has ended, and until backpropagation has run with the seed.
    """
    for setting in (*SETTINGS, *QUICK):
        for seed in range(SEEDS):
            yield from chosen(setting, BACKPROPAGATION, seed, store)
        for method in setting.rates:
            if method != BACKPROPAGATION:
                for seed in range(SEEDS):
                    yield from chosen(setting, method, seed, store)


def chosen(setting: Setting, method: Method, seed: int, store: Store) -> Iterator[TimedTraining]:
    """The run at the best rate, if this rate and the loss to reach are known."""
    rate = best_rate(setting, method, store)
    if rate is None:
        return
    if method == BACKPROPAGATION:
        yield setting.cell(method, rate, seed)
        return
    for reference in chosen(setting, BACKPROPAGATION, seed, store):
        if rows := store.rows([reference]):
            yield setting.cell(method, rate, seed, until=least_loss(rows))


def best_rate(setting: Setting, method: Method, store: Store) -> float | None:
    """The cell with the lowest validation loss; None before the search ends, or if all diverge."""
    losses = {
        cell.learning_rate: least_loss(rows)
        for cell in setting.trials_of(method)
        if (rows := store.rows([cell]))
    }
    if len(losses) < setting.trials or min(losses.values()) == inf:
        return None
    return min(losses, key=losses.__getitem__)


def least_loss(rows: Sequence[Row]) -> float:
    """The lowest validation loss of a run, infinite if it diverged."""
    return inf if rows[-1]["diverged"] else min(float(row["validation_loss"]) for row in rows)


def outcomes(store: Store) -> Iterator[Outcome]:
    """The runs at the best rates that have ended."""
    for setting in (*SETTINGS, *QUICK):
        for method in setting.rates:
            rate = best_rate(setting, method, store)
            if rate is None:
                continue
            tried = [cell.learning_rate for cell in setting.trials_of(method)]
            found = Outcome(setting.name, *method, rate, rate in (tried[0], tried[-1]))
            for seed in range(SEEDS):
                for cell in chosen(setting, method, seed, store):
                    if rows := store.rows([cell]):
                        found.runs[seed] = rows
                        found.losses[seed] = cell.until_loss or least_loss(rows)
            if found.runs:
                yield found


EXPERIMENT = Experiment(
    title="The time until backpropagation's validation loss",
    cells=lambda quick, simulated: cells(quick),
    run=run,
    draw=lambda rows, folder: draw(list(outcomes(Store(folder))), folder),
    further=further,
)
