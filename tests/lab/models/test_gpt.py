"""The language model: causal, exact in forward mode, with rules for everything."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from models_for_tests import gradients, relative_error
from multitangent import Activations, ForwardGradient, Normal, SimulatedGradient
from multitangent.dual import FallbackWarning
from multitangent.tangents import StandardBasis
from multitangent_lab.data import next_token_loss
from multitangent_lab.models import gpt

V, T, D = 7, 5, 8


def tiny(**options):
    torch.manual_seed(0)
    return gpt(V, T, embedding=D, blocks=3, heads=2, **options)


def batch():
    tokens = torch.randint(V, (3, T + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def test_a_token_sees_itself_and_earlier_ones_only():
    model, (x, _) = tiny().double(), batch()
    before = model(x)
    changed = x.clone()
    changed[:, 3] = (x[:, 3] + 1) % V
    after = model(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).all(2).any()


def test_a_token_knows_its_position():
    logits = tiny().double()(torch.tensor([[1, 1, 1]]))[0]
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])


def test_fewer_tokens_than_the_context():
    model, (x, _) = tiny(), batch()
    torch.testing.assert_close(model(x[:, :2]), model(x)[:, :2])


def test_parameters():
    block = 4 * D + (3 * D * D + 3 * D) + (D * D + D) + (8 * D * D + 5 * D)
    body = V * D + T * D + 3 * block + 2 * D
    assert sum(p.numel() for p in tiny().parameters()) == body + D * V + V
    assert sum(p.numel() for p in tiny(tied=True).parameters()) == body


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "perturb",
    [
        Activations(),
        Activations(output="exact", recompute=True),
        Activations(sites=["block1", "block2", "block3"]),
    ],
    ids=str,
)
def test_as_many_tangents_as_dimensions_give_the_exact_gradient(tied, perturb):
    model, (x, y) = tiny(tied=tied).double(), batch()
    next_token_loss(model(x), y).mean().backward()
    true = gradients(model)
    n = 2 * T * D + T * V
    ForwardGradient(model, next_token_loss, StandardBasis(n), perturb=perturb)(x, y)
    assert relative_error(gradients(model), true) <= 1e-9


@pytest.mark.parametrize("perturb", ["activations", "weights"])
@pytest.mark.parametrize("tied", [False, True])
def test_forward_mode_equals_the_simulation(perturb, tied):
    model, (x, y) = tiny(tied=tied).double(), batch()
    SimulatedGradient(model, next_token_loss, Normal(3), perturb=perturb)(x, y)
    expected = gradients(model)
    ForwardGradient(model, next_token_loss, Normal(3), perturb=perturb)(x, y)
    assert relative_error(gradients(model), expected) <= 1e-8


def test_it_has_rules_for_everything():
    model, (x, y) = tiny(dropout=0.1), batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        gradient = ForwardGradient(model, next_token_loss, Normal(2))
        gradient(x, y)
    assert gradient.diagnostics.fallbacks == frozenset()


def test_the_tied_head_is_the_embedding():
    model = tiny(tied=True)
    embeddings = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    assert any(p is embeddings[0] for p in model.block3.parameters())


@pytest.mark.parametrize(
    "wrong", [{"heads": 3}, {"blocks": 1}, {"context": 0}, {"num_tokens": 0}], ids=str
)
def test_refuses_shapes_that_do_not_fit(wrong):
    with pytest.raises(ValueError, match=r"`heads` should divide .* Found .* Try the defaults"):
        gpt(**{"num_tokens": V, "embedding": D} | wrong)
