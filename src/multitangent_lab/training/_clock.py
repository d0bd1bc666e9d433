"""How long it takes until a validation loss is reached."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pandas import DataFrame

ABOVE = (0.05, 0.02, 0.0)


@dataclass(frozen=True, kw_only=True)
class Reached:
    """When a run first reached a loss; None where it never did.

    Args:
        above: The distance of the loss above the requested one, as a share of the latter.
        loss: The loss.
        seconds: Time in training steps until then, without validations.
        steps: Steps until then.
        epochs: Epochs until then, and parts of them.
    """

    above: float
    loss: float
    seconds: float | None
    steps: int | None
    epochs: float | None

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return asdict(self)


def reached(
    progress: "DataFrame", loss: float, above: Sequence[float] = ABOVE
) -> tuple[Reached, ...]:
    """Returns when a run first reached `loss`, and losses that are some share above it.

    The first validation that is low enough counts, so validations should not be far apart.

    Args:
        progress: `epoch`, `step`, `seconds` and `validation_loss`, a row per validation, in order.
        loss: The requested loss.
        above: The shares.

    Examples:
        >>> from pandas import DataFrame
        >>> losses = {"validation_loss": [2.0, 1.04, 0.99, 1.3]}
        >>> spent = {"epoch": [0, 1, 2, 3], "step": [0, 9, 18, 27], "seconds": [0.0, 0.5, 1.0, 1.5]}
        >>> [found.steps for found in reached(DataFrame(losses | spent), 1.0)]
        [9, 18, 18]
        >>> reached(DataFrame(losses | spent), 0.5)[-1].seconds is None
        True
    """
    return tuple(_first(progress, loss, share) for share in above)


def _first(progress: "DataFrame", loss: float, above: float) -> Reached:
    wanted = loss * (1 + above)
    low = progress[progress["validation_loss"] <= wanted]
    if low.empty:
        return Reached(above=above, loss=wanted, seconds=None, steps=None, epochs=None)
    row = low.iloc[0]
    return Reached(
        above=above,
        loss=wanted,
        seconds=float(row["seconds"]),
        steps=int(row["step"]),
        epochs=float(row["epoch"]),
    )


def seconds_per_step(progress: "DataFrame", column: str = "seconds") -> float | None:
    """Returns the time of a step: the median over the intervals between two validations.

    The time of an interval is the mean over its steps. So a busy machine or a slow first step
    hardly counts. A median over single steps would leave out the work that a method does only in
    every m-th step. The result is None without an interval.

    Args:
        progress: `step` and `seconds`, a row per validation.
        column: What to count in place of `seconds`, such as `processor_seconds`.

    Examples:
        >>> from pandas import DataFrame
        >>> seconds_per_step(DataFrame({"step": [0, 4, 8, 12], "seconds": [0.0, 9.0, 10.0, 11.2]}))
        0.3
    """
    steps, seconds = progress["step"].diff(), progress[column].diff()
    times = (seconds / steps)[steps > 0]
    return None if times.empty else round(float(times.median()), 9)
