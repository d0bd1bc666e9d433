"""The same step as `ForwardGradient`, written with what PyTorch offers.

Tangents, aggregation and the local step are shared; only the directional derivatives are computed
in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from multitangent._batch import call_model
from multitangent._estimator import GradientEstimator
from multitangent.perturbation import ActivationSweep, Site, Sweep, Visitor, observed

forward_ad: Any = _forward_ad  # which has no types


class PythonLoop(GradientEstimator):
    """One forward pass over `torch.autograd.forward_ad` dual numbers for each tangent."""

    def _differentiate(self, sweep: Sweep) -> tuple[Tensor, Tensor]:
        assert isinstance(sweep, ActivationSweep)
        losses = sweep.record()
        blocks = [block.rows() for block in sweep.tangents.blocks.values()]
        rows = []
        for k in range(len(blocks[0])):
            with torch.no_grad(), forward_ad.dual_level(), _frozen(sweep):

                def inject(value: Tensor, site: int, k: int = k) -> Tensor:
                    primal, tangent = forward_ad.unpack_dual(value)
                    block = blocks[site][k].expand_as(primal)
                    return forward_ad.make_dual(
                        primal, block if tangent is None else tangent + block
                    )

                rows.append(forward_ad.unpack_dual(_run(sweep, inject)).tangent)
        return losses, torch.stack(rows)


class VmapJvp(GradientEstimator):
    """``torch.func.vmap(torch.func.jvp(model))`` over the K tangents."""

    def _differentiate(self, sweep: Sweep) -> tuple[Tensor, Tensor]:
        assert isinstance(sweep, ActivationSweep)
        losses = sweep.record()
        blocks = tuple(block.rows() for block in sweep.tangents.blocks.values())
        origin = tuple(torch.zeros_like(block[0]) for block in blocks)

        def perturbed(*offsets: Tensor) -> Tensor:
            return _run(sweep, lambda value, site: value + offsets[site])

        def along(*tangents: Tensor) -> Tensor:
            return torch.func.jvp(perturbed, origin, tangents)[1]

        with torch.no_grad(), _frozen(sweep):
            return losses, torch.func.vmap(along)(*blocks)


def _run(sweep: ActivationSweep, inject: Callable[[Tensor, int], Tensor]) -> Tensor:
    """The losses of a forward pass with something done at every site."""
    with observed(sweep.sites, _Injector(inject)):
        output = call_model(sweep.setting.model, sweep.batch.inputs)
    return sweep.setting.losses(output, sweep.batch)


@contextmanager
def _frozen(sweep: ActivationSweep) -> Iterator[None]:
    """Batch normalisation with the statistics of the recorded batch, which it does not count."""
    counting: list[Any] = [
        module
        for module in sweep.setting.model.modules()
        if getattr(module, "num_batches_tracked", None) is not None
    ]
    counts = [module.num_batches_tracked for module in counting]
    for module in counting:
        module.num_batches_tracked = None
    try:
        # Fused attention has no forward derivative.
        recorded = sweep.recorded.to_differentiate()
        held = sweep.setting.part_of_batch(sweep.batch, "hold", recorded=recorded)
        with held, sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module, count in zip(counting, counts, strict=True):
            module.num_batches_tracked = count


class _Injector(Visitor):
    def __init__(self, inject: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self._inject = inject
        self._count = 0

    def leave(self, site: Site, output: Any) -> Any:
        if not self._ends(site):
            return output
        self._count += 1
        return self._inject(output, self._count - 1)
