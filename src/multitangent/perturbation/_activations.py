"""Activity perturbation: the tangents are directions in the space of the layers' outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from multitangent._batch import Part, call_model
from multitangent.dual import DualTensor, add, primal
from multitangent.dual import tangents as tangents_of
from multitangent.perturbation._pull import LocalPull
from multitangent.perturbation._setting import Setting, Sweep, split_dual
from multitangent.perturbation._sites import Site, Visitor, find_sites, observed
from multitangent.tangents import Tangents


@dataclass(frozen=True)
class Activations:
    """Perturb the outputs of layers; n is their total size for one sample.

    The directional derivatives are those of each sample's loss, ``[K, B]``. They give a gradient
    of each sample's activations, from which the gradients of a layer's own parameters follow
    inside that layer (Section IV). The first axis of every site's output must be the batch: one of
    another meaning, such as time, goes unnoticed where it has the same size.

    Args:
        sites: The names of the modules whose outputs are perturbed. By default, for an
            ``nn.Sequential`` each child with trainable parameters together with the parameter-free
            ones after it, otherwise every leaf module with trainable parameters (and
            ``nn.MultiheadAttention`` as a whole).
        share: ``"batch"`` gives all samples the same tangents, as the paper does and at the least
            cost, ``"sample"`` each its own.
        output: ``"perturbed"`` perturbs the model's output as any other site, ``"exact"`` takes
            the loss's own derivative there; the last site must then end in the model's output.
        recompute: Run a layer again for its local step, instead of keeping its local graph.

    Raises:
        ValueError: If an option is unknown; when bound to a model, if a site is unknown, sites lie
            inside one another or a trainable parameter lies outside all of them.

    Examples:
        >>> Activations(share="sample")
        Activations(sites=None, share='sample', output='perturbed', recompute=False)
    """

    sites: Sequence[str] | None = None
    share: Literal["batch", "sample"] = "batch"
    output: Literal["perturbed", "exact"] = "perturbed"
    recompute: bool = False

    def __post_init__(self) -> None:
        for name, known in (("share", ("batch", "sample")), ("output", ("perturbed", "exact"))):
            if (found := getattr(self, name)) not in known:
                raise ValueError(f"`{name}` should be one of {known}. Found {found!r}.")

    def bind(self, model: nn.Module) -> Callable[[Setting, list[Part]], Iterator[Sweep]]:
        sites = find_sites(model, self.sites)

        def sweeps(setting: Setting, parts: list[Part]) -> Iterator[Sweep]:
            for part in parts:
                yield ActivationSweep(self, setting, part, sites)

        return sweeps


@dataclass(frozen=True)
class _Injection:
    """One output of a site, before and after the tangents were added."""

    name: str
    before: Tensor
    after: Tensor
    version: int  # of the primal, which a write in place counts up


class ActivationSweep:
    """One part of the batch, pushed through the model with tangents injected at every site."""

    def __init__(
        self, options: Activations, setting: Setting, part: Part, sites: Sequence[Site]
    ) -> None:
        self.tangents = Tangents()
        self._options = options
        self.setting = setting
        self.part = part
        self.sites = sites
        self._pull = LocalPull(sites, recompute=options.recompute)
        self._last: _Injection | None = None

    def push(self) -> tuple[Tensor, Tensor]:
        losses = self._sweep(self._inject)
        return split_dual(losses, self.part.size)

    def record(self) -> Tensor:
        """Draw the tangents and record the layers without pushing; returns the losses ``[b]``."""
        return self._sweep(lambda value, block: value)

    def backpropagate(self) -> tuple[Tensor, Tensor]:
        losses = self.record()
        gradients = self._true_gradients()
        jvps = sum(
            torch.einsum("kbn,bn->kb", block.flatten(2).expand(-1, len(g), -1), g.flatten(1))
            if block.shape[1] > 1
            else block.flatten(1) @ g.flatten(1).mT
            for block, g in zip(self.tangents.blocks.values(), gradients, strict=True)
        )
        assert isinstance(jvps, Tensor)
        return losses, jvps

    def pull(self, coefficients: Tensor) -> None:
        gradients = self.tangents.combine(coefficients)
        if self._options.output == "exact":
            assert self._last is not None
            gradients[self._last.name] = self._gradient_of_output(primal(self._last.before))
        self._pull(
            gradients,
            self.setting.scale(self.part),
            lambda calls: self.setting.part_of_batch(self.part, calls),
        )

    def _sweep(self, inject: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Run the model, drawing tangents and recording the layer at every site."""
        observer = _Observer(self, inject)
        with torch.no_grad(), self.setting.part_of_batch(self.part) as observer.mode:
            observer.mode.between_sites = True
            with observed(self.sites, observer):
                output = call_model(self.setting.model, self.part.inputs)
            observer.mode.between_sites = False  # a loss may have parameters of its own
            if self._options.output == "exact":
                output = self._without_last_injection(output)
            return self.setting.losses(output, self.part)

    def _inject(self, value: Tensor, block: Tensor) -> Tensor:
        """The value with the block's tangents added to those that reached it."""
        return DualTensor(primal(value), add(tangents_of(value), block))

    def _draw(self, name: str, value: Tensor) -> Tensor:
        part = self.part
        if value.ndim == 0 or value.shape[0] != part.size:
            raise ValueError(
                f"`sites` should have outputs whose first axis is the batch, here {part.size}. "
                f"Found shape {list(value.shape)} at {name!r}. Try `Activations(sites=[...])` with "
                "modules around it, or `perturb='weights'`."
            )
        samples = range(part.rows.start, part.rows.stop)
        own = samples if self._options.share == "sample" else None
        return self.setting.draw(
            self.tangents, name, primal(value), tuple(value.shape[1:]), own, part.target
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

    def _gradient_of_output(self, output: Tensor) -> Tensor:
        """The loss's own derivative with respect to the model's output, ``[b, *shape]``."""
        with torch.enable_grad(), self.setting.part_of_batch(self.part):
            output = output.detach().requires_grad_()
            return torch.autograd.grad(self.setting.losses(output, self.part).sum(), output)[0]

    def _true_gradients(self) -> list[Tensor]:
        """The gradients with respect to all perturbed values, by backpropagation."""
        watch = _Watch()
        with (
            torch.enable_grad(),
            self.setting.part_of_batch(self.part),
            observed(self.sites, watch),
        ):
            output = call_model(self.setting.model, self.part.inputs)
            total = self.setting.losses(output, self.part).sum()
        watched = watch.offsets
        if self._options.output == "exact":
            watched = watched[:-1]
        gradients = torch.autograd.grad(total, watched, allow_unused=True)
        return [
            torch.zeros_like(w) if g is None else g for w, g in zip(watched, gradients, strict=True)
        ]


class _Observer(Visitor):
    """Draws and injects tangents at every site, and records the layer for its local step."""

    def __init__(self, sweep: ActivationSweep, inject: Callable[[Tensor, Tensor], Tensor]) -> None:
        self._sweep = sweep
        super().__init__()
        self._inject = inject
        self.mode: Any = None

    def enter(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().enter(site, args, kwargs)
        self.mode.between_sites = False
        self._sweep._pull.enter(site, args, kwargs, self.mode.calls)

    def leave(self, site: Site, output: Any) -> Any:
        if not self._ends(site):
            return output
        self.mode.between_sites = True
        sweep = self._sweep

        def replace(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                return value
            name = sweep._pull.leave(site, primal(value))
            detached = primal(value).detach()
            if isinstance(value, DualTensor):
                detached = DualTensor(detached, value.tangents)
            injected = self._inject(detached, sweep._draw(name, detached))
            sweep._last = _Injection(name, detached, injected, primal(injected)._version)
            return injected

        sweep._pull.close()
        with torch._C.DisableTorchFunction():  # nothing here concerns the model's functions
            return pytree.tree_map(replace, output)


class _Watch(Visitor):
    """Adds a zero to the output of every site, whose gradient is the activation gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets: list[Tensor] = []

    def leave(self, site: Site, output: Any) -> Any:
        if not self._ends(site):
            return output

        def replace(value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                return value
            self.offsets.append(torch.zeros_like(value, requires_grad=True))
            return value + self.offsets[-1]

        return pytree.tree_map(replace, output)
