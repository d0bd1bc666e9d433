"""Linear layers of products that wait: tangents that samples share, times factors of each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multitangent.dual import DualTensor, add_to, times
from multitangent.dual._product import Product

CASES = {
    "few outputs": ((3, 1, 7), (2, 7)),
    "many outputs": ((3, 1, 7), (40, 7)),
    "tangents of each sample": ((3, 8, 7), (2, 7)),
    "constant along the inputs": ((3, 1, 1), (2, 7)),
}


def hidden(shape, dtype=torch.float64):
    """A value ``[8, 7]`` behind a ReLU."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 7, generator=generator, dtype=dtype)
    return torch.relu(DualTensor(x, torch.randn(shape, generator=generator, dtype=dtype)))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("injected", [False, True])
def test_a_linear_layer_takes_a_product_along(name, injected):
    shape, of_weight = CASES[name]
    weight = torch.randn(of_weight, dtype=torch.float64)
    x = hidden(shape)
    t = torch.randn(shape, dtype=torch.float64)
    if injected:
        x = DualTensor.deferred(x.primal, add_to(x, t))
    rows = hidden(shape).tangents + (t if injected else 0)
    found = F.linear(x, weight).tangents.expand(3, 8, -1)
    torch.testing.assert_close(found, rows.expand(3, 8, 7) @ weight.mT)


def test_with_few_outputs_no_tensor_of_all_tangents_of_all_samples_is_made(monkeypatch):
    def refuse(self):
        raise AssertionError("computed")

    x = hidden((3, 1, 7))
    monkeypatch.setattr(Product, "computed", refuse)
    assert F.linear(x, torch.ones(2, 7, dtype=torch.float64)).tangents.shape == (3, 8, 2)
    with pytest.raises(AssertionError, match="computed"):
        _ = F.linear(x, torch.ones(40, 7, dtype=torch.float64)).tangents


def test_a_sum_waits_where_all_its_tangents_are_shared():
    x, shared = hidden((3, 1, 7)), torch.ones(3, 1, 7, dtype=torch.float64)
    assert isinstance(add_to(x, shared), Product)
    assert isinstance(add_to(x, shared.expand(3, 8, 7)), torch.Tensor)
    assert isinstance(add_to(hidden((3, 8, 7)), shared), torch.Tensor)


def test_the_type_of_the_tangents_is_kept():
    generator = torch.Generator().manual_seed(1)
    t = torch.randn(3, 1, 7, generator=generator).to(torch.bfloat16)
    x = torch.randn(8, 7, generator=generator)
    dual = DualTensor.deferred(x, Product(t))
    dual = DualTensor.deferred(x, times(dual, (x > 0).float()))
    found = F.linear(dual, torch.ones(2, 7)).tangents
    assert found.dtype is torch.bfloat16
    expected = (t.float() * (x > 0)).sum(-1, keepdim=True).expand(3, 8, 2)
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_cross_entropy_of_labels(ignored, reduction):
    logits, rows = torch.randn(6, 4).double(), torch.randn(3, 6, 4).double()
    labels = torch.tensor([0, 3, 2, 1, 0, 3])
    ignore = -100
    if ignored:
        labels[2] = ignore = 9  # which is no class
    options = {"ignore_index": ignore, "reduction": reduction}
    found = F.cross_entropy(DualTensor(logits, rows), labels, **options).tangents
    for row, jvp in zip(rows, found, strict=True):
        _, expected = torch.func.jvp(
            lambda z: F.cross_entropy(z, labels, **options), (logits,), (row,)
        )
        torch.testing.assert_close(jvp, expected)
