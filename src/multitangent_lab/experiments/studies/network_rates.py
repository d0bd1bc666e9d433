"""Learning rates of fully-connected networks: searched and suggested."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, log
from pathlib import Path
from tempfile import TemporaryDirectory

from multitangent.learning_rate import suggest
from multitangent_lab.config import TrainConfig
from multitangent_lab.experiments._draw_rates import draw_rates
from multitangent_lab.experiments._experiment import Context, Experiment
from multitangent_lab.experiments._store import Cell, Row
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


def run(case: Network, context: Context) -> list[Row]:
    """Search around the suggestion, which is one of the rates that are tried."""
    true = Network(case.dataset, case.width, case.epochs, "backpropagation", 16)
    (row,) = context.store.obtain(true, lambda cell: reference_rates(cell, context.data_dir))
    lowest, highest = row["lowest"], row["highest"]
    dimension = 2 * case.width + 10
    suggested = suggest(
        lowest,
        num_tangents=case.num_tangents,
        dimension=dimension,
        aggregator=AGGREGATORS[case.gradient],
        headroom=highest / lowest,
    )
    rates = [suggested * factor for factor in _AROUND]
    found = losses(case, rates, context.data_dir)
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


def draw(rows: list[Row], folder: Path) -> None:
    """Suggested rates against searched ones."""
    draw_rates(rows, "network", folder / "network-rates.png")


EXPERIMENT = Experiment(
    title="Learning rates of fully-connected networks",
    cells=lambda quick, simulated: list(cases()),
    run=run,
    draw=draw,
)
