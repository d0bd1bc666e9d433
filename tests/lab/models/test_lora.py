"""Adapters of low rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multitangent import ForwardGradient, Projection
from multitangent.tangents import StandardBasis
from multitangent_lab.data import next_token_loss
from multitangent_lab.models import LoRALinear, add_lora, gpt


def tiny():
    torch.manual_seed(0)
    return gpt(7, context=6, embedding=8, blocks=2, heads=2)


def test_adapters_start_as_no_change():
    tokens = torch.randint(7, (3, 6))
    model = tiny()
    before = model(tokens)
    add_lora(model, rank=2)
    assert torch.equal(model(tokens), before)


def test_an_adapter_is_a_product_beside_the_layer():
    layer = LoRALinear(nn.Linear(5, 3), rank=2, alpha=3.0)
    nn.init.normal_(layer.up)
    x = torch.randn(4, 5)
    weight = layer.linear.weight + 3.0 / 2 * layer.up @ layer.down
    torch.testing.assert_close(layer(x), x @ weight.T + layer.linear.bias)


def test_only_adapters_are_trainable():
    model = add_lora(tiny(), rank=2)
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    assert len(adapters) == 2 * 4
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(p) for adapter in adapters for p in (adapter.down, adapter.up)}
    assert sum(isinstance(module, nn.Linear) for module in model.modules()) == 2 * 4 + 1  # the head


def test_forward_mode_gives_the_gradient_of_adapters():
    model = add_lora(tiny(), rank=1).double()
    trainable = [p for p in model.parameters() if p.requires_grad]
    for parameter in trainable:
        nn.init.normal_(parameter)
    tokens, targets = torch.randint(7, (2, 2, 6))
    source = StandardBasis(sum(p.numel() for p in trainable))
    gradient = ForwardGradient(model, next_token_loss, source, Projection(), "weights")
    gradient(tokens, targets)
    exact = torch.autograd.grad(next_token_loss(model(tokens), targets).mean(), trainable)
    torch.testing.assert_close([p.grad for p in trainable], list(exact), rtol=1e-8, atol=1e-10)


def test_errors():
    with pytest.raises(ValueError, match=r"`rank` should be at least 1\. Found 0\. Try 4"):
        add_lora(tiny(), rank=0)
    with pytest.raises(ValueError, match=r"should have transformer blocks\. Found none in Linear"):
        add_lora(nn.Linear(2, 2))
