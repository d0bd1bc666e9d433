"""PyTorch's attention layer: the same values and tangents as its own implementation has."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from multitangent.dual import DualTensor, FallbackWarning
from multitangent.dual._dual_tensor import expanded
from multitangent.dual._fallback import jvp_by_vmap

K, T, S, B, E = 3, 4, 5, 2, 8
PADDING = torch.tensor([[False] * S, [False, False, True, False, True]])
CAUSAL = torch.ones(T, T, dtype=torch.bool).triu(1)
CASES = {
    "plain": ({}, {}),
    "no weights": ({}, {"need_weights": False}),
    "every head": ({}, {"average_attn_weights": False}),
    "padding": ({}, {"key_padding_mask": PADDING}),
    "mask": ({}, {"attn_mask": torch.randn(T, S, dtype=torch.float64), "need_weights": False}),
    "masks": (
        {},
        {"attn_mask": torch.randn(B * 2, T, S).abs() < 0.1, "key_padding_mask": PADDING},
    ),
    "boolean mask": ({}, {"attn_mask": torch.arange(T)[:, None] == torch.arange(S)}),
    "other widths": ({"kdim": 3, "vdim": 5}, {}),
    "extra keys": ({"add_bias_kv": True, "add_zero_attn": True}, {"key_padding_mask": PADDING}),
    "no bias": ({"bias": False}, {}),
}


def dual(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    return DualTensor(x, torch.randn(K, *shape, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batched", [True, False])
def test_equals_torch(name, training, batched):
    options, arguments = CASES[name]
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(E, 2, **options).double().train(training)
    widths = E, options.get("kdim", E), options.get("vdim", E)
    inputs = [dual(n, B, w) for n, w in zip((T, S, S), widths, strict=True)]
    if not batched:
        inputs = [DualTensor(x.primal[:, 1], x.tangents[:, :, 1]) for x in inputs]
        arguments = {
            key: value[1] if key == "key_padding_mask" else value[2:] if value.ndim == 3 else value
            for key, value in arguments.items()
            if isinstance(value, torch.Tensor)
        }
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        out, weights = layer(*inputs, **arguments)
        expected = layer(*[x.primal for x in inputs], **arguments)
        names = [n for n, x in enumerate((out, weights)) if x is not None]
        along = jvp_by_vmap(
            lambda *x: [y for y in layer(*x, **arguments) if y is not None], tuple(inputs), {}, K
        )
    for index, tangents in zip(names, along, strict=True):
        found = (out, weights)[index]
        torch.testing.assert_close(found.primal, expected[index], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(expanded(found), tangents, rtol=1e-11, atol=1e-11)


def test_causal_hint():
    layer = nn.MultiheadAttention(E, 2, batch_first=True).double()
    x = dual(B, T, E)
    mask = torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)
    with torch.no_grad():
        found = layer(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0]
        expected = layer(*[x.primal] * 3, attn_mask=CAUSAL, need_weights=False)[0]
    torch.testing.assert_close(found.primal, expected)


def test_refuses_static_keys():
    layer = nn.MultiheadAttention(E, 2).double()
    x = dual(T, B, E)
    with pytest.raises(NotImplementedError, match="`static_k` and `static_v` should be None"):
        nn.functional.multi_head_attention_forward(
            x, x, x, E, 2, layer.in_proj_weight, layer.in_proj_bias, None, None, False, 0.0,
            layer.out_proj.weight, layer.out_proj.bias, static_k=x.primal,
        )  # fmt: skip
