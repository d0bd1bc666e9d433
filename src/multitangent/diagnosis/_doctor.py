"""The doctor: one look at a model, its batch and its loss."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multitangent._structures import tensors_of
from multitangent.diagnosis._cost import Cost, measure_cost
from multitangent.diagnosis._functions import find_functions
from multitangent.diagnosis._remedies import repair
from multitangent.diagnosis._report import Finding, Report
from multitangent.dual import FallbackWarning
from multitangent.gradient import ForwardGradient, Step, VerificationError, step
from multitangent.objective import Objective, kept_parameters, normalizes_batches
from multitangent.perturbation import Perturbation
from multitangent.tangents import Normal, TangentSource

_MEASURED = (1, 8)  # numbers of tangents whose steps are measured
_NORMALIZES = (
    "batch normalisation is in training mode: its statistics are held constant along tangents, "
    "which is not quite the gradient of backpropagation"
)


def doctor(
    model: nn.Module,
    batch: tuple[Any, Any],
    loss: Callable[[Any, Any], Tensor],
    *,
    perturb: Literal["activations", "weights"] | Perturbation = "activations",
    tangents: TangentSource | None = None,
    fix: bool = False,
) -> Report:
    """Find out what of a model fits, what does not and where, and what a step costs.

    The doctor pushes tangents through the model once, and notes every function that meets them.
    Tangents do not meet the functions inside a perturbed layer, because PyTorch differentiates each
    layer separately. The doctor then compares the gradient of a few samples with that of
    backpropagation, and measures inference and a few steps. Parameters, ``.grad``, buffers and
    random numbers stay as they are.

    Args:
        model: The model, in the mode in which it is to be trained.
        batch: Inputs and target as for a step of `ForwardGradient`. A few samples are enough. All
            of them run at once.
        loss: As for `ForwardGradient`.
        perturb: As for `ForwardGradient`.
        tangents: As for `ForwardGradient`, ``Normal(16)`` by default.
        fix: Whether to apply the safe remedies first, in place: see `repair`. They do not change
            what the model computes.

    Raises:
        Exception: Any error that the model itself raises for this batch.

    Examples:
        >>> from multitangent.diagnosis import doctor
        >>> class Spectrum(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.first, self.second = nn.Linear(4, 8), nn.Linear(5, 2)
        ...     def forward(self, x):
        ...         return self.second(torch.fft.rfft(self.first(x)).abs())
        >>> model = nn.Sequential()
        >>> model.spectrum = Spectrum()
        >>> model.head = nn.Linear(2, 2)
        >>> batch = torch.randn(4, 4), torch.zeros(4, dtype=torch.int64)
        >>> report = doctor(model, batch, nn.CrossEntropyLoss(), perturb="weights")
        >>> report.is_healthy
        False
        >>> [(finding.function, finding.paths) for finding in report.unsupported]
        [('fft_rfft', ('spectrum',))]
    """
    inputs, target = batch
    objective = Objective(model, loss, has_tokens=bool(getattr(perturb, "has_tokens", False)))
    copied = objective.batch(inputs, target).copied()  # a model may write into its inputs
    inference = partial(_inference, objective, copied.inputs, copied.target)
    with _nothing_stays(objective):
        _check(inference)
    repairs = repair(model, inference=partial(_output, objective, inputs)) if fix else ()
    tangents = Normal(16) if tangents is None else tangents
    make = partial(_gradient, model, loss, perturb)
    with _nothing_stays(objective):
        sites, functions, refusal = _look(make, objective, inputs, target)
    report = partial(Report, functions, sites, tangents.num_tangents, repairs=repairs)
    if refusal or any(finding.support == "unsupported" for finding in functions):
        return report(cost=None, fault="it can not run: a part of the model is not supported")
    with _nothing_stays(objective):
        fault, notes = _tested(partial(make, tangents, verify="first"), inputs, target)
    notes += tuple({_NORMALIZES for module in model.modules() if normalizes_batches(module)})
    if fault:
        return report(cost=None, fault=fault, notes=notes)
    return report(cost=_cost(make, objective, inputs, target), fault="", notes=notes)


@contextmanager
def _nothing_stays(objective: Objective) -> Iterator[None]:
    state = objective.preserved(), kept_parameters(objective.model)
    with torch.random.fork_rng(), state[0], state[1], warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


def _gradient(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    perturb: Literal["activations", "weights"] | Perturbation,
    tangents: TangentSource,
    verify: Literal["first", False] = False,
    batch_size: int | Literal["auto"] = "auto",
) -> ForwardGradient:
    return ForwardGradient(
        model, loss, tangents, perturb=perturb, verify=verify, micro_batch=batch_size
    )


def _output(objective: Objective, inputs: Any) -> Any:
    """What the model returns in evaluation mode, without randomness. The run leaves nothing."""
    training = [module for module in objective.model.modules() if module.training]
    objective.model.eval()
    try:
        with _nothing_stays(objective), torch.no_grad():
            return objective.output(objective.batch(inputs, inputs).copied())
    finally:
        for module in training:
            module.training = True


def _check(inference: Callable[[], None]) -> None:
    """Let an error of the model itself pass, since it is not a finding."""
    try:
        inference()
    except Exception as error:
        error.add_note("Model and loss should run on the batch. They raise this without tangents.")
        raise


def _inference(objective: Objective, inputs: Any, target: Any) -> None:
    with torch.no_grad():
        batch = objective.batch(inputs, target)
        objective.losses(objective.output(batch), batch)


def _step(gradient: ForwardGradient, inputs: Any, target: Any) -> Step:
    return step(*gradient.prepare(inputs, target))


_Make = Callable[..., ForwardGradient]


def _look(
    make: _Make, objective: Objective, inputs: Any, target: Any
) -> tuple[dict[str, int], tuple[Finding, ...], Exception | None]:
    """Sites with their sizes, the functions of one step, and what ended it."""
    sites: dict[str, int] = {}

    def run() -> None:
        size = objective.batch(inputs, target).size
        result = _step(make(Normal(1), batch_size=size), inputs, target)
        assert result.tangents is not None
        sites.update({n: block.dimension for n, block in result.tangents.blocks.items()})

    functions, error = find_functions(objective.model, objective.given_loss, run)
    return sites, functions, error


def _tested(
    make: Callable[[], ForwardGradient], inputs: Any, target: Any
) -> tuple[str, tuple[str, ...]]:
    """What the comparison with backpropagation says against a model, and what it notes."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _step(make(), inputs, target)
        except Exception as error:
            name = "" if isinstance(error, VerificationError) else f"{type(error).__name__}: "
            return name + str(error), ()
    own = [w for w in caught if w.category is UserWarning]
    said = tuple(dict.fromkeys(str(warning.message) for warning in own))
    missed = [text for text in said if text.startswith("`verify` could not compare")]
    return " ".join(missed), tuple(text for text in said if text.startswith("micro_batch="))


def _cost(make: _Make, objective: Objective, inputs: Any, target: Any) -> Cost:
    size = objective.batch(inputs, target).size

    def once(run: Callable[[], Any]) -> None:
        with _nothing_stays(objective):
            run()

    steps = {}
    for count in _MEASURED:
        gradient = make(Normal(count), batch_size=size)
        with _nothing_stays(objective):
            prepared = gradient.prepare(inputs, target)
        steps[count] = partial(once, partial(step, *prepared))
    held = [*objective.model.parameters(), *objective.model.buffers()]
    fixed = sum(value.nbytes for value in [*held, *tensors_of((inputs, target))])
    inference = partial(_inference, objective, inputs, target)
    return measure_cost(size, fixed, partial(once, inference), steps)
