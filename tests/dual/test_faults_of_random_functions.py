"""Faults of single functions that random cases have found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual import DualTensor, full_tangents

DTYPE = torch.float64


def rows_beside_zeros() -> DualTensor:
    """Numbers behind zeros that a factory made, which carry no tangents."""
    x = torch.tensor([[0.0, 0.0], [0.3, 0.7]], dtype=DTYPE)
    return DualTensor(x, torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=DTYPE)[None])


def sum_kl_div(x: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(x, y, reduction="sum")


OTHER = torch.tensor([[0.0, 0.0], [0.4, 0.6]], dtype=DTYPE)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.hypot(x, 0 * OTHER),
        lambda x: torch.hypot(0 * OTHER, x),
        lambda x: F.kl_div(OTHER, x, reduction="none"),
        lambda x: torch.float_power(x, OTHER),
    ],
    ids=["hypot", "hypot of zero", "kl_div", "float_power"],
)
def test_constants_have_no_tangents_where_a_slope_is_undefined(
    function: Callable[[Tensor], Tensor],
) -> None:
    out = function(rows_beside_zeros())
    x = rows_beside_zeros().primal[1:].requires_grad_()
    value = function(torch.cat([torch.zeros(1, 2, dtype=DTYPE), x]))
    (right,) = torch.autograd.grad(value[1].sum(), x)
    assert full_tangents(out)[0, 0].tolist() == [0.0, 0.0]
    torch.testing.assert_close(full_tangents(out)[0, 1], right[0])


@pytest.mark.parametrize("function", [sum_kl_div, torch.hypot, torch.float_power])
def test_single_numbers(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, y = torch.tensor(0.3, dtype=DTYPE), torch.tensor(0.6, dtype=DTYPE)
    out = function(DualTensor(x, torch.ones(2, dtype=DTYPE)), y)
    (right,) = torch.autograd.grad(function(x.requires_grad_(), y), x)
    torch.testing.assert_close(full_tangents(out), right.expand(2))


def test_no_tangents_are_shuffled_too() -> None:
    x = DualTensor(torch.ones(2, 2, 4, 4), torch.ones(0, 2, 2, 4, 4))
    assert full_tangents(F.pixel_unshuffle(x, 2)).shape == (0, 2, 8, 2, 2)


def test_a_write_into_numbers_that_share_memory_is_refused() -> None:
    x = DualTensor(torch.ones(4), torch.ones(2, 4)).expand(2, 4)
    with pytest.raises(NotImplementedError, match=r"share memory.*Try"):
        x[0] = torch.zeros(4)
