"""Several steps in a row of models that keep a state, or draw random numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from multitangent.gradient import GradientEstimator
from multitangent_lab.fuzz._blocks import RANDOM, STATEFUL
from multitangent_lab.fuzz._comparison import Case, Values, difference
from multitangent_lab.fuzz._draw import Draw, table
from multitangent_lab.fuzz._modules import Problem, draw_problem, state_of


def freeze(r: Draw, model: Any) -> None:
    """Freeze a parameter of the blocks, or train it again."""
    parameter = r.choice(list(model.blocks.parameters()) or [nn.Parameter(torch.zeros(()))])
    parameter.requires_grad_(not parameter.requires_grad)


def load(r: Draw, model: Any) -> None:
    """Load other weights."""
    state = {k: v * 0.9 if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state, assign=r.chance(0.5))


def reload(gradient: GradientEstimator | None) -> None:
    """Take the gradient's own state back and forth."""
    if gradient is not None:
        gradient.load_state_dict(copy.deepcopy(gradient.state_dict()))


def new_head(model: Any) -> None:
    """Put another layer at the end."""
    model.head = copy.deepcopy(model.head)


def accumulate(model: nn.Module) -> None:
    """Leave gradients, to which the next ones are added."""
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)


def fail(model: Any) -> None:
    """Let the next step, the last one, end in an error of the model's own."""
    model.head.register_forward_pre_hook(_raise)


def _raise(module: nn.Module, inputs: Any) -> None:
    raise KeyError("in the model")


# What happens before a step.
EVENTS = table(
    """
None
model.eval()
model.train()
freeze(r, model)
load(r, model)
reload(gradient)
new_head(model)
accumulate(model)
fail(model)
""",
    "r, model, gradient",
    globals(),
)


def draw_states(r: Draw) -> Case:
    """Two or three steps of gradient descent, with something before each."""
    events = [r.name(EVENTS) for _ in range(r.randint(2, 3))]
    problem = draw_problem(r, r.choice([STATEFUL, RANDOM]), steps=len(events))
    seeds = [r.getrandbits(32) for _ in events]

    def run(make: Callable[[nn.Module], GradientEstimator | None]) -> Values:
        model = copy.deepcopy(problem.model)
        gradient = make(model)
        values: Values = {}
        for i, (event, seed) in enumerate(zip(events, seeds, strict=True)):
            model.zero_grad()
            EVENTS[event](Draw(seed), model, gradient)
            torch.manual_seed(seed)
            before = copy.deepcopy(model) if event == "fail(model)" else model
            try:
                loss = problem.step(model, gradient, i)
            except KeyError:
                return values | {"left in order": _left_in_order(problem, before, model, i)}
            found = {"loss": loss, **state_of(model)}
            values |= {f"step {i}, {name}": value for name, value in found.items()}
            _descend(model)
        return values

    return Case(
        (*problem.blocks, *events),
        problem.settings,
        lambda: run(problem.oracle),
        lambda: run(problem.gradient),
        problem.tolerance,
    )


def _left_in_order(problem: Problem, before: nn.Module, after: nn.Module, i: int) -> Tensor:
    """Whether a step that failed left a model as it was, or as plain PyTorch leaves it."""
    plain = copy.deepcopy(before)
    with suppress(KeyError):
        problem.step(plain, None, i)
    found = state_of(after)
    in_order = any(not difference(state_of(model), found) for model in (before, plain))
    return torch.tensor(float(in_order))


@torch.no_grad()
def _descend(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.sub_(0.05 * parameter.grad)
