"""Tangents in bfloat16, redrawn tangents, compiled steps: other ways to the same gradient."""

from __future__ import annotations

import copy
import shutil
import warnings

import pytest
import torch
from torch import nn

from models_for_tests import MODELS, build, gradients, relative_error
from multitangent import (
    Activations,
    ForwardGradient,
    Normal,
    Projection,
    Rademacher,
    SimulatedGradient,
    Weights,
)
from multitangent.aggregation import Sum
from multitangent.gradient import step
from multitangent_lab.models import resnet18, vision_transformer

LOSS = nn.CrossEntropyLoss()
PERTURBATIONS = [
    Weights(), Activations(), Activations(share="sample"), Activations(recompute=True),
    Activations(share="sample", output="exact"),
]  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=repr)
@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
def test_tangents_that_are_drawn_again_give_the_same_gradient(name, perturb, kind):
    model, x, y, _ = build(name)
    kind(model, LOSS, Normal(3), perturb=perturb)(x, y)
    expected = gradients(model)
    for micro_batch in ("auto", 4):
        kind(
            model, LOSS, Normal(3), perturb=perturb, micro_batch=micro_batch, store_tangents=False
        )(x, y)
        assert relative_error(gradients(model), expected) <= 1e-9


def test_tangents_that_are_drawn_again_are_not_kept():
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(3), perturb="weights", store_tangents=False)
    blocks = step(*gradient.prepare(x, y)).tangents.blocks.values()
    assert len(blocks) == 6
    assert not any(block.is_stored for block in blocks)
    assert "store_tangents=False" in repr(gradient)


@pytest.mark.parametrize("perturb", [*PERTURBATIONS[:3]], ids=repr)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: build("mlp", torch.float32)[0], (5,)),
        (lambda: resnet18(1, norm="batch"), (1, 16, 16)),
        (lambda: vision_transformer(8, 1, layers=2, heads=2, hidden=16, mlp=24), (1, 8, 8)),
    ],
    ids=["mlp", "resnet18", "vit"],
)
def test_bfloat16_costs_about_two_digits(perturb, make, shape):
    """Of each directional derivative; with orthogonal enough tangents of the gradient too."""
    torch.manual_seed(0)
    model = make()
    x, y = torch.randn(4, *shape), torch.randint(3, (4,))
    derivatives = []
    for dtype in (None, torch.bfloat16):
        options = {"tangent_dtype": dtype, "perturb": perturb}
        # Tangents of +1 and -1 are the same in both types.
        gradient = ForwardGradient(model, LOSS, Rademacher(4), Sum(), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradient(x, y)
        assert all(p.grad.dtype == torch.float32 for p in model.parameters())
        model.zero_grad()
        assert gradient.diagnostics.jvps.dtype == torch.float32
        derivatives.append(gradient.diagnostics.jvps)
    error = (derivatives[1] - derivatives[0]).norm() / derivatives[0].norm()
    assert 1e-5 < error < 0.03


compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: g++")


@compiler
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("perturb", ["activations", "weights"])
def test_a_compiled_step_is_the_same_step(perturb):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 3)
    )
    twin = copy.deepcopy(model)
    plain = ForwardGradient(model, LOSS, Normal(3), Projection(), perturb)
    compiled = ForwardGradient(twin, LOSS, Normal(3), Projection(), perturb, compile=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`compile=True` is left out")
        for step in range(3):
            x, y = torch.randn(5, 1, 5, 5), torch.randint(3, (5,))
            torch.testing.assert_close(compiled(x, y), plain(x, y))
            assert relative_error(gradients(twin), gradients(model)) <= 1e-4
            assert compiled.step == step + 1
    for found, expected in zip(twin.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(compiled.diagnostics.jvps, plain.diagnostics.jvps)
    # Duplicate tangents break the assumption that the graph rests on: done again without it.
    x = torch.full((5, 1, 5, 5), float("nan"))
    with pytest.raises(ValueError, match="`jvps` should be finite"):
        compiled(x, y)


class Noisy(nn.Module):
    """Adds random numbers that are no mask of dropout."""

    def forward(self, x):
        return x + torch.randn_like(x)


@compiler
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_what_varies_from_step_to_step_is_not_compiled():
    """A graph would draw other numbers than the step: the test notices, and says so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), Noisy(), nn.Linear(5, 2))
    x, y = torch.randn(6, 4), torch.zeros(6, dtype=torch.int64)
    gradient = ForwardGradient(model, LOSS, Normal(3), compile=True)
    with pytest.warns(UserWarning, match="`compile=True` is left out for this model and batch"):
        gradient(x, y)
    found = gradients(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gradient(x, y)
    model.zero_grad()
    ForwardGradient(model, LOSS, Normal(3))(x, y)
    assert relative_error(found, gradients(model)) <= 1e-6


@compiler
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_graph_is_made_for_one_mode_and_one_aggregator():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    compiled = ForwardGradient(model, LOSS, Normal(3), compile=True)
    compiled(x, y)
    for change in (model.eval, lambda: setattr(compiled, "aggregator", Sum())):
        change()
        plain = ForwardGradient(model, LOSS, Normal(3), compiled.aggregator)
        plain.load_state_dict(compiled.state_dict())
        model.zero_grad()
        expected_value = plain(x, y)
        expected = gradients(model)
        torch.testing.assert_close(compiled(x, y), expected_value)
        assert relative_error(gradients(model), expected) <= 1e-4


@compiler
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "options", [{"tangent_dtype": torch.bfloat16}, {"store_tangents": False}], ids=str
)
def test_compiled_with_other_options(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    x, y = torch.randn(6, 4), torch.randint(2, (6,))
    gradient = ForwardGradient(model, LOSS, Normal(3), compile=True, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`compile=True` is left out")
        gradient(x, y)


@compiler
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")
def test_a_compiled_transformer():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(
        nn.Linear(4, 8), nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(24, 3)
    )
    x, y = torch.randn(6, 3, 4), torch.randint(3, (6,))
    gradient = ForwardGradient(model, LOSS, Normal(3), compile=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "`compile=True` is left out")
        gradient(x, y)


@compiler
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_attributes_that_change_are_not_compiled():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.runs = nn.Linear(3, 2), 0

        def forward(self, x):
            self.runs += 1
            return self.layer(x) / self.runs

    torch.manual_seed(0)
    model = Counting()
    gradient = ForwardGradient(model, nn.MSELoss(), Normal(3), compile=True)
    with pytest.warns(UserWarning, match="attributes that change when the model runs, runs"):
        gradient(torch.ones(4, 3), torch.zeros(4, 2))
    assert model.runs == 1
