"""The same step as `ForwardGradient`, written with what PyTorch offers.

Tangents, aggregation and the local step are shared; only the directional derivatives are computed
in another way.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad as _forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from multitangent.engine import Derivatives, Engine, Trial
from multitangent.gradient import GradientEstimator
from multitangent.perturbation import Run
from multitangent.tangents import Tangents

forward_ad: Any = _forward_ad  # which has no types


class _Baseline:
    """An engine that knows the model, whose batch normalisation must not count what it sees."""

    statistics: Literal["frozen"] = "frozen"

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        counting: list[Any] = [
            module
            for module in self._model.modules()
            if getattr(module, "num_batches_tracked", None) is not None
        ]
        counts = [module.num_batches_tracked for module in counting]
        for module in counting:
            module.num_batches_tracked = None
        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no forward derivative
                yield
        finally:
            for module, count in zip(counting, counts, strict=True):
                module.num_batches_tracked = count


class _LoopEngine(_Baseline):
    """One forward pass over `torch.autograd.forward_ad` dual numbers for each tangent."""

    @torch.no_grad()
    def __call__(self, run: Run, tangents: Tangents) -> Derivatives:
        losses = run.prepare()
        assert losses is not None
        rows = []
        for k in range(tangents.num_tangents):
            with forward_ad.dual_level(), self._uncounted():

                def inject(value: Tensor, name: str, samples: slice, k: int = k) -> Tensor:
                    primal, tangent = forward_ad.unpack_dual(value)
                    row = tangents.blocks[name].rows()[k].expand_as(primal)
                    return forward_ad.make_dual(primal, row if tangent is None else tangent + row)

                dual_losses = run.evaluate(run.batch, inject).losses
                rows.append(forward_ad.unpack_dual(dual_losses).tangent)
        return Derivatives(losses, torch.stack(rows))


class _VmapEngine(_Baseline):
    """``torch.func.vmap(torch.func.jvp(model))`` over the K tangents."""

    @torch.no_grad()
    def __call__(self, run: Run, tangents: Tangents) -> Derivatives:
        losses = run.prepare()
        assert losses is not None
        rows = {name: block.rows() for name, block in tangents.blocks.items()}
        origin = {name: torch.zeros_like(block[0]) for name, block in rows.items()}

        def perturbed(offsets: dict[str, Tensor]) -> Tensor:
            def inject(value: Tensor, name: str, samples: slice) -> Tensor:
                return value + offsets[name]

            return run.evaluate(run.batch, inject).losses

        def along(row: dict[str, Tensor]) -> Tensor:
            return torch.func.jvp(perturbed, (origin,), (row,))[1]

        with self._uncounted():
            return Derivatives(losses, torch.func.vmap(along)(rows))


class PythonLoop(GradientEstimator):
    """A forward gradient by a loop over dual numbers."""

    def _engine(self, trial: Trial) -> Engine:
        return _LoopEngine(self.model)


class VmapJvp(GradientEstimator):
    """A forward gradient by `torch.func`."""

    def _engine(self, trial: Trial) -> Engine:
        return _VmapEngine(self.model)
