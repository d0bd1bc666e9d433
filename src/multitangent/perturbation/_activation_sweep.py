"""The sweep of activity perturbation: record the layers, push the tangents, pull locally."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from multitangent._batch import Part, call_model
from multitangent.dual import (
    DualTensor,
    PartOfBatch,
    Recorded,
    Statistics,
    add_to,
    primal,
    tangents,
    with_rows,
)
from multitangent.perturbation._pull import LocalPull
from multitangent.perturbation._setting import Setting
from multitangent.perturbation._sites import Site, Visitor, observed
from multitangent.tangents import Block, Tangents

Inject = Callable[[Tensor, Block], Tensor]


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
        # Asked once: a source may want the output of its first step only.
        self._sees_output = setting.source.sees_output
        self._pull = LocalPull(sites, recompute=recompute)
        self.output_tangents: Tensor | None = None
        self._last: _Injection | None = None
        self._output: Tensor | None = None  # the model's, where it is asked for
        self._output_gradient: Tensor | None = None
        # Where layers run again for their local step, memory is short.
        self.recorded = Recorded(reuse=not recompute)

    def push(self) -> tuple[Tensor, Tensor]:
        if self.batch.size <= self.setting.micro_batch and not self._sees_output:
            return self.setting.split(self._record(_inject, keep=False), self.batch)
        losses = self.record()
        return losses, self.push_parts()

    def record(self) -> Tensor:
        """Record the layers without pushing; returns the losses ``[B]``."""
        losses = self._record(lambda value, block: value, keep=True)
        if self._sees_output:
            gradient = self._gradient_of_output()
            assert self._output is not None
            for block in self.tangents.blocks.values():
                block.tell(self._output.detach(), gradient)
        return losses

    def push_parts(self) -> Tensor:
        """Directional derivatives ``[K, B]``, in micro-batches, of what was recorded."""
        jvps, outputs = [], []
        for part in self.batch.split(self.setting.micro_batch):
            injector = _Injector(partial(self._inject_rows, part.rows))
            with (
                torch.no_grad(),
                self.setting.part_of_batch(part, "hold", recorded=self.recorded),
            ):
                with observed(self.sites, injector):
                    output = call_model(self.setting.model, part.inputs)
                losses = self.setting.losses(output, part)
            jvps.append(self.setting.split(losses, part)[1])
            if self._sees_output:
                outputs.append(self._tangents_of_output(output))
        self.output_tangents = torch.cat(outputs, 1) if outputs else None
        return torch.cat(jvps, 1)

    def backpropagate(self, statistics: Statistics) -> tuple[Tensor, Tensor]:
        losses = self.record()
        jvps = self._along_tangents(self._true_gradients(statistics))
        if self._sees_output:
            assert self._output is not None
            along = [
                self._along_tangents(self._true_gradients(statistics, element))
                for element in range(self._output[0].numel())
            ]
            self.output_tangents = torch.stack(along, 2).reshape(
                *along[0].shape, *self._output.shape[1:]
            )
        return losses, jvps

    def _along_tangents(self, gradients: list[Tensor]) -> Tensor:
        """Directional derivatives ``[K, B]`` from gradients of all perturbed values."""
        along = sum(
            torch.einsum("kbn,bn->kb", block.flatten(2).expand(-1, len(g), -1), g.flatten(1))
            if block.shape[1] > 1
            else block.flatten(1) @ g.flatten(1).mT
            for block, g in zip(self._drawn(), gradients, strict=True)
        )
        assert isinstance(along, Tensor)
        return along

    def pull(self, coefficients: Tensor) -> dict[str, Tensor]:
        gradients = self.tangents.combine(coefficients)
        self._pull_locally(dict(gradients))
        return gradients

    def pull_exact(self, statistics: Statistics) -> Tensor:
        """What infinitely many tangents would give, from backpropagation; returns the losses."""
        losses = self.record()
        self._pull_locally(self._true_by_name(statistics))
        return losses

    def true_gradients(self, statistics: Statistics) -> dict[str, Tensor]:
        self.record()
        return self._true_by_name(statistics)

    def _true_by_name(self, statistics: Statistics) -> dict[str, Tensor]:
        return dict(zip(self.tangents.blocks, self._true_gradients(statistics), strict=True))

    def _pull_locally(self, gradients: dict[str, Tensor]) -> None:
        """From the gradients of the sites' outputs to those of their parameters."""
        if self._exact_output:
            assert self._last is not None
            gradients[self._last.name] = self._gradient_of_output()
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
            if self._exact_output or self._sees_output:
                self._output = _one_tensor(primal(output), setting)
            return setting.losses(output, batch)

    def _inject_rows(self, rows: slice, value: Tensor, name: str) -> Tensor:
        block = self.tangents.blocks.get(name)  # none at the output, if that is exact
        return value if block is None else _inject(value, block, rows)

    def _drawn(self) -> list[Tensor]:
        return [
            with_rows(block.rows(), block.count).to(block.request.dtype)
            for block in self.tangents.blocks.values()
        ]

    def _draw(self, name: str, value: Tensor) -> Block:
        size = self.batch.size
        if value.ndim == 0 or value.shape[0] != size:
            raise ValueError(
                f"`sites` should have outputs whose first axis is the batch, here {size}. "
                f"Found shape {list(value.shape)} at {name!r}. Try `Activations(sites=[...])` with "
                "modules around it, or `perturb='weights'`."
            )
        own = range(size) if self._per_sample else None
        return self.setting.draw(
            self.tangents, name, primal(value), tuple(value.shape[1:]), own, self.batch.target
        )

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

    def _gradient_of_output(self) -> Tensor:
        """The loss's own derivative with respect to the model's output, ``[B, *shape]``."""
        if self._output_gradient is None:
            assert self._output is not None
            with torch.enable_grad(), self.setting.part_of_batch(self.batch, "couple"):
                output = self._output.detach().requires_grad_()
                total = self.setting.losses(output, self.batch).sum()
                self._output_gradient = torch.autograd.grad(total, output)[0]
        return self._output_gradient

    def _tangents_of_output(self, output: Any) -> Tensor:
        """The derivatives of a part's output along V, ``[K, b, *shape]``."""
        value = primal(output)
        rows = tangents(output)
        if rows is None:
            return value.new_zeros(self.setting.source.num_tangents, *value.shape)
        return with_rows(rows, self.setting.source.num_tangents).expand(-1, *value.shape)

    def _true_gradients(self, statistics: Statistics, element: int | None = None) -> list[Tensor]:
        """The gradients with respect to all perturbed values, by backpropagation.

        Args:
            statistics: What batch normalisation does.
            element: Of the model's output, whose gradient is wanted in place of the loss's.
        """
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
            if element is None:
                total = self.setting.losses(output, self.batch).sum()
            else:
                total = output.flatten(1)[:, element].sum()
        watched = offsets[:-1] if self._exact_output else offsets
        gradients = torch.autograd.grad(total, watched, allow_unused=True)
        return [
            torch.zeros_like(w) if g is None else g for w, g in zip(watched, gradients, strict=True)
        ]


def _inject(value: Tensor, block: Block, samples: slice | None = None) -> Tensor:
    """The value with the block's tangents added to those that reached it."""
    rows = block.rows(samples)
    if isinstance(value, DualTensor):
        return DualTensor(value.primal, add_to(value, rows))
    return DualTensor(value, rows)


def _one_tensor(output: Any, setting: Setting) -> Tensor:
    if not isinstance(output, Tensor):
        raise ValueError(
            f"`tangents` that see the model's output, here {setting.source!r}, need a model that "
            f"returns one tensor. Found {type(output).__name__}. Try a module around the model "
            "that returns the tensor the loss is computed from."
        )
    return output


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
