"""The sweep of activity perturbation: record the layers, push the tangents, pull locally."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multitangent._batch import Part, call_model
from multitangent.dual import DualTensor, PartOfBatch, Recorded, Statistics, add_to, primal
from multitangent.perturbation._pull import LocalPull
from multitangent.perturbation._setting import Setting, split_dual
from multitangent.perturbation._sites import Site, Visitor, observed
from multitangent.tangents import Tangents

Inject = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Injection:
    """One output of a site, before and after the tangents were added."""

    name: str
    before: Tensor
    after: Tensor
    version: int  # of the primal, which a write in place counts up


class ActivationSweep:
    """A batch, pushed through the model with tangents injected at the outputs of sites.

    The whole batch runs once with every layer recorded for its local step. If it fits one
    micro-batch the tangents go along; otherwise they follow in parts, and only primals are computed
    a second time.

    Args:
        setting: The step.
        batch: The whole batch.
        sites: Where tangents are injected.
        per_sample: Whether samples have tangents of their own.
        exact_output: Whether the loss's own derivative is used at the output.
        recompute: Whether layers run again for their local step.
    """

    def __init__(
        self,
        setting: Setting,
        batch: Part,
        sites: Sequence[Site],
        *,
        per_sample: bool,
        exact_output: bool,
        recompute: bool,
    ) -> None:
        self.tangents = Tangents()
        self.setting = setting
        self.batch = batch
        self.sites = sites
        self._per_sample = per_sample
        self._exact_output = exact_output
        self._recompute = recompute
        self._pull = LocalPull(sites, recompute=recompute)
        self._last: _Injection | None = None
        # Where layers run again for their local step, memory is short.
        self.recorded = Recorded(reuse=not recompute)

    def push(self) -> tuple[Tensor, Tensor]:
        if self.batch.size <= self.setting.micro_batch:
            return split_dual(self._record(_inject, keep=False), self.batch.size)
        losses = self.record()
        return losses, self.push_parts()

    def record(self) -> Tensor:
        """Draw the tangents and record the layers without pushing; returns the losses ``[B]``."""
        return self._record(lambda value, block: value, keep=True)

    def push_parts(self) -> Tensor:
        """Directional derivatives ``[K, B]``, in micro-batches, of what was recorded."""
        jvps = []
        for part in self.batch.split(self.setting.micro_batch):
            injector = _Injector(partial(self._inject_rows, part.rows))
            with (
                torch.no_grad(),
                self.setting.part_of_batch(part, "hold", recorded=self.recorded),
            ):
                with observed(self.sites, injector):
                    output = call_model(self.setting.model, part.inputs)
                losses = self.setting.losses(output, part)
            jvps.append(split_dual(losses, part.size)[1])
        return torch.cat(jvps, 1)

    def backpropagate(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        losses = self.record()
        gradients = self._true_gradients(statistics)
        jvps = sum(
            torch.einsum("kbn,bn->kb", block.flatten(2).expand(-1, len(g), -1), g.flatten(1))
            if block.shape[1] > 1
            else block.flatten(1) @ g.flatten(1).mT
            for block, g in zip(self._drawn(), gradients, strict=True)
        )
        assert isinstance(jvps, Tensor)
        return losses, jvps

    def pull(self, coefficients: Tensor) -> None:
        self._pull_locally(self.tangents.combine(coefficients))

    def pull_exact(self, statistics: Statistics) -> Tensor:
        """What infinitely many tangents would give, from backpropagation; returns the losses."""
        losses = self.record()
        gradients = dict(zip(self.tangents.blocks, self._true_gradients(statistics), strict=True))
        self._pull_locally(gradients)
        return losses

    def _pull_locally(self, gradients: dict[str, Tensor]) -> None:
        """From the gradients of the sites' outputs to those of their parameters."""
        if self._exact_output:
            assert self._last is not None
            gradients[self._last.name] = self._gradient_of_output(primal(self._last.before))
        self._pull(
            gradients,
            self.setting.scale(self.batch),
            lambda calls: self.setting.part_of_batch(self.batch, "couple", calls=calls),
        )

    def _record(self, inject: Inject, *, keep: bool) -> Tensor:
        """Run the model, drawing tangents and recording the layer at every site.

        Args:
            inject: What is done with the tangents.
            keep: Whether to keep what a push in parts can use.
        """
        setting, batch = self.setting, self.batch
        with (
            torch.no_grad(),
            setting.part_of_batch(
                batch, "update", recorded=self.recorded if keep else None
            ) as mode,
        ):
            mode.between_sites = True
            with observed(self.sites, _Recorder(self, mode, inject)):
                output = call_model(setting.model, batch.inputs)
            mode.between_sites = False  # a loss may have parameters of its own
            if self._exact_output:
                output = self._without_last_injection(output)
            return setting.losses(output, batch)

    def _inject_rows(self, rows: slice, value: Tensor, name: str) -> Tensor:
        block = self.tangents.blocks.get(name)  # none at the output, if that is exact
        return value if block is None else _inject(value, block.rows(rows))

    def _drawn(self) -> list[Tensor]:
        return [block.rows().to(block.request.dtype) for block in self.tangents.blocks.values()]

    def _draw(self, name: str, value: Tensor) -> Tensor:
        size = self.batch.size
        if value.ndim == 0 or value.shape[0] != size:
            raise ValueError(
                f"`sites` should have outputs whose first axis is the batch, here {size}. "
                f"Found shape {list(value.shape)} at {name!r}. Try `Activations(sites=[...])` with "
                "modules around it, or `perturb='weights'`."
            )
        own = range(size) if self._per_sample else None
        block = self.setting.draw(
            self.tangents, name, primal(value), tuple(value.shape[1:]), own, self.batch.target
        )
        return block.rows()

    def _without_last_injection(self, output: Any) -> Any:
        """The model's output as it was before the last site's tangents were added."""
        last = self._last
        if last is None or output is not last.after or primal(output)._version != last.version:
            raise ValueError(
                "`output='exact'` needs a model whose output is that of its last site. Found "
                "other operations behind it. Try `output='perturbed'`, or `sites=[...]` with a "
                "last site that ends in the model's output."
            )
        del self.tangents.blocks[last.name]
        return last.before

    def _gradient_of_output(self, output: Tensor) -> Tensor:
        """The loss's own derivative with respect to the model's output, ``[B, *shape]``."""
        with torch.enable_grad(), self.setting.part_of_batch(self.batch, "couple"):
            output = output.detach().requires_grad_()
            return torch.autograd.grad(self.setting.losses(output, self.batch).sum(), output)[0]

    def _true_gradients(self, statistics: Statistics) -> list[Tensor]:
        """The gradients with respect to all perturbed values, by backpropagation."""
        offsets: list[Tensor] = []

        def watch(value: Tensor, name: str) -> Tensor:
            """Adds a zero, whose gradient is the activation gradient."""
            offsets.append(torch.zeros_like(value, requires_grad=True))
            return value + offsets[-1]

        with (
            torch.enable_grad(),
            self.setting.part_of_batch(
                self.batch, statistics, recorded=self.recorded.to_differentiate()
            ),
            observed(self.sites, _Injector(watch)),
        ):
            output = call_model(self.setting.model, self.batch.inputs)
            total = self.setting.losses(output, self.batch).sum()
        watched = offsets[:-1] if self._exact_output else offsets
        gradients = torch.autograd.grad(total, watched, allow_unused=True)
        return [
            torch.zeros_like(w) if g is None else g for w, g in zip(watched, gradients, strict=True)
        ]


def _inject(value: Tensor, block: Tensor) -> Tensor:
    """The value with the block's tangents added to those that reached it."""
    if isinstance(value, DualTensor):
        return DualTensor(value.primal, add_to(value, block))
    return DualTensor(value, block)


class _Recorder(Visitor):
    """Draws and injects tangents at every site, and records the layer for its local step."""

    def __init__(self, sweep: ActivationSweep, mode: PartOfBatch, inject: Inject) -> None:
        super().__init__()
        self._sweep = sweep
        self._mode = mode
        self._inject = inject

    def enter(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().enter(site, args, kwargs)
        self._mode.between_sites = False
        self._sweep._pull.enter(site, args, kwargs, self._mode.calls)

    def leave(self, site: Site, output: Any) -> Any:
        if not self._ends(site):
            return output
        self._mode.between_sites = True
        sweep = self._sweep

        def replace(value: Tensor, name: str) -> Tensor:
            sweep._pull.leave(name, primal(value))
            detached = value.detached() if isinstance(value, DualTensor) else value.detach()
            injected = self._inject(detached, sweep._draw(name, detached))
            sweep._last = _Injection(name, detached, injected, primal(injected)._version)
            return injected

        sweep._pull.close()
        return self._replaced(site, output, replace)


class _Injector(Visitor):
    """Does something to every output of every site."""

    def __init__(self, inject: Callable[[Tensor, str], Tensor]) -> None:
        super().__init__()
        self._inject = inject

    def leave(self, site: Site, output: Any) -> Any:
        return self._replaced(site, output, self._inject) if self._ends(site) else output
