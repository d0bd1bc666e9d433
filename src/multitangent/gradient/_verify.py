"""The net: the forward gradient of a few samples beside that of backpropagation."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch
from torch import Tensor, nn

from multitangent._structures import map_tensors
from multitangent.engine import (
    Engine,
    SplitError,
    Trial,
)
from multitangent.gradient._comparison import Comparison, NoReferenceError
from multitangent.gradient._step import Problem, step
from multitangent.gradient._verification_error import VerificationError
from multitangent.objective import Batch, Objective, kept_parameters
from multitangent.perturbation import BoundPerturbation
from multitangent.tangents import Stream

# In no order that sorting, reversing or shifting the samples leaves as it is. Statistics of very
# few samples magnify rounding.
_TWO_SAMPLES = (0, 1, 0, 0)
_SAMPLES = (0, 1, 2, 0)
_SAMPLES_OF_STATISTICS = (0, 1, 2, 3, 0)


def verify(
    problem: Problem,
    bind: Callable[[Objective], BoundPerturbation],
    objective: Objective,
    engine: Callable[[Trial], Engine],
    batch: Batch,
    stream: Stream,
    trial: Trial,
) -> Trial:
    """Compare forward mode with backpropagation on a few samples. Nothing of it stays.

    Along one random tangent the directional derivatives have to be those of the gradient that
    backpropagation gives for the perturbed values. From that gradient the local steps have to give
    the parameters' gradients that backpropagation gives. The losses, and what modules keep, have
    to be those of the model as it is. The measure is backpropagation and not a finite difference:
    where a function has a backward of its own, that is the derivative that is meant.

    Tangents are carried in full precision. What differs is compared again in double precision,
    with a copy of the model, since statistics of few samples can magnify rounding.

    Args:
        problem: What is differentiated and how.
        bind: Binds the perturbation to a model and a loss.
        objective: The model and its loss.
        engine: Makes the engine for what a trial says.
        batch: The whole batch.
        stream: The random numbers of the step.
        trial: What is known about batches of this kind.

    Returns:
        The trial, with the whole batch as micro-batch where parts give something else.

    Raises:
        VerificationError: If the gradient would be wrong.
    """
    try:
        return _verify(problem, objective, engine, batch, stream, trial)
    except _NotComparedError as error:
        if error.is_of_step and not _runs(problem, objective, batch, stream):
            return trial  # the step says so
        warnings.warn(
            f"`verify` could not compare the gradient with that of backpropagation, {error}",
            stacklevel=5,
        )
        return trial
    except VerificationError:
        with suppress(Exception):  # a model that does not run so has failed in its own precision
            exact = in_double_precision(objective)
            problem = replace(problem, perturbation=bind(exact))
            batch = exact.batch(*map_tensors(double, (batch.inputs, batch.target)))
            return _verify(problem, exact, engine, batch, stream, trial)
        raise


class _NotComparedError(Exception):
    """Neither a few samples nor the whole batch could be compared.

    Attributes:
        is_of_step: Whether the step itself may end in the same error.
    """

    def __init__(self, reason: str, *, is_of_step: bool) -> None:
        super().__init__(reason)
        self.is_of_step = is_of_step


def _runs(problem: Problem, objective: Objective, batch: Batch, stream: Stream) -> bool:
    """Whether the step succeeds, or goes on with other micro-batches."""
    with objective.preserved(), kept_parameters(objective.model):
        try:
            step(problem, batch.copied(), stream)
        except SplitError:
            return True
        except Exception:
            return False
        finally:
            objective.release()
    return True


def in_double_precision(objective: Objective) -> Objective:
    """A copy of model and loss."""
    model, loss = copy.deepcopy((objective.model, objective.given_loss))
    loss = loss.double() if isinstance(loss, nn.Module) else loss
    return Objective(model.double(), loss, has_tokens=objective.has_tokens)


def double(value: Tensor) -> Tensor:
    return value.double() if value.is_floating_point() else value


def _verify(
    problem: Problem,
    objective: Objective,
    engine: Callable[[Trial], Engine],
    batch: Batch,
    stream: Stream,
    trial: Trial,
) -> Trial:
    failed = _NotComparedError("", is_of_step=True)
    for samples in (chosen(batch, trial), range(batch.size)):
        full_precision = torch.autocast(batch.device.type, enabled=False)
        with objective.preserved(), kept_parameters(objective.model), full_precision:
            try:
                part = batch.pick(samples)
                part = objective.batch(part.inputs, part.target)
                part = replace(part, shapes_of_few=trial.shapes)
                return _verified(problem, objective, engine, part, batch.size, stream, trial)
            except VerificationError:
                raise
            except NoReferenceError as error:
                failed = _not_compared("which", error.__cause__)
            except Exception as error:  # such as of a model for batches of one size only
                failed = _not_compared("because the run for it", error, is_of_step=True)
    raise failed


def _not_compared(
    what: str, error: BaseException | None, *, is_of_step: bool = False
) -> _NotComparedError:
    reason = f"{what} ended in {type(error).__name__}: {error}"
    return _NotComparedError(reason, is_of_step=is_of_step)


def chosen(batch: Batch, trial: Trial) -> tuple[int, ...]:
    """Which samples are compared."""
    if batch.size > 3 and trial.normalizes:
        return _SAMPLES_OF_STATISTICS
    if batch.size > 2:
        return _SAMPLES
    return _TWO_SAMPLES if batch.size == 2 else (0,)


def _verified(
    problem: Problem,
    objective: Objective,
    engine: Callable[[Trial], Engine],
    few: Batch,
    batch_size: int,
    stream: Stream,
    trial: Trial,
) -> Trial:
    is_split = trial.micro_batch < batch_size and few.size > 1
    if is_split:
        half = replace(trial, micro_batch=min(trial.micro_batch, -(-few.size // 2)))
        comparison = Comparison(replace(problem, engine=engine(half)), objective, few, stream)
        try:
            comparison.check(trial)
            return trial
        except SplitError as error:
            warnings.warn(
                f"micro_batch={trial.micro_batch} splits what belongs together ({error}): going "
                f"on with {batch_size}.",
                stacklevel=8,
            )
    whole = replace(trial, micro_batch=max(batch_size, few.size))
    comparison = Comparison(replace(problem, engine=engine(whole)), objective, few, stream)
    try:
        comparison.check(whole)
    except SplitError as error:
        raise VerificationError(
            "`model` and `loss` should give the same losses whenever they see the same samples. "
            f"Found that {error}. Try to remove what changes from run to run, or `verify=False`."
        ) from error
    return replace(trial, micro_batch=batch_size) if is_split else trial
