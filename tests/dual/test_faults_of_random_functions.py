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


OTHER = torch.tensor([[0.0, 0.0], [0.4, 0.6]], dtype=DTYPE)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.hypot(x, 0 * OTHER),
        lambda x: torch.hypot(0 * OTHER, x),
        lambda x: F.kl_div(OTHER, x, reduction="none"),
    ],
    ids=["hypot", "hypot of zero", "kl_div"],
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


def test_no_tangents_are_shuffled_too() -> None:
    x = DualTensor(torch.ones(2, 2, 4, 4), torch.ones(0, 2, 2, 4, 4))
    assert full_tangents(F.pixel_unshuffle(x, 2)).shape == (0, 2, 8, 2, 2)


def test_a_write_into_numbers_that_share_memory_is_refused() -> None:
    x = DualTensor(torch.ones(4), torch.ones(2, 4)).expand(2, 4)
    with pytest.raises(NotImplementedError, match=r"share memory.*Try"):
        x[0] = torch.zeros(4)
