"""Tables and pictures of how long gradients take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from statistics import median

from pandas import DataFrame

from multitangent_lab._files import write_csv, write_text
from multitangent_lab.experiments._store import Row
from multitangent_lab.training import ABOVE, Reached, draw_clock, reached, seconds_per_step


@dataclass(frozen=True)
class Outcome:
    """The runs of one gradient at its best rate.

    Args:
        setting: The model with its data.
        gradient: The gradient.
        num_tangents: K.
        learning_rate: The best of those tried.
        at_edge: Whether it is the lowest or the highest of them, so that another may be better.
        runs: The rows of each run, by the seed.
        losses: The validation loss to reach, by the seed: the lowest of backpropagation.
    """

    setting: str
    gradient: str
    num_tangents: int
    learning_rate: float
    at_edge: bool
    runs: dict[int, Sequence[Row]] = field(default_factory=dict)
    losses: dict[int, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The gradient's name, with K where there is a choice."""
        alone = self.gradient in ("backpropagation", "residual")
        return self.gradient if alone else f"{self.gradient}-{self.num_tangents}"

    def reached(self) -> dict[int, tuple[Reached, ...]]:
        """When each run reached the loss, and losses a little above it, by the seed."""
        return {
            seed: reached(DataFrame(rows), self.losses[seed]) for seed, rows in self.runs.items()
        }


def draw(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Writes `reached.csv` and `summary.md`, and a picture for every setting.

    Args:
        outcomes: The runs of every gradient at its best rate.
        folder: Where to write.
    """
    by_setting: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_setting.setdefault(outcome.setting, []).append(outcome)
    if not by_setting:
        return
    write_csv(folder / "reached.csv", [row for outcome in outcomes for row in _rows(outcome)])
    lines = ["# The time until backpropagation's validation loss", "", *_EXPLANATION]
    for setting, of_setting in by_setting.items():
        lines += ["", f"## {setting}", "", *_table(of_setting)]
        curves = {o.label: [DataFrame(rows) for rows in o.runs.values()] for o in of_setting}
        loss = median(loss for outcome in of_setting for loss in outcome.losses.values())
        draw_clock(curves, loss, folder / f"{setting}.png", setting)
    write_text(folder / "summary.md", "\n".join(lines) + "\n")


def _rows(outcome: Outcome) -> list[Row]:
    return [
        {
            "setting": outcome.setting,
            "gradient": outcome.gradient,
            "num_tangents": outcome.num_tangents,
            "learning_rate": outcome.learning_rate,
            "at_edge": outcome.at_edge,
            "seed": seed,
            **found.as_json(),
            **{name: _spent_then(outcome.runs[seed], found, name) for name in _CLOCKS},
        }
        for seed, of_seed in outcome.reached().items()
        for found in of_seed
    ]


_CLOCKS = ("wall_seconds", "processor_seconds")


def _spent_then(rows: Sequence[Row], found: Reached, name: str) -> float | None:
    """The time of the steps until then."""
    return next((float(row[name]) for row in rows if row["step"] == found.steps), None)


_EXPLANATION = (
    "Medians over the seeds. Seconds are the number of steps times the time of one, which is the",
    "median over the intervals between validations. The ratio is that to backpropagation's seconds",
    "until the same loss. A star marks a learning rate at the edge of those tried. Where the",
    "processor's time of a step is far less than its time, other work kept the machine busy: then",
    "compare the processor's, which is right for one thread on a CPU.",
)


def _table(outcomes: Sequence[Outcome]) -> list[str]:
    columns = ["gradient", "learning rate", "ms a step", "of the processor"]
    for above in ABOVE:
        columns.append(f"{above:.0%} above: steps, seconds (ratio)" if above else "its loss")
    columns += ["seeds"]
    reference = next((_medians(o) for o in outcomes if o.gradient == "backpropagation"), {})
    lines = ["| " + " | ".join(columns) + " |", "| --- " * len(columns) + "|"]
    for outcome in outcomes:
        found = _medians(outcome)
        words = [
            outcome.label,
            f"{outcome.learning_rate:g}" + ("*" if outcome.at_edge else ""),
            *(_step_time(outcome, column) for column in ("seconds", "processor_seconds")),
            *(_spent(*found[above], reference.get(above, (inf, inf))[1]) for above in ABOVE),
            str(len(outcome.runs)),
        ]
        lines.append("| " + " | ".join(words) + " |")
    return lines


def _medians(outcome: Outcome) -> Mapping[float, tuple[float, float]]:
    """Steps and seconds by how far the loss is above; infinite for what was not reached."""
    steps: dict[float, list[float]] = {above: [] for above in ABOVE}
    seconds: dict[float, list[float]] = {above: [] for above in ABOVE}
    for of_seed in outcome.reached().values():
        for found in of_seed:
            steps[found.above].append(inf if found.steps is None else found.steps)
            seconds[found.above].append(inf if found.seconds is None else found.seconds)
    return {above: (median(steps[above]), median(seconds[above])) for above in ABOVE}


def _step_time(outcome: Outcome, column: str) -> str:
    """Milliseconds of a step."""
    found = [seconds_per_step(DataFrame(rows), column) for rows in outcome.runs.values()]
    times = [time for time in found if time is not None]
    return f"{1000 * median(times):.3g}" if times else ""


def _spent(steps: float, seconds: float, reference: float) -> str:
    if inf in (steps, seconds):
        return "not reached"
    ratio = f" ({seconds / reference:.2f})" if 0 < reference < inf else ""
    return f"{steps:.0f}, {seconds:.3g}{ratio}"
