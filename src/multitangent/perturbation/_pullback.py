"""The local step: from the gradients of a layer's output to those of its own parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from multitangent._structures import map_tensors, tensors_of
from multitangent.dual import primal
from multitangent.objective import SavedState
from multitangent.perturbation._sites import Site

_END = "behind the last site"  # which is no name of a module


@dataclass
class _Visit:
    """One run of a site's modules. A second run needs all but the site and its outputs."""

    site: Site
    inputs: Any = None  # what the modules were called with
    versions: Sequence[int] = ()  # of the input tensors, to notice a write into them
    calls: int = 0  # dropout calls before this run
    random_state: Tensor | None = None  # of other random functions
    before: SavedState | None = None  # what the modules kept before this run
    casts: Sequence[torch.autocast] = ()  # the types of mixed precision in this run
    outputs: dict[str, Tensor] = field(default_factory=dict)


class LocalPullback:
    """Records every layer as it runs, and later turns output gradients into parameter gradients.

    The output of every layer is detached, so that no graph is longer than a layer and what leads
    to it from the layer before, where parameters may be used too. What follows the last layer,
    such as a loss with parameters, is a layer whose output are the losses. With ``recompute`` the
    graphs of layers are not kept; the layers run again.
    """

    def __init__(self, parameters: list[nn.Parameter], *, recompute: bool) -> None:
        self._parameters = parameters
        self.recompute = recompute
        self._visits: list[_Visit] = []
        self._losses: Tensor | None = None
        self._of_ending: dict[nn.Parameter, Tensor] = {}

    def restart(self) -> None:
        """Forget what was recorded."""
        self._losses = None
        self._of_ending.clear()
        self._visits.clear()

    def enter(self, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any], calls: int) -> None:
        """A layer begins."""
        if not self.recompute:
            self._visits.append(_Visit(site))
            return
        _refuse_stand_ins(site)
        inputs = map_tensors(primal, (args, kwargs))
        tensors = tensors_of(inputs)
        with torch._C.DisableTorchFunction():  # nothing here concerns the model's functions
            before = SavedState(site.modules)
        self._visits.append(
            _Visit(
                site,
                inputs,
                [t._version for t in tensors],
                calls,
                torch.get_rng_state(),
                before,
                [_autocast(t) for t in tensors[:1]],
            )
        )

    def leave(self, name: str, output: Tensor) -> None:
        """One output of the layer, with the name of its block of tangents."""
        self._visits[-1].outputs[name] = output

    def end(self, losses: Tensor, watched: Tensor | None = None) -> None:
        """The losses of the samples, at the end.

        Args:
            losses: The losses ``[b]``.
            watched: What is no parameter, though their graph may begin with it.
        """
        if losses.requires_grad:
            self._losses = losses
            found = {id(p): p for p in [*self._parameters, *leaves(losses)] if p is not watched}
            self._parameters = list(found.values())

    def differentiate_ending(
        self, value: Tensor, gradients: dict[str, Tensor], scale: float
    ) -> Tensor:
        """The gradient of each sample's loss by a value, whose shape it has.

        The parameters of what follows get their gradients in the same pass, for the pullback. The
        graph of what follows is released.

        Args:
            value: A leaf, with which the graph of the last layer or of the losses begins.
            gradients: Of the last layer's output by name, if its graph ends there.
            scale: As in the pullback.
        """
        ends = {} if self._losses is None else {_END: self._losses}
        gradients = gradients | {name: torch.ones_like(losses) for name, losses in ends.items()}
        for visit in self._visits:
            for name in gradients.keys() & visit.outputs.keys():
                ends[name] = visit.outputs[name]
                visit.outputs[name] = ends[name].detach()
        self._losses = None
        found = _pulled_back(ends, [value, *self._parameters], gradients, scale, keep=True)
        gradient = found.pop(value, None)
        self._of_ending = found
        return torch.zeros_like(value) if gradient is None else gradient.div_(scale)

    def __call__(
        self,
        gradients: dict[str, Tensor],
        scale: float,
        surroundings: Callable[[int], AbstractContextManager[Any]],
    ) -> dict[nn.Parameter, Tensor]:
        """The gradients of the layers' parameters.

        Args:
            gradients: Of the layers' outputs, by name, ``[b, *shape]``.
            scale: The weight of one sample's loss in the loss of the batch.
            surroundings: Makes the context in which a layer runs again.
        """
        ends = {} if self._losses is None else {_END: self._losses}
        gradients = gradients | {name: torch.ones_like(losses) for name, losses in ends.items()}
        if not self.recompute:
            outputs = {name: out for visit in self._visits for name, out in visit.outputs.items()}
            part = _pulled_back(outputs | ends, self._parameters, gradients, scale)
            return _added(self._of_ending, part)
        total = _pulled_back(ends, self._parameters, gradients, scale, keep=True) if ends else {}
        total = _added(self._of_ending, total)
        for visit in self._visits:
            if not visit.outputs.keys() & gradients.keys():
                continue
            with _rewound(visit):
                with torch.enable_grad(), surroundings(visit.calls):
                    outputs = _run_again(visit)
                part = _pulled_back(outputs, self._parameters, gradients, scale, keep=True)
            total = _added(total, part)
        return total


def _added(
    total: dict[nn.Parameter, Tensor], part: dict[nn.Parameter, Tensor]
) -> dict[nn.Parameter, Tensor]:
    """Gradients, with others added to them."""
    for parameter, gradient in part.items():
        subtotal = total.get(parameter)
        total[parameter] = gradient if subtotal is None else subtotal.add_(gradient)
    return total


def _pulled_back(
    outputs: dict[str, Tensor],
    parameters: Sequence[Any],
    gradients: dict[str, Tensor],
    scale: float,
    *,
    keep: bool = False,
) -> dict[Any, Tensor]:
    names = [n for n, output in outputs.items() if output.requires_grad and n in gradients]
    with without_hooks(parameters):
        try:
            derivatives = torch.autograd.grad(
                [outputs[name] for name in names],
                parameters,
                [gradients[name] * scale for name in names],
                allow_unused=True,
                retain_graph=keep,
            )
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise RuntimeError(_WRITTEN) from error
    result = {}
    memory = set()  # autograd may hand out one tensor for several parameters, or an expanded one
    for parameter, gradient in zip(parameters, derivatives, strict=True):
        if gradient is None:
            continue
        if gradient.is_sparse:  # of an embedding: its own already
            result[parameter] = gradient
            continue
        if not gradient.is_contiguous() or gradient.data_ptr() in memory:
            gradient = gradient.clone(memory_format=torch.contiguous_format)
        memory.add(gradient.data_ptr())
        result[parameter] = gradient
    return result


_WRITTEN = (
    "A model should not write in place into what the gradients of its layers need, also where it "
    "runs more than once for a step. Found a tensor that was changed after its use, such as a "
    "counter with `+=`. Try `x = x + 1` in place of `x += 1`, or `micro_batch` as large as the "
    "batch."
)


@contextmanager
def without_hooks(parameters: Sequence[Tensor]) -> Iterator[None]:
    """The hooks of parameters are for whole gradients: whoever accumulates those calls them."""
    hooks = [(p._backward_hooks, dict(p._backward_hooks)) for p in parameters if p._backward_hooks]
    try:
        for registered, _ in hooks:
            registered.clear()
        yield
    finally:
        for registered, before in hooks:
            registered.update(before)


def _refuse_stand_ins(site: Site) -> None:
    """Raise where something else than a parameter is in its place, which is gone afterwards."""
    for module in (inner for outer in site.modules for inner in outer.modules()):
        for name, value in module._parameters.items():
            if value is not None and not isinstance(value, nn.Parameter):
                raise ValueError(
                    "`recompute=True` needs layers that run again with the parameters that they "
                    f"have. Found another tensor in the place of {name!r} in {site.name!r}, as by "
                    "torch.func.functional_call. Try `recompute=False`, or `perturb='weights'`."
                )


def _run_again(visit: _Visit) -> dict[str, Tensor]:
    if [t._version for t in tensors_of(visit.inputs)] != visit.versions:
        raise RuntimeError(
            "`recompute=True` needs inputs of layers that stay as they are. Found the input of "
            f"{visit.site.name!r} changed in place after the layer ran. Try `recompute=False`."
        )
    assert visit.random_state is not None
    torch.set_rng_state(visit.random_state)
    args, kwargs = visit.inputs
    first, *others = visit.site.modules
    # Behind the hooks of all modules, which have changed these inputs already.
    with first.register_forward_pre_hook(
        lambda module, *_: (args, kwargs), prepend=True, with_kwargs=True
    ):
        output = first(*args, **kwargs)
    for module in others:
        output = module(output)
    tensors = [t for t in tensors_of(output) if t.is_floating_point()]
    return dict(zip(visit.outputs, tensors, strict=True))


def leaves(value: Tensor) -> Iterator[Any]:
    """The tensors at the ends of a value's graph: parameters as a rule."""
    remaining: list[Any] = [value.grad_fn]
    seen: set[Any] = set()
    while remaining:
        node = remaining.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            yield leaf
        remaining += [following for following, _ in node.next_functions]


@contextmanager
def _rewound(visit: _Visit) -> Iterator[None]:
    """What a layer keeps, and the types of mixed precision, as they were when it ran."""
    with ExitStack() as stack:
        for cast in visit.casts:
            stack.enter_context(cast)
        assert visit.before is not None
        now = SavedState(visit.site.modules)
        visit.before.restore()
        try:
            yield
        finally:
            now.restore()


def _autocast(tensor: Tensor) -> torch.autocast:
    """The mixed precision that is on now, for a tensor's device."""
    kind = tensor.device.type
    is_on, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, is_on, cache_enabled=False)
