"""The loss's own derivative at the output, for losses that keep or draw something too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from multitangent.objective import Objective
from multitangent.objective._per_sample_loss import PerSampleLoss
from multitangent.objective._state import SavedState
from multitangent.tangents import Stream

MODEL = nn.Linear(3, 4)


def gradient_of(loss):
    objective = Objective(MODEL, loss)
    x, y = torch.arange(6.0).reshape(2, 3), torch.tensor([1, 3])
    batch = objective.batch(x, y)
    output = MODEL(x).detach()
    return objective.output_gradient(output, batch, Stream(0, 0)), output, y


def drawing(loss):
    """A forward of the user's own, which draws and counts."""
    loss.calls = 0

    def forward(output, target):
        loss.calls += 1
        return F.cross_entropy(output * torch.rand(output.shape), target, reduction="none")

    return forward


def test_a_loss_module_is_pure():
    loss = nn.CrossEntropyLoss()
    assert PerSampleLoss(loss).is_pure
    found, output, target = gradient_of(loss)
    output.requires_grad_()
    (expected,) = torch.autograd.grad(F.cross_entropy(output, target, reduction="sum"), output)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda loss: setattr(loss, "forward", drawing(loss)) or loss,
        lambda loss: loss.register_forward_hook(lambda *_: None) and loss,
        lambda loss: loss.register_forward_pre_hook(lambda *_: None) and loss,
        lambda loss: loss.compile() or loss,
        lambda loss: setattr(loss, "inside", nn.Dropout()) or loss,
        lambda loss: type("Own", (type(loss),), {})(),
        lambda loss: nn.Sequential(loss),
        lambda loss: F.cross_entropy,
        lambda loss: nn.TripletMarginWithDistanceLoss(),
    ],
    ids=["forward", "hook", "pre-hook", "compiled", "parts", "own", "sequential", "function", "of"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_may_keep_or_draw_something_is_not(make):
    assert not PerSampleLoss(make(nn.CrossEntropyLoss())).is_pure


def test_hooks_of_all_modules():
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not PerSampleLoss(nn.CrossEntropyLoss()).is_pure
    finally:
        handle.remove()


def test_what_is_drawn_and_kept():
    loss = nn.CrossEntropyLoss()
    loss.forward = drawing(loss)
    torch.manual_seed(0)
    first, *_ = gradient_of(loss)
    torch.manual_seed(1)
    second, *_ = gradient_of(loss)
    torch.testing.assert_close(first, second)
    assert loss.calls == 0


@pytest.mark.parametrize("generator", [np.random.MT19937, np.random.PCG64])
def test_the_state_of_numpy_is_put_back(generator):
    before = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(generator(3))
        saved = SavedState([MODEL])
        drawn = np.random.normal(size=3)
        assert saved.generators != SavedState([MODEL]).generators
        saved.restore()
        assert saved.generators == SavedState([MODEL]).generators
        np.testing.assert_array_equal(np.random.normal(size=3), drawn)
    finally:
        np.random.set_bit_generator(before)
