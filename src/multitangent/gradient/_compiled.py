"""The whole step as one compiled function, tested against the step it replaces."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module

from multitangent._deferred_checks import deferred_checks
from multitangent._structures import map_tensors, tensors_of
from multitangent.gradient._coefficients import Combination
from multitangent.gradient._replayed import RecordingSource, ReplayedSource
from multitangent.gradient._step import Problem, Step, step
from multitangent.objective import Batch, Objective
from multitangent.perturbation import Perturbation
from multitangent.tangents import DenseBlock, Request, Stream, TangentSource


class CompiledStep:
    """Steps on batches of one shape, by a graph of plain operations that was traced once.

    Tangents are drawn outside of the graph, and stored. What a step checks on the way, such as
    that all values are finite, is assumed by the graph and reported by it; where it does not hold
    the step is done again without the graph. What the model keeps outside of its parameters and
    buffers, such as a number in an attribute, is part of the graph.

    Args:
        problem: What is differentiated and how.
        perturb: The perturbation, to be bound to what stands in for the parameters.
        objective: The model and its loss.
        batch: A batch as an example.
        stream: Random numbers as an example.
    """

    def __init__(
        self,
        problem: Problem,
        perturb: Perturbation,
        objective: Objective,
        batch: Batch,
        stream: Stream,
    ) -> None:
        self._problem = problem
        self._perturb = perturb
        self._objective = objective
        self._parameters = dict(objective.model.named_parameters())
        self._buffers = dict(objective.model.named_buffers())
        self._correction = batch.correction
        self._requests = self._find_requests(batch, stream)
        example = [argument.clone() for argument in self._arguments(batch, stream)]
        graph = make_fx(lambda *args: self._flat_step(batch, stream, args))(*example)
        self._run: Callable[..., Any] = torch.compile(graph, dynamic=False)

    def __call__(self, batch: Batch, stream: Stream) -> Step | None:
        """One step, ``None`` if an assumption did not hold: then nothing has changed."""
        if batch.correction != self._correction:
            return None
        saved = self._objective.saved_state()
        holds, losses, gram, coefficients, mixed_gram, jvps, *gradients = self._run(
            *self._arguments(batch, stream)
        )
        if not bool(holds):
            saved.restore()
            return None
        trainable = [p for p in self._parameters.values() if p.requires_grad]
        return Step(
            losses,
            gram,
            Combination(coefficients, mixed_gram, jvps),
            gradients=dict(zip(trainable, gradients, strict=True)),
        )

    def _arguments(self, batch: Batch, stream: Stream) -> list[Tensor]:
        source = self._problem.source
        rows = [DenseBlock(source, replace(r, stream=stream)).rows() for r in self._requests]
        values = tensors_of((batch.inputs, batch.target))
        parameters = [parameter.detach() for parameter in self._parameters.values()]
        return [*parameters, *self._buffers.values(), *values, *rows]

    def _find_requests(self, batch: Batch, stream: Stream) -> list[Request]:
        """What tangents are asked for, from a step that changes nothing."""
        source = RecordingSource(self._problem.source)
        copies = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in (self._parameters | self._buffers).items()
        }
        self._step_on(copies, source, batch, stream)
        return source.requests

    def _step_on(
        self, stand_ins: dict[str, Tensor], source: TangentSource, batch: Batch, stream: Stream
    ) -> Step:
        """A step with other parameters and buffers, which the perturbation is bound to."""
        with _reparametrize_module(self._objective.model, stand_ins):
            bound = self._perturb.bind(self._objective)
            return step(replace(self._problem, perturbation=bound, source=source), batch, stream)

    def _flat_step(self, batch: Batch, stream: Stream, args: Sequence[Tensor]) -> list[Tensor]:
        """A step as a function of tensors, from tensors to tensors."""
        remaining = iter(args)
        stand_ins: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            stand_ins[name] = next(remaining).detach().requires_grad_(parameter.requires_grad)
        for name in self._buffers:
            stand_ins[name] = next(remaining)
        inputs, target = map_tensors(lambda _: next(remaining), (batch.inputs, batch.target))
        source = ReplayedSource(self._problem.source, list(remaining))
        with deferred_checks() as conditions:
            result = self._step_on(
                stand_ins, source, replace(batch, inputs=inputs, target=target), stream
            )
        holds = torch.stack([condition.reshape(()) for condition in conditions]).all()
        gradients: Mapping[Any, Tensor] = result.gradients
        of_parameters = [
            gradients[tensor] if tensor in gradients else torch.zeros_like(tensor)
            for tensor in stand_ins.values()
            if tensor.requires_grad
        ]
        return [holds, result.losses, result.gram, *result.combination, *of_parameters]


def compiled_step(
    problem: Problem, perturb: Perturbation, objective: Objective, batch: Batch, stream: Stream
) -> CompiledStep | None:
    """A compiled step that passed its test, or ``None`` and a warning.

    The test compares losses, gradients and buffers with those of the step as it is written, with
    other random numbers than those of the trace: what should vary from step to step must.
    """
    model = objective.model
    if names := [name for name, module in model.named_modules() if _drops(module)]:
        _warn(f"dropout, whose masks are drawn while the model runs, in {', '.join(names)}")
        return None
    if objective.has_tokens:
        _warn("losses of tokens, each of which is combined for itself")
        return None
    if problem.source.needs(stream.step) or any(problem.source.guesses):
        _warn(f"tangents that depend on the batch or on earlier steps, in {problem.source!r}")
        return None
    if names := _changing(problem, objective, batch, stream):
        _warn(f"attributes that change when the model runs, {', '.join(names)}")
        return None
    other = Stream(stream.seed, stream.step + 1)
    try:
        graph = CompiledStep(problem, perturb, objective, batch, stream)
        expected = _outcome(objective, lambda: step(problem, batch, other))
        outcome = _outcome(objective, lambda: graph(batch, other))
    except Exception as error:  # what the compiler can not do; the user's own errors come again
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    else:
        worst = max(_difference(a, b) for a, b in zip(outcome, expected, strict=True))
        if worst <= _tolerance(problem):
            return graph
        reason = f"results differ by {worst:.1e} from those of the step without `compile`"
    _warn(reason)
    return None


def _changing(problem: Problem, objective: Objective, batch: Batch, stream: Stream) -> list[str]:
    """The names of what modules keep from step to step outside of buffers."""
    buffers = {name for name, _ in objective.model.named_buffers()}
    with objective.preserved():
        before = objective.saved_state()
        step(problem, batch, stream)
        objective.release()
        changed = before.differing(objective.saved_state(), 0.0)
    return [name for name in changed if name not in buffers]


def _warn(reason: str) -> None:
    warnings.warn(
        f"`compile=True` is left out for this model and batch. Found {reason}.", stacklevel=5
    )


def _drops(module: nn.Module) -> bool:
    if not isinstance(module, nn.modules.dropout._DropoutNd):
        return False
    return module.training and module.p > 0


def _tolerance(problem: Problem) -> float:
    """Compiled, tangents of low precision are rounded at other places."""
    carried = problem.tangent_dtype
    return max(1e-3, 0.0 if carried is None else 8 * torch.finfo(carried).eps)


def _outcome(objective: Objective, take: Callable[[], Step | None]) -> list[Tensor]:
    """Losses, gradients and buffers after a step, of which nothing stays."""
    model = objective.model
    with objective.preserved():
        result = take()
        if result is None:
            raise ValueError("an assumption that does not hold")
        if not set(result.gradients) <= set(model.parameters()):
            raise ValueError("parameters outside of the model")
        gradients = [result.gradients[p] for p in model.parameters() if p in result.gradients]
        return [result.losses, *gradients, *[buffer.clone() for buffer in model.buffers()]]


def _difference(a: Tensor, b: Tensor) -> float:
    """The norm of the difference, relative to that of the second."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))
