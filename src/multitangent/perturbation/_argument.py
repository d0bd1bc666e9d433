"""The perturbation of a plain function's argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from multitangent.dual import ObeyedGradMode, foreign_functions, sweep
from multitangent.objective import Batch, Evaluation, Statistics
from multitangent.perturbation._perturbation import Inject
from multitangent.tangents import Stream, Tangents

NAME = "x"


@dataclass(frozen=True)
class Argument:
    """Perturb the one argument of a function, which is the batch's input.

    Args:
        function: From a tensor to a tensor, whose values are differentiated each for itself.
        samples: The samples along the argument's last axis but one that have tangents of their own,
            each along the last axis; ``None`` for one set of tangents of the whole argument.
    """

    function: Callable[[Tensor], Tensor]
    samples: Sequence[int] | None = None

    def __call__(self, batch: Batch, stream: Stream, tangents: Tangents) -> _ArgumentRun:
        x = batch.inputs
        shape = x.shape if self.samples is None else x.shape[-1:]
        tangents.add(NAME, x, shape, samples=self.samples, target=batch.target)
        return _ArgumentRun(self.function, batch)


class _ArgumentRun:
    """One evaluation of the function; there are no parameters to pull back to."""

    per_sample = True
    scale = 1.0
    starts_after = False

    def __init__(self, function: Callable[[Tensor], Tensor], batch: Batch) -> None:
        self.batch = batch
        self._function = function

    def record(self, inject: Inject) -> Evaluation:
        return self.evaluate(self.batch, inject)

    def prepare(self, *, certainly: bool = False) -> None:
        pass

    def evaluate(
        self, part: Batch, inject: Inject, statistics: Statistics = "frozen", *, reuse: bool = False
    ) -> Evaluation:
        with foreign_functions(), sweep(), torch.enable_grad(), ObeyedGradMode():
            x = inject(part.inputs, NAME, slice(None))
            values = self._function(x)
        return Evaluation(values, values)

    def pullback(self, gradients: Mapping[str, Tensor]) -> dict[nn.Parameter, Tensor]:
        return {}
