"""Adapters of a language model, tuned with equal numbers of forward passes by every gradient.

A small model of bytes is trained by backpropagation on an English text, and then tuned by LoRA to
Python's standard library. `passes_per_step` says what counts as a forward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from math import inf
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from multitangent_lab._files import write_text
from multitangent_lab.experiments._draw_tuning import draw_curves, label
from multitangent_lab.experiments._experiment import Claim, Experiment
from multitangent_lab.experiments._store import Row, Store
from multitangent_lab.experiments._tuning import Method, Optimizer, Tuning, run

SEEDS = 3
FACTOR = 3.0  # between two rates of the search
EXTENSIONS = 3  # rates tried beyond those three, at most


@dataclass(frozen=True)
class Contender:
    """A gradient with its optimiser, and the learning rate around which the search starts."""

    method: Method
    num_tangents: int
    guess: bool
    optimizer: Optimizer
    rate: float

    def at(self, learning_rate: float, seed: int = 0) -> Tuning:
        """The cell with that learning rate."""
        return replace(
            SETTING,
            method=self.method,
            num_tangents=self.num_tangents,
            guess=self.guess,
            optimizer=self.optimizer,
            learning_rate=float(f"{learning_rate:.3g}"),
            seed=seed,
        )

    def rates(self) -> list[float]:
        """The learning rates that are always tried, in rising order."""
        return [self.rate / FACTOR, self.rate, self.rate * FACTOR]


SETTING = Tuning("single", 1, False, "sgd", 1.0, 0)  # what all cells have in common

# Plain SGD for all, as published for MeZO, and Adam beside it for two of them. With far fewer
# tangents than weights a projection is K/n of the mean: hence its rates.
CONTENDERS: Sequence[Contender] = (
    Contender("backpropagation", 1, False, "sgd", 0.3),
    Contender("mezo", 1, False, "sgd", 0.003),
    Contender("mean", 16, False, "sgd", 0.03),
    Contender("mean", 16, True, "sgd", 0.03),
    Contender("projection", 16, False, "sgd", 30.0),
    Contender("projection", 16, True, "sgd", 10.0),
    Contender("single", 1, False, "sgd", 0.003),
    Contender("mean", 4, False, "sgd", 0.01),
    Contender("mean", 4, True, "sgd", 0.01),
    Contender("projection", 4, False, "sgd", 40.0),
    Contender("projection", 4, True, "sgd", 10.0),
    Contender("mezo", 1, False, "adam", 0.003),
    Contender("mean", 16, False, "adam", 0.01),
)


def cells() -> Iterator[Tuning]:
    """The first three learning rates of every contender, with the first seed."""
    for contender in CONTENDERS:
        yield from map(contender.at, contender.rates())


def further(store: Store) -> Iterator[Tuning]:
    """Learning rates beyond a best one at an edge, and then the other seeds at the best one.

    If a cell has not run when the next one is asked for, its contender ends here. Other processes
    work on the cell, and go on from there.
    """
    for contender in CONTENDERS:
        yield from _further(contender, store)


def _further(contender: Contender, store: Store) -> Iterator[Tuning]:
    rates = contender.rates()
    for _ in range(EXTENSIONS):
        best = _best(contender, rates, store)
        if best is None or best not in (rates[0], rates[-1]):
            break
        rates = [best / FACTOR, *rates] if best == rates[0] else [*rates, best * FACTOR]
        yield contender.at(rates[0] if best == rates[1] else rates[-1])
    best = _best(contender, rates, store)
    if best is not None:
        yield from (contender.at(best, seed) for seed in range(1, SEEDS))


def _best(contender: Contender, rates: Sequence[float], store: Store) -> float | None:
    """The rate with the least loss at the end, or `None` if some rates have not run."""
    losses = {rate: final_loss(store.rows([contender.at(rate)])) for rate in rates}
    if None in losses.values():
        return None
    return min(rates, key=lambda rate: losses[rate] or inf)


def final_loss(rows: Sequence[Row]) -> float | None:
    """The loss at the end of a run: infinite if it diverged, `None` if there are no rows."""
    if not rows:
        return None
    return inf if rows[-1]["diverged"] else float(rows[-1]["validation_loss"])


Runs = Mapping[tuple[Any, ...], Sequence[Sequence[Row]]]

_OF_A_CONTENDER = ("method", "num_tangents", "guess", "optimizer")
_OF_A_RUN = tuple(field.name for field in fields(Tuning))


def chosen(rows: Sequence[Row]) -> Runs:
    """The runs of every contender, one per seed, with the rate that is best for the first seed."""
    runs: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        runs.setdefault(tuple(row[name] for name in _OF_A_RUN), []).append(row)
    tried: dict[tuple[Any, ...], list[list[Row]]] = {}
    for of_run in runs.values():
        key = tuple(of_run[0][name] for name in _OF_A_CONTENDER)
        tried.setdefault(key, []).append(of_run)
    found = {}
    for key, of_contender in tried.items():
        first = [of_run for of_run in of_contender if of_run[0]["seed"] == 0]
        best = min(first, key=lambda of_run: final_loss(of_run) or inf)[0]["learning_rate"]
        found[key] = [run for run in of_contender if run[0]["learning_rate"] == best]
    return found


def draw(rows: list[Row], folder: Path) -> None:
    """Writes a table of where each contender ends, and draws the curves."""
    runs = chosen(rows)
    base = Store(folder).rows([SETTING.base])
    write_text(folder / "summary.md", _table(runs, base))
    draw_curves(runs, folder / "adapters.png")


def _table(runs: Runs, base: Sequence[Row]) -> str:
    lines = ["# Adapters tuned with equal numbers of forward passes", ""]
    if base:
        source, target = (base[0][f"{name}_loss"] for name in ("source", "target"))
        lines += [
            f"Loss of the base model in nats a byte: {source:.3f} on the text that it was trained "
            f"on, {target:.3f} on Python's standard library.",
            "",
        ]
    lines += ["| " + " | ".join(_COLUMNS) + " |", "| --- " * len(_COLUMNS) + "|"]
    for key, of_contender in sorted(runs.items(), key=lambda item: _mean_loss(item[1])):
        last = [rows[-1] for rows in of_contender]
        words = [
            label(*key),
            f"{last[0]['learning_rate']:g}",
            _mean_and_spread([final_loss(rows) or inf for rows in of_contender]),
            str(last[0]["step"]),
            str(last[0]["passes"]),
            f"{fmean(row['seconds'] for row in last):.1f}",
            str(len(last)),
        ]
        lines.append("| " + " | ".join(words) + " |")
    return "\n".join(lines) + "\n"


_COLUMNS = (
    "gradient and optimiser",
    "learning rate",
    "validation loss, mean (standard deviation)",
    "steps",
    "forward passes",
    "seconds",
    "seeds",
)


def _mean_loss(runs: Sequence[Sequence[Row]]) -> float:
    return fmean(final_loss(rows) or inf for rows in runs)


def _mean_and_spread(losses: Sequence[float]) -> str:
    if inf in losses:
        return "diverged"
    return f"{fmean(losses):.4f}" + (f" ({stdev(losses):.4f})" if len(losses) > 1 else "")


def claims(rows: list[Row]) -> list[Claim]:
    """Whether several tangents are ahead of finite differences."""
    losses = {key: _mean_loss(of_contender) for key, of_contender in chosen(rows).items()}
    several = {key: loss for key, loss in losses.items() if key[1] > 1}
    differences = {key: loss for key, loss in losses.items() if key[0] == "mezo"}
    if not (several and differences):
        return []
    one, other = (min(some, key=some.__getitem__) for some in (several, differences))
    return [
        Claim(
            None,
            "at equal numbers of forward passes several tangents are ahead of MeZO",
            several[one] < differences[other],
            f"{several[one]:.4f} by {label(*one)}, {differences[other]:.4f} by {label(*other)}",
        )
    ]


EXPERIMENT = Experiment(
    title="Adapters tuned with equal numbers of forward passes",
    cells=lambda quick, simulated: list(cells()),
    run=run,
    draw=draw,
    claims=claims,
    further=further,
)
