"""Gradient descent on closed-form functions, for all learning rates and seeds at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from multitangent.aggregation import Aggregator, ControlVariate
from multitangent.dual import DualTensor
from multitangent.engine import ForwardMode
from multitangent.gradient import Problem
from multitangent.gradient import step as take_step
from multitangent.learning_rate import StepRule
from multitangent.objective import Batch
from multitangent.perturbation import Argument
from multitangent.tangents import Needs, Stream, TangentSource
from multitangent_lab.functions._functions import Function


@dataclass(frozen=True)
class TrueGradient:
    """The gradient itself, by backpropagation, to compare with."""

    def init(self) -> TrueGradient:
        return self

    def __call__(
        self, function: Function, points: Tensor, step: int, active: Tensor | None = None
    ) -> Tensor:
        with torch.enable_grad():
            x = points.detach().requires_grad_()
            return torch.autograd.grad(function(x).sum(), x)[0]


@dataclass(frozen=True)
class Estimate:
    """The forward gradient of K tangents.

    Random tangents of a seed are the same at all learning rates. Every trajectory learns guesses,
    such as `RunningMean`, for itself.

    Args:
        tangents: Where the tangents come from.
        aggregator: How the directional derivatives are combined.

    Raises:
        ValueError: If tangents depend on a model's output, of which a function has none; if the
            aggregator sets its gain by the number of samples.
    """

    tangents: TangentSource
    aggregator: Aggregator

    def init(self) -> Estimate:
        """One whose source has a state, if it is to learn."""
        source = self.tangents.init()
        if source.needs(0) & Needs.OUTPUT:
            raise ValueError(
                "`tangents` should not depend on a model's output, of which a function has none. "
                f"Found {self.tangents!r}. Try Normal(2) + RunningMean()."
            )
        if isinstance(self.aggregator, ControlVariate) and self.aggregator.gain == "auto":
            raise ValueError(
                "`aggregator` should not depend on how many trajectories run at once. Found "
                f"{self.aggregator!r}. Try ControlVariate(0.1)."
            )
        return replace(self, tangents=source)

    def __call__(
        self, function: Function, points: Tensor, step: int, active: Tensor | None = None
    ) -> Tensor:
        """The estimates ``[R, S, n]`` at points ``[R, S, n]`` of R learning rates and S seeds.

        Args:
            function: What is differentiated.
            points: Where.
            step: The count of the step.
            active: Which of all learning rates these are, ``[R]``, by default the first ones.
        """
        learning_rates, seeds, _ = points.shape
        batch, samples = Batch(points, None, slice(0, 1), 1), list(range(seeds))
        if any(self.tangents.guesses) or self.tangents.needs(step):  # every trajectory for itself
            which = torch.arange(learning_rates) if active is None else active
            trajectories = (which.unsqueeze(1) * seeds + torch.arange(seeds)).flatten()
            # As if each were a class: a memory of its own.
            batch = replace(batch, inputs=points.flatten(0, 1), target=trajectories)
            samples = samples * learning_rates
        problem = Problem(
            Argument(function, samples), self.tangents, self.aggregator, ForwardMode(micro_batch=1)
        )
        result = take_step(problem, batch, Stream(0, step))
        if (observation := result.observation) is not None:
            self.tangents.update(observation)
        return result.values["x"].view_as(points)


Gradient = TrueGradient | Estimate

_DIVERGED = 1e12  # times the first value


@dataclass(frozen=True)
class Descent:
    """What descent reached, for R learning rates and S seeds.

    Attributes:
        learning_rates: ``[R]``; where a rule set it, the last one, as the mean over the seeds.
        best: The least value on the way, ``[R, S]``.
        best_step: The step at which it was reached, ``[R, S]``.
        steps: How many steps were taken, ``[R, S]``.
        reached: The step at which the target was first reached, -1 if it was not, ``[R, S]``.
    """

    learning_rates: Tensor
    best: Tensor
    best_step: Tensor
    steps: Tensor
    reached: Tensor


@torch.no_grad()
def descend(
    function: Function,
    dimension: int,
    gradient: Gradient,
    learning_rates: Tensor | StepRule,
    *,
    seeds: int = 5,
    steps: int | None = None,
    patience: int = 50,
    target: float = -inf,
    dtype: torch.dtype = torch.float32,
    progress: Callable[[int, int], None] = lambda step, steps: None,
) -> Descent:
    """Gradient descent from a function's start point, R learning rates and S seeds as one batch.

    Every trajectory is what it would be alone: its tangents are a function of its seed, the step
    and nothing else. One that has not improved for `patience` steps is stopped (Section IV-B).

    Args:
        function: What is minimised.
        dimension: n.
        gradient: The true gradient or an estimate.
        learning_rates: The learning rates, ``[R]``; or a rule that sets one for each seed, R = 1.
        seeds: S; seeds are counted from 0.
        steps: How many steps at most, by default the function's own.
        patience: Steps without improvement after which a trajectory is stopped.
        target: The value to reach.
        dtype: Of the points.
        progress: Called now and then with the count of the step and of all steps.

    Raises:
        TypeError: If `function` or `learning_rates` is of another kind.
        ValueError: If a number is below 1 or a learning rate not positive.

    Examples:
        >>> from multitangent import Normal, Projection
        >>> from multitangent_lab.functions import FUNCTIONS
        >>> estimate = Estimate(Normal(4), Projection())
        >>> learning_rates = torch.tensor([0.5, 0.05])
        >>> descent = descend(FUNCTIONS["sphere"], 16, estimate, learning_rates, seeds=3)
        >>> descent.best.shape, bool((descent.best < 1e-6).all())
        (torch.Size([2, 3]), True)
    """
    _check_kinds(function, learning_rates)
    tried = torch.ones(1) if isinstance(learning_rates, StepRule) else learning_rates
    _check(dimension, tried, seeds, patience, function.steps if steps is None else steps)
    schedule = (
        _SelfSet(function, learning_rates)
        if isinstance(learning_rates, StepRule)
        else _Constant(tried)
    )
    limit = function.steps if steps is None else steps
    start = function.start_point(dimension, dtype)
    points = start.expand(len(tried), seeds, -1).clone()
    best = function(points).to(torch.float64)
    bound = _DIVERGED * (1 + best.max().abs())
    best_step = torch.zeros(len(tried), seeds, dtype=torch.int64)
    step_counts = torch.zeros_like(best_step)
    reached = torch.where(best <= target, 0, -1)
    active = torch.arange(len(tried))
    running = torch.ones(len(tried), seeds, dtype=torch.bool)
    gradient = gradient.init()
    for step in range(1, limit + 1):
        update = -gradient(function, points, step, active)
        learning_rate = schedule(points, update, active)
        points = torch.addcmul(points, update, learning_rate.unsqueeze(-1).to(dtype))
        values = function(points).to(torch.float64)
        within = values.abs() < bound
        points = torch.where(within.unsqueeze(-1), points, start)  # nothing there is a number
        ran = running[active]
        improved = ran & within & (values < best[active])
        best[active] = torch.where(improved, values, best[active])
        best_step[active] = torch.where(improved, step, best_step[active])
        there = ran & within & (values <= target) & (reached[active] < 0)
        reached[active] = torch.where(there, step, reached[active])
        step_counts[active] = torch.where(ran, step, step_counts[active])
        running[active] = ran & (step - best_step[active] < patience) & within
        if step % 10 == 0:
            progress(step, limit)
            going = running[active].any(1)
            if not going.all():
                active, points = active[going], points[going]
            if not len(active):
                break
    return Descent(schedule.learning_rates(), best, best_step, step_counts, reached)


class _Constant:
    """Every trajectory's own learning rate, from beginning to end."""

    def __init__(self, learning_rates: Tensor) -> None:
        self._learning_rates = learning_rates

    def __call__(self, points: Tensor, update: Tensor, active: Tensor) -> Tensor:
        return self._learning_rates[active].unsqueeze(1)

    def learning_rates(self) -> Tensor:
        return self._learning_rates


class _SelfSet:
    """What `AutoStep` does, for every seed: a learning rate from slopes and curvatures."""

    def __init__(self, function: Function, rule: StepRule) -> None:
        self._function = function
        self._rule = replace(rule)
        self._update: Tensor | None = None
        self._began = torch.zeros(())

    def __call__(self, points: Tensor, update: Tensor, active: Tensor) -> Tensor:
        if self._update is None:
            learning_rate = self._rule.begin(*self._along(points, update))
        else:
            slope, curvature = self._along(points, self._update)
            length = self._update.double().square().sum(-1)
            noise = torch.zeros_like(slope)
            learning_rate = self._rule.update(slope, curvature, length, noise, self._began)
        self._update = update
        self._began = self._slope(points, update)
        return learning_rate

    def _slope(self, points: Tensor, update: Tensor) -> Tensor:
        values: Any = self._function(DualTensor(points, update.unsqueeze(0)))
        return values.tangents[0]

    def _along(self, points: Tensor, update: Tensor) -> tuple[Tensor, Tensor]:
        """Slope and curvature ``[R, S]``: forward mode over forward mode."""
        result: Any = torch.func.jvp(lambda x: self._slope(x, update), (points,), (update,))
        return result[0], result[1]

    def learning_rates(self) -> Tensor:
        assert self._rule.learning_rate is not None
        return self._rule.learning_rate.mean(1)


def _check_kinds(function: object, learning_rates: object) -> None:
    if not isinstance(function, Function):
        raise TypeError(
            f"`function` should be a Function. Found {type(function).__name__}. Try "
            'Function("name", formula, start=(1.0, 1.0)).'
        )
    if not isinstance(learning_rates, Tensor | StepRule):
        raise TypeError(
            "`learning_rates` should be a tensor or a StepRule. Found "
            f"{type(learning_rates).__name__}. Try torch.tensor([0.1])."
        )


def _check(dimension: int, learning_rates: Tensor, seeds: int, patience: int, steps: int) -> None:
    arguments = {"dimension": dimension, "seeds": seeds, "patience": patience, "steps": steps}
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"`{name}` should be at least 1. Found {value}.")
    if (
        learning_rates.ndim != 1
        or not len(learning_rates)
        or not (learning_rates > 0).all()
        or not learning_rates.isfinite().all()
    ):
        is_short = learning_rates.numel() < 10
        description = learning_rates.tolist() if is_short else list(learning_rates.shape)
        raise ValueError(
            f"`learning_rates` should be a vector of positive learning rates. Found {description}."
        )
