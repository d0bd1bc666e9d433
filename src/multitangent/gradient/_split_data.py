"""What several processes with samples of their own can not do yet."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from multitangent.engine import Trial
from multitangent.gradient._step import Step
from multitangent.objective import Batch, normalizes_batches
from multitangent.parallel import Parallel
from multitangent.tangents import TangentSource

_AXIS = "the axis 'data' of `mesh`, along which every process has samples of its own"


def check_whole(parallel: Parallel, method: str) -> None:
    """Raise where a method would look at the samples of one process only."""
    if parallel.splits_data:
        raise NotImplementedError(
            f"`{method}` should be called where one process has the whole batch. Found {_AXIS}. "
            "Try a gradient without a mesh, on one process."
        )


def check_split(result: Step, tangents: TangentSource) -> None:
    """Raise where guesses would learn from the samples of one process."""
    if result.per_sample and result.teaches:
        raise ValueError(
            "`tangents` should learn nothing from single samples along "
            f"{_AXIS}: guesses would differ from process to process. Found {tangents!r}. Try "
            "guesses that learn nothing, such as `Residual()`, or the axis 'tangent'."
        )


def check_statistics(trial: Trial, batch: Batch, modules: Sequence[nn.Module]) -> None:
    """Raise where the statistics of a batch would be those of one process."""
    is_known = batch.size > 1  # a single sample shows nothing
    if trial.normalizes if is_known else any(map(normalizes_batches, modules)):
        raise ValueError(
            "`model` should not normalise batches in training mode along "
            f"{_AXIS}: statistics would differ from process to process. Found batch normalisation. "
            "Try group or layer normalisation, or `eval()` for these modules."
        )
