"""Dual tensors as PyTorch code meets them: views, in-place operations, queries, the fallback."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitangent.dual import (
    DualTensor,
    FallbackWarning,
    record_fallbacks,
    register_rule,
    tangents,
)
from multitangent.dual._dual_tensor import expanded


def dual(*shape, shared=False, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (1, *shape[1:]) if shared else shape
    return DualTensor(
        torch.randn(shape, dtype=dtype, generator=generator),
        torch.randn(3, *sizes, dtype=dtype, generator=generator),
    )


def expected_tangents(function, x):
    def along(t):
        return torch.func.jvp(function, (x.primal,), (t,))[1]

    return torch.stack([along(t) for t in expanded(x)])


def in_place_relu(x):
    return F.relu(x + 0, inplace=True) * x


def add_into(x):
    y = x * 1
    y += x * x
    y.mul_(x).sub_(1)
    return y


def write_rows(x):
    y = x.clone()
    y[0] = x[1] * x[1]
    y[1:, ::2] = 3.0
    return y * y


def write_through_a_view(x):
    y = x * 1
    row = y[1]
    column = y.t()[0]
    row.mul_(x[0])  # reaches y and column
    column.add_(x[:, 1])  # reaches y and row
    return torch.cat([y.flatten(), row, column])


def write_into_new_zeros(x):
    y = x.new_zeros(x.shape)
    y[:, 1] = x[:, 0] ** 2
    z = torch.zeros_like(x)
    z += y
    return z * x


def write_by_mask(x):
    y = x.clone()
    y[x > 0] = (x * x)[x > 0]
    return y


def iterate_and_stack(x):
    return torch.stack([row * k for k, row in enumerate(x)])


def no_grad_inside(x):
    with torch.no_grad():
        return x * x


def norm_by_hand(x):
    return (x - x.mean(-1, keepdim=True)) / x.var(-1, keepdim=True, unbiased=False).sqrt()


FUNCTIONS = [
    in_place_relu,
    add_into,
    write_rows,
    write_through_a_view,
    write_into_new_zeros,
    write_by_mask,
    iterate_and_stack,
    no_grad_inside,
    norm_by_hand,
    lambda x: torch.einsum("bi,bj->bij", x, x),
    lambda x: F.layer_norm(x, (4,)),
    lambda x: x.cumsum(0).max(1).values,
    lambda x: torch.sort(x)[0],
    lambda x: torch.nn.utils.rnn.pad_sequence(list(x)).logsumexp(0),
    lambda x: F.scaled_dot_product_attention(x, x * x, x),
    lambda x: x.masked_fill_(x < 0, 0) if isinstance(x, DualTensor) else x.clamp(min=0),
    lambda x: torch.cat([x.float().double(), x.contiguous().view(-1, 2).reshape(3, 4)]),
    lambda x: torch.clone(x).unsqueeze(0).squeeze(0).clamp_(-0.5, 0.5),
]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_ordinary_code_has_the_right_tangents(function, shared):
    expected = expected_tangents(lambda x: function(x.clone()), dual(3, 4, shared=shared))
    found = function(dual(3, 4, shared=shared))
    assert isinstance(found, DualTensor)
    torch.testing.assert_close(expanded(found), expected, rtol=1e-6, atol=1e-6)
    with_plain = function(dual(3, 4, shared=shared).primal.clone())
    torch.testing.assert_close(found.primal, with_plain)


@pytest.mark.parametrize("module", [nn.LSTM(4, 5), nn.GRU(4, 5), nn.MultiheadAttention(4, 2)])
def test_modules_without_rules_fall_back(module):
    module = module.double()
    args = (lambda x: (x, x, x)) if isinstance(module, nn.MultiheadAttention) else lambda x: (x,)
    x = dual(3, 4)
    step = 1e-6
    with torch.no_grad():
        found = module(*args(x))[0]
        finite = [
            (module(*args(x.primal + step * t))[0] - module(*args(x.primal - step * t))[0])
            / (2 * step)
            for t in x.tangents
        ]
    torch.testing.assert_close(found.tangents, torch.stack(finite), rtol=1e-6, atol=1e-7)


def test_missing_rows_are_zero():
    few, many = dual(2, 2), DualTensor(torch.ones(2, 2).double(), torch.ones(5, 2, 2).double())
    expected = many.tangents.clone()
    expected[:3] += few.tangents
    torch.testing.assert_close((few + many).tangents, expected)
    assert torch.cat([few, many]).tangents.shape == (5, 4, 2)
    assert torch.logaddexp(few, many).tangents.shape == (5, 2, 2)


def test_queries_return_plain_values():
    x = dual(3, 4)
    assert x.shape == (3, 4) and x.ndim == 2 and len(x) == 3 and x.dtype == torch.float64
    assert x.device.type == "cpu" and x.is_floating_point() and x.numel() == 12
    assert type(x > 0) is Tensor and type(x.argmax()) is Tensor and type(x.detach()) is Tensor
    assert float(x.sum()) == float(x.primal.sum()) and isinstance(x[0, 0].item(), float)
    assert "DualTensor" in repr(x) and x.tolist() == x.primal.tolist()
    if (x.square() > -1).all():
        return
    pytest.fail("a condition on a dual tensor should see its primal")


def test_zero_dimensional_primals_keep_their_precision():
    x = DualTensor(torch.tensor(2.0), torch.ones(3))
    assert (x * 2.5).tangents.dtype == torch.float32
    y = DualTensor(torch.tensor(2.0, dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    assert (torch.ones(4) * y).tangents.dtype == torch.float32


def test_fallback_is_reported_once_by_name():
    x = dual(3, 4)
    with warnings.catch_warnings(record=True) as caught, record_fallbacks() as names:
        warnings.simplefilter("default")
        for _ in range(3):
            torch.cumprod(x, 0)
    assert len(caught) == 1 and issubclass(caught[0].category, FallbackWarning)
    assert "torch.cumprod has no rule" in str(caught[0].message)
    assert names == {"torch.cumprod"}


def test_rules_can_be_added_once():
    with pytest.raises(ValueError, match=r"Found one for torch\.exp"):
        register_rule(torch.exp)(lambda out, x: tangents(x))


def test_rules_can_be_added_for_a_users_own_function():
    def cube(x):
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(cube, (x,), x)
        return x**3

    with record_fallbacks() as names:
        cube(dual(2))
    assert names == {"cube"}
    register_rule(cube)(lambda out, x: tangents(x) * 3 * x.primal**2)
    x = dual(2)
    torch.testing.assert_close(cube(x).tangents, expected_tangents(lambda x: x**3, x))


def bypass(x):
    with torch._C.DisableTorchFunctionSubclass():
        return x + x


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda x: nn.Parameter(x.primal).add_(x), RuntimeError, "a tensor that is trained"),
        (lambda x: torch.add(x, x, out=torch.zeros(3, 4)), NotImplementedError, "out="),
        (lambda x: x.share_memory_(), NotImplementedError, "twin without the trailing"),
        (lambda x: x.unsqueeze_(0), NotImplementedError, "should keep the shape"),
        (bypass, NotImplementedError, "bypasses"),
        (lambda x: DualTensor(torch.ones(2).int(), torch.ones(1, 2)), TypeError, "int32"),
        (lambda x: DualTensor(torch.ones(2), torch.ones(2)), ValueError, r"shape \[K, \*\[2\]\]"),
        (lambda x: DualTensor(torch.ones(4), torch.ones(2, 2)), ValueError, r"Found \[2, 2\]"),
    ],
)  # fmt: skip
def test_what_can_not_be_carried_is_an_error(function, error, message):
    with pytest.raises(error, match=message):
        function(dual(3, 4))
