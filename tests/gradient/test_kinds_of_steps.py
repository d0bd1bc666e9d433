"""A compiled step is used again only in steps of the kind that it was traced for."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multitangent import Feedback, ForwardGradient, Normal
from multitangent.gradient._learned import kind_of_step
from multitangent.gradient._replayed import drawn_outside
from multitangent.tangents import Every, Needs, Request, RunningMean, TangentSource


def test_a_part_that_learns_tells_steps_apart_beside_one_that_always_learns() -> None:
    source = (Every(3, RunningMean() + Normal(2)) + Feedback() + Normal(1)).init()
    kinds = [kind_of_step(source, step) for step in range(28, 34)]
    assert source.needs(28) == source.needs(30)
    assert kinds[2] == kinds[5] != kinds[0] == kinds[1] == kinds[3] == kinds[4]


def test_two_parts_that_learn_in_turn_make_different_kinds() -> None:
    source = (Every(2, Normal(2) + Feedback()) + Every(3, Normal(2) + Feedback())).init()
    assert source.needs(28) == source.needs(33)
    assert kind_of_step(source, 28) != kind_of_step(source, 33)


def test_what_is_drawn_outside_keeps_its_state() -> None:
    source = _Shifted() + Normal(2)
    outside = drawn_outside(source, step=1)
    assert outside.state_dict().keys() == source.state_dict().keys() == {"0"}
    outside.load_state_dict({"0": {"shift": torch.tensor(2.0)}})
    assert source.state_dict()["0"]["shift"] == 2.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_parameter_that_is_not_used_has_no_gradient() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(2), compile=True)
    gradient(torch.randn(4, 3), torch.tensor([0, 1, 1, 0]))
    assert model.unused.grad is None
    assert model[0].weight.grad is not None


class _Shifted(TangentSource):
    """A source with a state, which needs nothing of the steps in which it does not learn."""

    num_tangents = 1

    def __init__(self) -> None:
        self.shift = torch.tensor(1.0)

    def needs(self, step: int) -> Needs:
        return Needs.NOTHING if step % 2 else Needs.UPDATE

    def draw(self, request: Request) -> Tensor:
        return request.random.normal(1) + self.shift

    def state_dict(self) -> dict[str, Any]:
        return {"shift": self.shift}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.shift = state["shift"]
