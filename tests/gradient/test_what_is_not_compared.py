"""A comparison with backpropagation that does not take place is never one that passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from multitangent import Activations, ForwardGradient, VerificationError
from multitangent.diagnosis import doctor
from multitangent.dual import register_rule
from multitangent.gradient import step
from multitangent.tangents import Normal

LOSS = nn.CrossEntropyLoss()


def wrong(x: Tensor) -> Tensor:
    """A function whose rule is wrong."""
    if torch.overrides.has_torch_function_unary(x):
        return torch.overrides.handle_torch_function(wrong, (x,), x)
    return x**2


@register_rule(wrong)
def _rule(out, x):
    return x.tangents


class Single(nn.Module):
    """A layer with a matrix that is no buffer: the model does not run in double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = torch.randn(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return wrong(x @ self.matrix)


class Cast(nn.Module):
    """It runs in mixed precision only."""

    def __init__(self, function) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(4, 4), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x.bfloat16()).float())


class Model(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(4, 4), middle, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x)))


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(4, 4), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize("perturb", ["weights", "activations"])
def test_a_difference_stands_where_double_precision_fails(perturb):
    data = batch()
    with pytest.raises(VerificationError, match="Directional derivatives should be those"):
        ForwardGradient(Model(Single()), LOSS, Normal(3), perturb=perturb)(*data)
    assert not doctor(Model(Single()), data, LOSS, perturb=perturb).is_healthy


@pytest.mark.parametrize("function", [torch.tanh, wrong])
@pytest.mark.parametrize("perturb", ["weights", "activations"])
def test_what_runs_in_mixed_precision_only_is_said_not_to_be_compared(function, perturb):
    data, model = batch(), Model(Cast(function))
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(UserWarning, match=r"`verify` could not compare.*ended in RuntimeError"):
            ForwardGradient(model, LOSS, Normal(3), perturb=perturb)(*data)
        report = doctor(model, data, LOSS, perturb=perturb)
    assert "could not compare" in report.fault


def test_the_step_alone_says_what_it_ends_in():
    """No warning comes before the error of a model that does not run."""
    x, _ = batch()
    gradient = ForwardGradient(Model(nn.Tanh()), LOSS, Normal(3), perturb="weights", verify="first")
    with pytest.raises(IndexError, match="out of bounds"):
        gradient(x, torch.tensor([0, 1, 0, 5]))


def test_nothing_before_an_exact_output_is_compared(monkeypatch):
    """The last layer's gradient is compared, though nothing is perturbed."""
    model = Model(nn.Tanh()).requires_grad_(False)
    model.last.requires_grad_(True)
    gradient = ForwardGradient(model, LOSS, Normal(3), perturb=Activations(output="exact"))
    checked = []
    name = "multitangent.gradient._comparison.check_parameters"
    monkeypatch.setattr(name, lambda *args: checked.append(args))
    step(*gradient.prepare(*batch()))
    assert len(checked) == 1
