"""An optimizer whose learning rate sets itself, without a backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from multitangent.gradient import GradientEstimator
from multitangent.learning_rate._rule import StepRule


class AutoStep(Optimizer):
    """Scales the steps of any optimizer by slope and curvature of the loss along them.

    The loss of the current batch is differentiated twice along the last update u, at the point it
    has led to: one pass of forward mode over forward mode, in which u takes the part of a tangent.
    Slope ``u . grad f`` and curvature ``u^T H u`` say how long the step should have been. The batch
    is not the one that u was made from, so that its noise does not flatter the step; how much
    that one promised is one more pass, and how the slopes of the samples differ comes for free.
    `StepRule` makes a learning rate of them.

    Args:
        optimizer: Any optimizer of `torch.optim` whose step needs no closure. Its learning rates
            count relative to each other only, and best are 1: what a scheduler changes in all of
            them is made good.
        gradient: Whose last batch is differentiated: call it before `step`, in every step.
        rule: How slopes and curvatures become a learning rate.
        every: One step in so many is measured, and the first so many.

    Raises:
        ValueError: If `every` is below 1, or a parameter is not one of the gradient's model.

    Examples:
        >>> from torch import nn
        >>> from multitangent import AutoStep, ForwardGradient
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> gradient = ForwardGradient(model, nn.CrossEntropyLoss())
        >>> optimizer = AutoStep(torch.optim.SGD(model.parameters(), lr=1.0), gradient)
        >>> x = torch.randn(64, 20)
        >>> y = x[:, :3].argmax(1)
        >>> for _ in range(200):
        ...     optimizer.zero_grad()
        ...     value = gradient(x, y)
        ...     optimizer.step()
        >>> bool(value < 0.2)
        True
    """

    def __init__(
        self,
        optimizer: Optimizer,
        gradient: GradientEstimator,
        rule: StepRule | None = None,
        every: int = 10,
    ) -> None:
        if not isinstance(gradient, GradientEstimator):
            raise TypeError(
                "`gradient` should be a ForwardGradient, whose last batch is differentiated. Found "
                f"{gradient!r}. Try ForwardGradient(model, loss)."
            )
        if every < 1:
            raise ValueError(f"`every` should be at least 1. Found {every}.")
        of_model = {id(p) for p in gradient.model.parameters()}
        shapes = [
            list(p.shape)
            for g in optimizer.param_groups
            for p in g["params"]
            if id(p) not in of_model
        ]
        if shapes:
            raise ValueError(
                "`optimizer` should train parameters of the gradient's model. Found others, of "
                f"shapes {shapes}. Try an optimizer of their own."
            )
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self.param_groups = optimizer.param_groups
        self.state = optimizer.state
        self.gradient = gradient
        self.rule = StepRule() if rule is None else rule
        self.every = every
        self._update: dict[str, Tensor] | None = None
        self._began = torch.zeros(())
        self._steps = 0

    @property
    def learning_rate(self) -> float | None:
        """By what the last update of the optimizer was multiplied."""
        return None if self.rule.learning_rate is None else float(self.rule.learning_rate)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimizer, at the learning rate of the rule.

        Args:
            closure: Computes the gradient once more, if given.

        Raises:
            RuntimeError: If the gradient has not been called yet.
        """
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if self._update is not None and self._is_measured(self._steps):
            self._measure(self._update)
        parameters = self._parameters()
        before = {name: p.detach().clone() for name, p in parameters.items()}
        self.optimizer.step()
        update = {name: p.detach() - before[name] for name, p in parameters.items()}
        if self._update is None or self._is_measured(self._steps + 1):
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
            first = self._update is None
            line = self.gradient.along(update, curvature=first)
            self._began = line.slope
            if first:
                self.rule.begin(line.slope, line.curvature)
        learning_rate = self.learning_rate or 0.0
        for name, parameter in parameters.items():
            parameter.copy_(torch.add(before[name], update[name], alpha=learning_rate))
        self._update = update
        self._steps += 1
        return value

    def _is_measured(self, step: int) -> bool:
        """Whether slope and curvature are measured before a step: one in so many, and the first."""
        return step < self.every or step % self.every == 0

    def _measure(self, update: dict[str, Tensor]) -> None:
        line = self.gradient.along(update)
        length = torch.stack([u.double().square().sum() for u in update.values()]).sum()
        since = 1 if self._steps < self.every else self.every
        self.rule.update(
            line.slope, line.curvature, length, line.slope_variance, self._began, since
        )

    def _parameters(self) -> dict[str, Tensor]:
        """What the optimizer trains, by the names that the model has for it."""
        trained = {id(p) for group in self.param_groups for p in group["params"]}
        named = self.gradient.model.named_parameters()
        return {name: p for name, p in named if id(p) in trained and p.requires_grad}

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer, and what the rule has met."""
        entries = {"update": self._update, "began": self._began, "steps": self._steps}
        return self.optimizer.state_dict() | {
            "auto_step": entries | {"rule": self.rule.state_dict()}
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state."""
        entries = state_dict["auto_step"]
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "auto_step"})
        self.param_groups, self.state = self.optimizer.param_groups, self.optimizer.state
        devices = {name: p.device for name, p in self._parameters().items()}
        first = next(iter(devices.values()))
        self.rule.load_state_dict(
            {k: v if v is None else v.to(first) for k, v in entries["rule"].items()}
        )
        self._began, self._steps = entries["began"].to(first), entries["steps"]
        update = entries["update"]
        self._update = update and {name: u.to(devices[name]) for name, u in update.items()}

    def __repr__(self) -> str:
        return (
            f"AutoStep({self.optimizer!r}, {self.gradient!r}, rule={self.rule!r}, "
            f"every={self.every})"
        )
