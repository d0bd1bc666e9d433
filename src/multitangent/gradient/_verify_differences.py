"""The net for finite differences: what has to hold of runs whose losses are subtracted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from multitangent._structures import map_tensors
from multitangent.engine import Trial, agree
from multitangent.gradient._causality import cuts, not_causal
from multitangent.gradient._comparison import Comparison, check_parameters
from multitangent.gradient._step import Problem
from multitangent.gradient._verification_error import VerificationError
from multitangent.gradient._verify import chosen, double, in_double_precision
from multitangent.objective import Batch, Objective, SavedState, Statistics, kept_parameters
from multitangent.perturbation import BoundPerturbation, Inject, LazyRun, Run, discount_of
from multitangent.tangents import Stream, Tangents, TangentsInTime

_FAR = 1.0  # samples that do not depend on each other do not so over any distance
_ROUNDING = 100  # times the precision of the losses


def verify_differences(
    problem: Problem,
    bind: Callable[[Objective], BoundPerturbation],
    objective: Objective,
    batch: Batch,
    stream: Stream,
    trial: Trial,
) -> None:
    """See on a few samples whether losses may be subtracted. Nothing of it stays.

    Two runs have to give the same losses, or their difference would be noise over epsilon. A step
    has to leave in modules what one run leaves. Where each value belongs to one sample, the loss of
    a sample must not change when the values of another sample move. The loss of a token must not
    change when later positions move. The local steps have to give the gradients of
    backpropagation, for all parameters that have one.

    Args:
        problem: What is differentiated and how, with an engine that runs a batch as a whole.
        bind: Binds the perturbation to a model and a loss.
        objective: The model and its loss.
        batch: The whole batch.
        stream: The random numbers of the step.
        trial: What is known about batches of this kind.

    Raises:
        VerificationError: If the gradient would be wrong.
    """
    try:
        _verify(problem, objective, batch, stream, trial)
    except VerificationError:
        with suppress(Exception):  # statistics of few samples can magnify rounding
            exact = in_double_precision(objective)
            problem = replace(problem, perturbation=bind(exact))
            batch = exact.batch(*map_tensors(double, (batch.inputs, batch.target)))
            _verify(problem, exact, batch, stream, trial)
            return
        raise


def _verify(
    problem: Problem, objective: Objective, batch: Batch, stream: Stream, trial: Trial
) -> None:
    for samples in (chosen(batch, trial), range(batch.size)):
        full_precision = torch.autocast(batch.device.type, enabled=False)
        with objective.preserved(), kept_parameters(objective.model), full_precision:
            try:
                part = batch.pick(samples)
                part = objective.batch(part.inputs, part.target)
                part = replace(part, shapes_of_few=trial.shapes)
                _Differences(problem, objective, part, stream).compare()
                return
            except VerificationError:
                raise
            except Exception:  # such as of a model for batches of one size only
                continue  # and of the whole batch, where the step will say so


class _Differences(Comparison):
    """The comparison of a few samples."""

    def compare(self) -> None:
        """Raise `VerificationError` if anything differs."""
        before = self.objective.saved_state()
        run, tangents, found = self._forward()
        after = self.objective.saved_state()
        self._check_repeated(run, found.losses)
        if run.per_sample and self.few.size > 1:
            self._check_independence(run, tangents)
        if discount_of(run) is not None:
            self._check_causality(run, tangents, found.losses.shape[1])
        before.restore()
        self._check_state(after)
        before.restore()
        if run.per_sample:
            self._check_local_steps(run, tangents)

    def _rerun(self, run: Run, inject: Inject, statistics: Statistics | None = None) -> Tensor:
        evaluate = run.evaluate_lazily if isinstance(run, LazyRun) else run.evaluate
        with torch.no_grad():
            return evaluate(run.batch, inject, statistics or self.problem.engine.statistics).losses

    def _check_repeated(self, run: Run, primal: Tensor) -> None:
        one, other = (self._rerun(run, _unchanged) for _ in range(2))
        if not agree(one.to(primal.dtype), primal) or _differs(one, other):
            raise VerificationError(
                "`model` and `loss` should give the same losses whenever they see the same "
                "samples, for differences to be taken of them. Found others in a second run. Try "
                "to remove what changes from run to run, or `verify=False`."
            )

    def _check_independence(self, run: Run, tangents: Tangents) -> None:
        """Raise if moving the values of the first sample changes the losses of others."""
        moved = _moved(tangents, slice(0, 1))
        losses = self._rerun(run, _unchanged), self._rerun(run, moved)
        if _differs(*(of_run[1:] for of_run in losses)):
            raise VerificationError(
                "`model` and `loss` should treat every sample by itself where activations are "
                "perturbed: a difference of losses belongs to one sample. Found that the "
                f"activations of one change the losses of others, on {self.few.size} samples of "
                "the batch. Try `perturb='weights'`, or `Activations(sites=[...])`."
            )

    def _check_causality(self, run: Run, tangents: Tangents, num_tokens: int) -> None:
        """Raise if moving the values of later positions changes the losses of tokens."""
        TangentsInTime(tangents, num_tokens)
        still = self._rerun(run, _unchanged, "coupled")
        for place in cuts(num_tokens):
            for name in reversed(tangents.blocks):
                moved = _moved(tangents, (slice(None), slice(place, None)), name)
                losses = self._rerun(run, moved, "coupled")
                if _differs(still[:, :place], losses[:, :place]):
                    raise not_causal(name, place)

    def _check_state(self, after: SavedState) -> None:
        """Raise if a step leaves something else in modules than one run of the model does."""
        few = self.few.copied()
        with torch.no_grad(), self.objective.mode(few, self.stream, "update"):
            losses = self.objective.losses(self.objective.output(few), few)
        names = self.objective.saved_state().differing(after, 1e-3)
        if names and losses.isfinite().all():
            raise VerificationError(
                "A step should leave in modules what one run of the model leaves. Found something "
                f"else in {', '.join(names)}. Try to keep it outside of the model, or "
                "`verify=False`."
            )

    def _check_local_steps(self, run: Run, tangents: Tangents) -> None:
        try:
            true = self._reference(self._start()[0], tangents.blocks)
        except RuntimeError:  # the loss has no derivative, or no function that leads to it
            return
        check_parameters(self.objective, run.pullback(true.of_values), true)


def _moved(tangents: Tangents, place: Any, name: str | None = None) -> Inject:
    """Moves a part of the perturbed values far along the first tangent: of one or of all."""

    def moved(value: Tensor, reached: str, samples: slice) -> Tensor:
        block = tangents.blocks.get(reached)
        row = None if block is None or name not in (None, reached) else block.row(0)
        if row is None:
            return value
        value = value.clone()
        value[place] += _FAR * row.expand_as(value)[place].to(value.dtype)
        return value

    return moved


def _unchanged(value: Tensor, name: str, samples: slice) -> Tensor:
    return value


def _differs(one: Tensor, other: Tensor) -> bool:
    """Whether losses differ by more than rounding."""
    if one.shape != other.shape:
        return True
    if not one.is_floating_point():
        return not torch.equal(one, other)
    slack = _ROUNDING * torch.finfo(one.dtype).eps * one.abs().max() if one.numel() else 0.0
    both = one.isfinite().all() & other.isfinite().all()
    return bool(both & ((one - other).abs() > slack).any())
