"""Learning rates on closed-form functions: searched, suggested, and set by the curvature.

Run as ``python -m multitangent.experiments.function_rates FOLDER [FUNCTION ...]``. Every case is
stored as it ends, and not run again; processes for different functions can share a folder.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from multitangent import Mean, Normal, Projection
from multitangent.aggregation import Aggregator
from multitangent.benchmarks._provenance import provenance
from multitangent.functions import FUNCTIONS, Estimate, Function, TrueGradient, descend
from multitangent.learning_rate import StepRule, suggest
from multitangent.training._files import write_text

DIMENSIONS = (16, 64, 256, 1024)
TANGENTS = (1, 2, 4, 16)
AGGREGATORS: dict[str, Aggregator] = {"mean": Mean(), "projection": Projection()}
SEEDS = 5
CLOSE = 0.05  # of the initial gap to the minimum: what counts as no worse


@dataclass(frozen=True)
class Case:
    """One function, dimension, number of tangents and aggregator."""

    function: str
    dimension: int
    num_tangents: int
    aggregator: str

    @property
    def name(self) -> str:
        """For files."""
        return f"{self.function}-{self.dimension}-{self.aggregator}-{self.num_tangents}"


def cases() -> Iterator[Case]:
    """All cases, quick functions first."""
    for function in ("sphere", "styblinski-tang", "rosenbrock"):
        for dimension in DIMENSIONS:
            for count in TANGENTS:
                for aggregator in AGGREGATORS:
                    yield Case(function, dimension, count, aggregator)


def reference_rates(function: Function, dimension: int) -> tuple[float, float]:
    """The lowest and the fastest of the rates that are good for the true gradient.

    Good is a rate that comes as near to the least value of all rates as a millionth of the initial
    gap; the fastest is the first to be there.
    """
    rates = torch.logspace(-6, 0, 121, dtype=torch.float64)
    options: Any = {"seeds": 1, "dtype": torch.float64}
    found = descend(function, dimension, TrueGradient(), rates, **options)
    near = float(found.best.min()) + 1e-6 * gap(function, dimension)
    again = descend(function, dimension, TrueGradient(), rates, target=near, **options)
    steps = again.reached[:, 0]
    good = steps >= 0
    fastest = torch.where(good, steps, torch.iinfo(torch.int64).max).argmin()
    return float(rates[good].min()), float(rates[fastest])


def gap(function: Function, dimension: int) -> float:
    """From the first value to the minimum."""
    return float(function(function.start_point(dimension))) - dimension * function.minimum


def run(case: Case, lowest: float, fastest: float) -> dict[str, object]:
    """Search, suggestion and self-set rate of one case, as one row of the table.

    Args:
        case: What is run.
        lowest: The lowest of the good rates of the true gradient, and so the reference.
        fastest: Its fastest rate, and so the headroom.
    """
    function, n = FUNCTIONS[case.function], case.dimension
    aggregator = AGGREGATORS[case.aggregator]
    estimate = Estimate(Normal(case.num_tangents), aggregator)
    suggested = suggest(
        lowest,
        num_tangents=case.num_tangents,
        dimension=n,
        aggregator=aggregator,
        headroom=max(fastest / lowest, 1.0),
    )
    begun = time.perf_counter()
    # Around the suggestion, which is one of them; Rosenbrock's 25 000 steps take their time.
    long = function.steps > 10_000
    below, above, decade = (5, 5, 4) if long else (20, 10, 8)
    rates = suggested * 10 ** (torch.arange(-below, above + 1, dtype=torch.float64) / decade)
    found = descend(function, n, estimate, rates, seeds=SEEDS)
    means = found.best.mean(1)
    best = int(means.argmin())
    own = float(means[below])
    selfset = None  # not run
    if not long or (case.num_tangents in (1, 16) and n <= 64):
        selfset = float(descend(function, n, estimate, StepRule(), seeds=SEEDS).best.mean())
    allowed = float(means[best]) + CLOSE * gap(function, n)
    return {
        **asdict(case),
        "reference_rate": lowest,
        "reference_fastest": fastest,
        "suggested_rate": suggested,
        "searched_rate": float(rates[best]),
        "initial_gap": gap(function, n),
        "value_suggested": own,
        "value_searched": float(means[best]),
        "value_self_set": selfset,
        "suggested_is_no_worse": own <= allowed,
        "self_set_is_no_worse": None if selfset is None else selfset <= allowed,
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main(folder: Path, functions: Sequence[str] = ()) -> None:
    """Run what is missing, of some functions or all, one file a case; then write the table."""
    stored = folder / "cases"
    stored.mkdir(parents=True, exist_ok=True)
    references: dict[str, tuple[float, float]] = {}
    for case in cases():
        path = stored / f"{case.name}.json"
        if path.exists() or (functions and case.function not in functions):
            continue
        key = f"{case.function}-{case.dimension}"
        if key not in references:
            references[key] = reference_rates(FUNCTIONS[case.function], case.dimension)
        write_text(path, json.dumps(run(case, *references[key])) + "\n")
        print(case, flush=True)
    paths = [stored / f"{case.name}.json" for case in cases()]
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    with (folder / "functions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    draw(rows, folder / "functions.png")
    where = provenance([]) | {"command": f"python -m {__spec__.name} {_named(folder)}"}
    write_text(folder / "functions.json", json.dumps(where, indent=1) + "\n")


def _named(folder: Path) -> str:
    """A folder as it was given, unless that says where on this machine it is."""
    return folder.name if folder.is_absolute() else str(folder)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draws the suggested rate against the searched one, one panel a function, as a PNG."""
    figure = Figure(figsize=(12, 4.2), dpi=150, layout="constrained")
    names = list(dict.fromkeys(row["function"] for row in rows))
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        for aggregator, colour in (("mean", "#D55E00"), ("projection", "#0072B2")):
            for no_worse, style in ((True, {}), (False, {"facecolors": "none"})):
                some = [
                    (row["searched_rate"], row["suggested_rate"], row["num_tangents"])
                    for row in rows
                    if (row["function"], row["aggregator"]) == (name, aggregator)
                    and row["suggested_is_no_worse"] == no_worse
                ]
                label = f"{aggregator}, value {'no worse' if no_worse else 'worse'}"
                if some:
                    searched, suggested, counts = zip(*some, strict=True)
                    sizes = [20 + 6 * count for count in counts]
                    axes.scatter(
                        searched, suggested, s=sizes, edgecolors=colour, label=label,
                        **{"facecolors": colour, "alpha": 0.7} | style,
                    )  # fmt: skip
        rates = [row[which] for row in rows for which in ("searched_rate", "suggested_rate")]
        ends = min(rates) / 2, max(rates) * 2
        axes.plot(ends, ends, color="#999999", linewidth=1)
        axes.set(title=name, xlabel="searched rate", xscale="log", yscale="log")
        axes.set(xlim=ends, ylim=ends, ylabel="suggested rate")
        axes.legend(frameon=False, fontsize=8)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
