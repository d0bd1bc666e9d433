"""What each command does: from its configuration to a value that prints and turns to JSON.

Imported only once there is something to do, since it loads torch and lightning.
"""

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from multitangent_lab.cli._progress import ProgressBar, progress_bars
from multitangent_lab.config import CompareConfig, TrainConfig
from multitangent_lab.training import Comparison, Reached, TrainResult, compare, train


def run_train(config: TrainConfig, *, json: bool) -> dict[str, Any]:
    """Trains, and prints one line unless `json`."""
    config = config.resolved()
    with progress_bars() as progress:
        result = train(config, [ProgressBar(progress, config.label)])
    if not json:
        print(_sentence(result, config.loss_unit))
    return result.as_json()


def run_compare(config: CompareConfig, *, json: bool) -> dict[str, Any]:
    """Compares, and prints a table unless `json`."""
    with progress_bars() as progress:
        comparison = compare(config, lambda run: [ProgressBar(progress, run.label)])
    if not json:
        console = Console()
        console.print(_table(comparison, config.loss_unit))
        pictures = ["curves.png"]
        if comparison.until_loss is not None:
            console.print(_clock_table(comparison, config.loss_unit))
            pictures.append("clock.png")
        paths = ", ".join(str(comparison.run_dir / name) for name in pictures)
        console.print(f"curves: {paths}", soft_wrap=True)
    return comparison.as_json()


def _sentence(result: TrainResult, unit: str) -> str:
    if result.test_error is None or result.validation_error is None:
        measured = (
            f"test loss {result.test_loss:.4f}, validation loss {result.validation_loss:.4f}"
            f"{unit and ' '}{unit}"
        )
    else:
        measured = (
            f"test error {result.test_error:.2%}, validation error {result.validation_error:.2%}"
        )
    return (
        f"{measured} (epoch {result.best_epoch} of {result.epochs}), "
        f"{result.seconds_per_epoch:.3g} s per epoch; {result.run_dir}"
    )


def _table(comparison: Comparison, unit: str) -> Table:
    measure = "error" if any(r.test_error is not None for r in comparison.results) else "loss"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=f"losses in {unit}" if unit else None)
    table.add_column("gradient", no_wrap=True)
    for name in (
        "K",
        "learning\nrate",
        "epochs",
        f"validation\n{measure}",
        f"test\n{measure}",
        "s per\nepoch",
        "time\nratio",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    for result in comparison.results:
        ratio = comparison.time_ratio(result)
        table.add_row(
            result.gradient,
            "" if result.num_tangents is None else str(result.num_tangents),
            f"{result.learning_rate:.3g}",
            str(result.epochs),
            _judged(result.validation_error, result.validation_loss),
            _judged(result.test_error, result.test_loss),
            f"{result.seconds_per_epoch:.3f}",
            "" if ratio is None else f"{ratio:.2f}x",
        )
    return table


def _judged(error: float | None, loss: float) -> str:
    return f"{loss:.4f}" if error is None else f"{error:.2%}"


def _clock_table(comparison: Comparison, unit: str) -> Table:
    """How long every gradient took to reach a loss."""
    of_unit = f" in {unit}" if unit else ""
    caption = f"validation losses{of_unit}; seconds of training steps alone"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=caption)
    table.add_column("gradient", no_wrap=True)
    for name in ("loss to\nreach", "above", "seconds", "steps", "epochs", "time\nratio"):
        table.add_column(name, justify="right", no_wrap=True)
    reference = {
        found.above: found.seconds
        for result in comparison.results
        if result.gradient == "backpropagation"
        for found in comparison.reached(result)
    }
    for result in comparison.results:
        for i, found in enumerate(comparison.reached(result)):
            table.add_row(
                result.gradient if i == 0 else "",
                f"{found.loss:.4f}",
                f"{found.above:.0%}",
                *_spent(found, reference.get(found.above)),
            )
    return table


def _spent(found: Reached, reference: float | None) -> tuple[str, ...]:
    if found.seconds is None:
        return "not reached", "", "", ""
    ratio = f"{found.seconds / reference:.2f}x" if reference else ""
    return f"{found.seconds:.2f}", str(found.steps), f"{found.epochs:.2f}", ratio
