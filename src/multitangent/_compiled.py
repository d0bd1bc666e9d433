"""The whole step as one compiled function, tested against the step it replaces."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module
from torch.utils import _pytree as pytree

from multitangent._batch import Part
from multitangent._coefficients import Combination
from multitangent._conditions import assumed
from multitangent.perturbation import Setting, accumulate
from multitangent.tangents import Block, Request, Stream, TangentSource

if TYPE_CHECKING:
    from multitangent._estimator import GradientEstimator


class Step(NamedTuple):
    """What one step yields besides gradients."""

    losses: Tensor
    combined: Combination
    gram: Tensor


class CompiledStep:
    """Steps on batches of one shape, by a graph of plain operations that was traced once.

    Tangents are drawn outside of the graph, and stored. What a step checks on the way, such as
    that all values are finite, is assumed by the graph and reported by it; where it does not hold
    the step is done again without the graph. What the model keeps outside of its parameters and
    buffers, such as a number in an attribute, is part of the graph.

    Args:
        estimator: Whose step it is.
        setting: A step as an example.
        batch: A batch as an example.
    """

    def __init__(self, estimator: GradientEstimator, setting: Setting, batch: Part) -> None:
        self._estimator = estimator
        self._parameters = dict(estimator.model.named_parameters())
        self._buffers = dict(estimator.model.named_buffers())
        self._leaves, self._structure = pytree.tree_flatten((batch.inputs, batch.target))
        self._varying = [isinstance(leaf, Tensor) for leaf in self._leaves]
        self._correction = setting.correction
        self._requests = self._find_requests(setting, batch)
        example = self._arguments(setting, batch)
        graph = make_fx(lambda *args: self._flat_step(setting, batch, args))(*_copies(example))
        self._run: Callable[..., Any] = torch.compile(graph, dynamic=False)

    def __call__(self, setting: Setting, batch: Part) -> Step | None:
        """One step, ``None`` if an assumption did not hold: then nothing has changed."""
        if setting.correction != self._correction:
            return None
        kept = {name: buffer.clone() for name, buffer in self._buffers.items()}
        holds, losses, gram, jvps, mixed_gram, coefficients, *gradients = self._run(
            *self._arguments(setting, batch)
        )
        if not bool(holds):
            with torch.no_grad():
                for name, buffer in self._buffers.items():
                    buffer.copy_(kept[name])
            return None
        trainable = [p for p in self._parameters.values() if p.requires_grad]
        for parameter, gradient in zip(trainable, gradients, strict=True):
            accumulate(parameter, gradient)
        return Step(losses, Combination(coefficients, mixed_gram, jvps), gram)

    def _arguments(self, setting: Setting, batch: Part) -> list[Tensor]:
        leaves = pytree.tree_leaves((batch.inputs, batch.target))
        blocks = [
            Block(setting.source, replace(request, stream=setting.stream), store=True).rows()
            for request in self._requests
        ]
        values = [leaf for leaf, varies in zip(leaves, self._varying, strict=True) if varies]
        parameters = [parameter.detach() for parameter in self._parameters.values()]
        return [*parameters, *self._buffers.values(), *values, *blocks]

    def _find_requests(self, setting: Setting, batch: Part) -> list[Request]:
        """What tangents are asked for, from a run that changes nothing."""
        noted = _Noted(setting.source)
        copies = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in (self._parameters | self._buffers).items()
        }
        with _reparametrize_module(self._estimator.model, copies):
            bound = self._estimator.perturb.bind(self._estimator.model)
            self._estimator._differentiate(bound(replace(setting, source=noted), batch))
        return noted.requests

    def _flat_step(self, setting: Setting, batch: Part, args: Sequence[Tensor]) -> list[Tensor]:
        """A step as a function of tensors, from tensors to tensors."""
        remaining = iter(args)
        stand_ins: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            stand_ins[name] = next(remaining).detach().requires_grad_(parameter.requires_grad)
        for name in self._buffers:
            stand_ins[name] = next(remaining)
        leaves = [
            next(remaining) if varies else leaf
            for leaf, varies in zip(self._leaves, self._varying, strict=True)
        ]
        inputs, target = pytree.tree_unflatten(leaves, self._structure)
        given = replace(setting, source=_Given(setting.source, list(remaining)))
        estimator = self._estimator
        with assumed() as conditions, _reparametrize_module(estimator.model, stand_ins):
            bound = estimator.perturb.bind(estimator.model)  # to what stands in for parameters
            sweep = bound(given, replace(batch, inputs=inputs, target=target))
            losses, jvps = estimator._differentiate(sweep)
            combined, gram, _ = estimator._combined(sweep, jvps)
        holds = torch.stack([condition.reshape(()) for condition in conditions]).all()
        gradients = [
            torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
            for tensor in stand_ins.values()
            if tensor.requires_grad
        ]
        return [
            holds, losses, gram, combined.jvps, combined.gram, combined.coefficients, *gradients,
        ]  # fmt: skip


class _Noted(TangentSource):
    """A source that notes what it is asked for."""

    def __init__(self, source: TangentSource) -> None:
        self.source = source
        self.num_tangents = source.num_tangents
        self.requests: list[Request] = []

    def draw(self, request: Request) -> Tensor:
        self.requests.append(replace(request, primal=None, target=None))
        return self.source.draw(request)


class _Given(TangentSource):
    """A source of tangents that are drawn already."""

    def __init__(self, source: TangentSource, blocks: Sequence[Tensor]) -> None:
        self.source = source
        self.num_tangents = source.num_tangents
        self._blocks = iter(blocks)

    def draw(self, request: Request) -> Tensor:
        return next(self._blocks)

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        return self.source.mixing(gram, dimension)


def _copies(example: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in example]


def compiled_step(
    estimator: GradientEstimator, setting: Setting, batch: Part
) -> CompiledStep | None:
    """A compiled step that passed its test, or ``None`` and a warning.

    The test compares losses, gradients and buffers with those of the step as it is written, with
    other random numbers than those of the trace: what should vary from step to step must.
    """
    if names := [name for name, m in estimator.model.named_modules() if _drops(m)]:
        _warn(f"dropout, whose masks are drawn while the model runs, in {', '.join(names)}")
        return None
    if setting.source.learns or any(setting.source.informed):
        _warn(f"tangents that depend on the batch or on earlier steps, in {setting.source!r}")
        return None
    other = replace(setting, stream=_next_stream(setting))
    state = _State(estimator)
    try:
        step = CompiledStep(estimator, setting, batch)
        expected = state.after(lambda: estimator._eager(other, batch))
        found = state.after(lambda: step(other, batch))
    except Exception as error:  # what the compiler can not do; the user's own errors come again
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    else:
        worst = max(_difference(a, b) for a, b in zip(found, expected, strict=True))
        if worst <= _tolerance(setting):
            return step
        reason = f"results differ by {worst:.1e} from those of the step without `compile`"
    finally:
        state.restore()
    _warn(reason)
    return None


def _warn(reason: str) -> None:
    warnings.warn(
        f"`compile=True` is left out for this model and batch. Found {reason}.", stacklevel=5
    )


def _drops(module: nn.Module) -> bool:
    if not isinstance(module, nn.modules.dropout._DropoutNd):
        return False
    return module.training and module.p > 0


def _tolerance(setting: Setting) -> float:
    """Compiled, tangents of low precision are rounded at other places."""
    carried = setting.tangent_dtype
    return max(1e-3, 0.0 if carried is None else 8 * torch.finfo(carried).eps)


def _next_stream(setting: Setting) -> Stream:
    return Stream(setting.stream.seed, setting.stream.step + 1)


class _State:
    """What a step changes, to be put back."""

    def __init__(self, estimator: GradientEstimator) -> None:
        self._model = estimator.model
        self._gradients = [p.grad for p in self._model.parameters()]
        self._buffers = [buffer.clone() for buffer in self._model.buffers()]

    def after(self, step: Callable[[], Step | None]) -> list[Tensor]:
        """Losses, gradients and buffers after a step from this state."""
        self.restore()
        for parameter in self._model.parameters():
            parameter.grad = None
        result = step()
        if result is None:
            raise ValueError("an assumption that does not hold")
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        return [result.losses, *gradients, *[buffer.clone() for buffer in self._model.buffers()]]

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for buffer, value in zip(self._model.buffers(), self._buffers, strict=True):
                buffer.copy_(value)
        for parameter, gradient in zip(self._model.parameters(), self._gradients, strict=True):
            parameter.grad = gradient


def _difference(a: Tensor, b: Tensor) -> float:
    """The norm of the difference, relative to that of the second."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))
