"""Faults of models that random cases have found."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from models_for_tests import Model, data, linear, linears
from multitangent import Activations, ForwardGradient, Projection, VerificationError
from multitangent.tangents import StandardBasis

SQUARE = nn.MSELoss()
DTYPE = torch.float64


def normalized(m, x):
    """A question about gradients comes first, so that the batch runs a second time."""
    x = 2 * x if x.requires_grad else -x
    return m.parts[1](m.parts[0](x))


def quantized(m, x):
    """A range that only grows: few samples may leave it as it is."""
    m.top = torch.maximum(m.top, x.detach().abs().amax())
    return m.parts[0](x.clamp(-0.8 * m.top, 0.8 * m.top))


def quantized_in_place(m, x):
    m.top.copy_(torch.maximum(m.top, x.detach().abs().amax()))
    return m.parts[0](x.clamp(-0.8 * m.top, 0.8 * m.top))


def looked_up(m, x):
    h = m.parts[0](x)
    h = 2 * h if h.requires_grad else -h
    return m.parts[2](h + m.parts[1](h.argmax(-1)))


def with_top(forward):
    model = Model(forward, linear(4, 4))
    model.register_buffer("top", torch.tensor(2.5, dtype=DTYPE))
    return model


def with_layers(forward, layer):
    first, last = linears((4, 4), (4, 4))
    return Model(forward, first, layer.double(), last)


def counted(m, x):
    """What is divided by the counter stays in the graph of the next layer."""
    m.n += 1
    return m.parts[1]((m.parts[0](x) + m.parts[0].bias) / m.n)


MODELS = {
    "a cumulative average": lambda: Model(
        normalized, nn.BatchNorm1d(4, momentum=None).double(), linear(4, 4)
    ),
    "a range": lambda: with_top(quantized),
    "a range in place": lambda: with_top(quantized_in_place),
    "an embedding of limited length": lambda: with_layers(
        looked_up, nn.Embedding.from_pretrained(data(4, 4), freeze=False, max_norm=0.5)
    ),
}


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("name", MODELS)
def test_some_steps_are_those_of_backpropagation(name, micro_batch):
    model, right = MODELS[name](), MODELS[name]()
    gradient = ForwardGradient(
        model, SQUARE, StandardBasis(80), Projection(), "weights", micro_batch=micro_batch
    )
    for x in data(3, 5, 4).round(decimals=1) * torch.tensor([1, 1, 3, 1, 1])[:, None]:
        for trained in (model, right):
            trained.zero_grad()
        loss, expected = gradient(x, x), SQUARE(right(x), x)
        expected.backward()
        torch.testing.assert_close(loss, expected.detach())
        for state in (lambda m: [p.grad for p in m.parameters()], lambda m: m.state_dict()):
            torch.testing.assert_close(state(model), state(right))


def test_looking_at_a_batch_normalises_no_embedding():
    model = MODELS["an embedding of limited length"]()
    before = copy.deepcopy(model.state_dict())
    gradient = ForwardGradient(model, SQUARE, StandardBasis(80), perturb="weights")
    gradient.prepare(data(5, 4), data(5, 4))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_samples_in_another_order_are_found_where_some_are_alike():
    model = Model(
        lambda m, x: m.parts[0](x[x[:, 0].argsort()])[x[:, 0].argsort().argsort()], linear(4, 4)
    )
    x = data(4, 4)
    x[:2, 0] = 1.0
    gradient = ForwardGradient(model, SQUARE, perturb=Activations())
    with pytest.raises(VerificationError, match="Found others"):
        gradient(x, x)


def test_a_counter_that_a_gradient_needs_is_refused():
    model = Model(counted, *linears((4, 4), (4, 4)))
    model.register_buffer("n", torch.zeros((), dtype=DTYPE))
    gradient = ForwardGradient(model, SQUARE, perturb=Activations(), micro_batch=2)
    with pytest.raises(RuntimeError, match=r"should not write in place.*Found.*Try"):
        gradient(data(4, 4), data(4, 4))
