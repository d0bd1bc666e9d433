"""The whole step as one compiled function, tested against the step it replaces."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils.stateless import _reparametrize_module

from multitangent._deferred_checks import deferred_checks
from multitangent._structures import map_tensors, tensors_of
from multitangent.gradient._coefficients import Combination
from multitangent.gradient._learned import (
    has_tensors_only,
    kind_of_step,
    learned_state,
    structure,
    with_state,
)
from multitangent.gradient._replayed import RecordingStream, ReplayedStream, drawn_outside
from multitangent.gradient._step import Problem, Step, step
from multitangent.objective import Batch, Objective
from multitangent.perturbation import Perturbation
from multitangent.tangents import FactoredBlock, Stream

_NEAR = 64  # how many later steps to search for another of the same kind


class CompiledStep:
    """Steps on batches of one shape, by a graph of plain operations that was traced once.

    All random numbers, for tangents and for masks of dropout, are drawn outside of the graph. The
    state of the source is an input of the graph, and the state after the step is an output. The
    graph assumes what a step checks on its way, such as that all values are finite, and reports
    whether it holds. If it does not, the step runs again without the graph. What the model keeps
    outside of its parameters and buffers, such as a number in an attribute, is part of the graph.

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
        source = drawn_outside(problem.source, stream.step)
        self._problem = replace(problem, source=source)
        self._perturb = perturb
        self._objective = objective
        self._parameters = dict(objective.model.named_parameters())
        self._buffers = dict(objective.model.named_buffers())
        self._correction = batch.correction
        self._used: list[str] = []  # the parameters that have a gradient, found by the trace
        self._draws = self._find_draws(batch, stream)
        example = [argument.clone() for argument in self._arguments(batch, stream)]
        graph = make_fx(lambda *args: self._flat_step(batch, stream, args))(*example)
        self._run: Callable[..., Any] = torch.compile(graph, dynamic=False)

    def __call__(self, batch: Batch, stream: Stream) -> Step | None:
        """One step, ``None`` if an assumption did not hold: then nothing has changed."""
        if batch.correction != self._correction:
            return None
        before = [buffer.clone() for buffer in self._buffers.values()]
        holds, losses, gram, coefficients, mixed_gram, jvps, *others = self._run(
            *self._arguments(batch, stream)
        )
        if not bool(holds):
            for buffer, value in zip(self._buffers.values(), before, strict=True):
                buffer.data.copy_(value)
            return None
        used = [self._parameters[name] for name in self._used]
        gradients, state = others[: len(used)], others[len(used) :]
        return Step(
            losses,
            gram,
            Combination(coefficients, mixed_gram, jvps),
            gradients=dict(zip(used, gradients, strict=True)),
            learned=self._state(state) if state else None,
        )

    def _arguments(self, batch: Batch, stream: Stream) -> list[Tensor]:
        values = tensors_of((batch.inputs, batch.target))
        parameters = [parameter.detach() for parameter in self._parameters.values()]
        state = tensors_of(self._problem.source.state_dict())
        draws = [draw(stream) for draw in self._draws]
        return [*parameters, *self._buffers.values(), *values, *state, *draws]

    def _find_draws(self, batch: Batch, stream: Stream) -> list[Callable[[Stream], Tensor]]:
        """How random numbers are drawn, from a step that changes nothing."""
        recording = RecordingStream(stream)
        copies = {
            name: value.detach().clone().requires_grad_(value.requires_grad)
            for name, value in (self._parameters | self._buffers).items()
        }
        result = self._step_on(copies, batch, recording)
        assert result.tangents is not None
        for name, block in result.tangents.blocks.items():
            if isinstance(block, FactoredBlock):
                raise NotImplementedError(f"tangents in factors, at {name!r}")
        return recording.draws

    def _step_on(self, stand_ins: dict[str, Tensor], batch: Batch, stream: Stream) -> Step:
        """A step with other parameters and buffers, which the perturbation is bound to."""
        with _reparametrize_module(self._objective.model, stand_ins):
            bound = self._perturb.bind(self._objective)
            return step(replace(self._problem, perturbation=bound), batch, stream)

    def _flat_step(self, batch: Batch, stream: Stream, args: Sequence[Tensor]) -> list[Tensor]:
        """A step as a function of tensors, from tensors to tensors."""
        remaining = iter(args)
        stand_ins: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            stand_ins[name] = next(remaining).detach().requires_grad_(parameter.requires_grad)
        for name in self._buffers:
            stand_ins[name] = next(remaining)
        inputs, target = map_tensors(lambda _: next(remaining), (batch.inputs, batch.target))
        batch = replace(batch, inputs=inputs, target=target)
        state = self._state(remaining)
        with deferred_checks() as conditions, with_state(self._problem.source, state):
            result = self._step_on(stand_ins, batch, ReplayedStream(stream, list(remaining)))
            learned = tensors_of(learned_state(self._problem.source, result))
        holds = torch.stack([condition.reshape(()) for condition in conditions]).all()
        gradients: Mapping[Any, Tensor] = result.gradients
        self._used = [name for name in self._parameters if stand_ins[name] in gradients]
        of_parameters = [gradients[stand_ins[name]] for name in self._used]
        return [holds, result.losses, result.gram, *result.combination, *of_parameters, *learned]

    def _state(self, tensors: Iterable[Tensor]) -> dict[str, Any]:
        """The state of the source, made of tensors."""
        remaining = iter(tensors)
        state: dict[str, Any] = map_tensors(
            lambda _: next(remaining), self._problem.source.state_dict()
        )
        return state


def compiled_step(
    problem: Problem, perturb: Perturbation, objective: Objective, batch: Batch, stream: Stream
) -> CompiledStep | None:
    """A compiled step that passed its test, or ``None`` and a warning.

    The test compares losses, gradients, buffers and what the source learns with those of the step
    without a graph. It takes other random numbers than the trace, so it notices a value that should
    vary from step to step and does not. There is no warning where the source has just begun to
    learn, because its state has other shapes after the step.
    """
    model = objective.model
    if names := [name for name, module in model.named_modules() if _draws_alone(module)]:
        _warn(f"random numbers that are drawn while the model runs, in {', '.join(names)}")
        return None
    if objective.has_tokens:
        _warn("losses of tokens, each of which has a combination of its own")
        return None
    names, learned = _changing(problem, objective, batch, stream)
    if names:
        _warn(f"attributes that change when the model runs, {', '.join(names)}")
        return None
    if not has_tensors_only(learned):
        _warn(f"what {problem.source!r} has learned, which is not made of tensors alone")
        return None
    if structure(learned) != structure(problem.source.state_dict()):
        return None
    other = _other_step(problem, stream)
    try:
        graph = CompiledStep(problem, perturb, objective, batch, stream)
        expected = _outcome(problem, objective, lambda: step(problem, batch, other))
        outcome = _outcome(problem, objective, lambda: graph(batch, other))
    except Exception as error:  # what the compiler can not do; the user's own errors come again
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
    else:
        worst = max(_difference(a, b) for a, b in zip(outcome, expected, strict=True))
        if worst <= _tolerance(problem):
            return graph
        reason = f"results differ by {worst:.1e} from those of the step without `compile`"
    _warn(reason)
    return None


def _other_step(problem: Problem, stream: Stream) -> Stream:
    """The next step of the same kind for the source, or this one if none is near."""
    kind = kind_of_step(problem.source, stream.step)
    later = range(stream.step + 1, stream.step + 1 + _NEAR)
    alike = (count for count in later if kind_of_step(problem.source, count) == kind)
    return Stream(stream.seed + 1, next(alike, stream.step), stream.kind)


def _changing(
    problem: Problem, objective: Objective, batch: Batch, stream: Stream
) -> tuple[list[str], Mapping[str, Any]]:
    """What modules change outside of buffers, by name; and what the source learns from a step."""
    buffers = {name for name, _ in objective.model.named_buffers()}
    with objective.preserved():
        before = objective.saved_state()
        result = step(problem, batch, stream)
        objective.release()
        changed = before.differing(objective.saved_state(), 0.0)
    with with_state(problem.source, problem.source.state_dict()):
        learned = learned_state(problem.source, result)
    return [name for name in changed if name not in buffers], learned


def _warn(reason: str) -> None:
    warnings.warn(
        f"`compile=True` is left out for this model and batch. Found {reason}.", stacklevel=5
    )


def _draws_alone(module: nn.Module) -> bool:
    """Whether a module draws random numbers that are not those of the stream."""
    if isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
        return module.training and module.p > 0
    return isinstance(module, nn.RReLU) and module.training


def _tolerance(problem: Problem) -> float:
    """Compiled, tangents of low precision are rounded at other places."""
    carried = problem.tangent_dtype
    return max(1e-3, 0.0 if carried is None else 8 * torch.finfo(carried).eps)


def _outcome(
    problem: Problem, objective: Objective, take: Callable[[], Step | None]
) -> list[Tensor]:
    """Losses, gradients, buffers and the source's state after a step that leaves no trace."""
    model, source = objective.model, problem.source
    with objective.preserved(), with_state(source, source.state_dict()):
        result = take()
        if result is None:
            raise ValueError("an assumption that does not hold")
        if not set(result.gradients) <= set(model.parameters()):
            raise ValueError("parameters outside of the model")
        gradients = [result.gradients[p] for p in model.parameters() if p in result.gradients]
        state = tensors_of(learned_state(source, result))
        return [result.losses, *gradients, *[b.clone() for b in model.buffers()], *state]


def _difference(a: Tensor, b: Tensor) -> float:
    """The norm of the difference, relative to that of the second."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1e-12))
