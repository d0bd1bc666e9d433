"""The tangents of a sequence, as the losses of its tokens see them."""

from __future__ import annotations

import pytest
import torch

from models_for_tests import DEVICE
from multitangent.tangents import (
    Normal,
    OwnValue,
    RunningMean,
    Stream,
    Tangents,
    TangentsInTime,
    TangentSource,
)

B, T, K = 20, 5, 4


def tangents(
    source: TangentSource, *, own: bool = False, store: bool = True, **options
) -> Tangents:
    found = Tangents(source.init(), Stream(0, 0), store=store, **options)
    for name, shape in (("a", (T, 3)), ("b", (T,)), ("c", (T, 2, 2))):
        value = torch.randn(B, *shape, device=DEVICE)
        found.add(name, value, shape, samples=range(B) if own else None)
    return found


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize(
    "source", [Normal(K), Normal(K - 1) + OwnValue(), Normal(K - 1) + RunningMean()], ids=repr
)
def test_the_last_token_sees_everything(source, own, store):
    whole = tangents(source, own=own, store=store)
    in_time = TangentsInTime(whole, T)
    assert in_time.dimension[-1] == whole.dimension
    torch.testing.assert_close(in_time.gram()[..., -1, :, :], whole.gram())
    last = torch.zeros(K, B, T, device=DEVICE, dtype=torch.float64)
    last[..., -1] = torch.randn(K, B, dtype=torch.float64).to(DEVICE)
    expected = whole.combine(last[..., -1])
    for name, found in in_time.combine(last).items():
        torch.testing.assert_close(found, expected[name])


@pytest.mark.parametrize("own", [True, False])
def test_the_first_token_sees_its_position_alone(own):
    in_time = TangentsInTime(tangents(Normal(K), own=own), T)
    assert in_time.dimension[0] == 3 + 1 + 4
    first = torch.zeros(K, B, T, device=DEVICE)
    first[..., 0] = 1.0
    for found in in_time.combine(first).values():
        assert found[:, 0].any()
        assert not found[:, 1:].any()


def test_missing_rows_are_zero():
    """The guess of the first site is the first row of more."""
    in_time = TangentsInTime(tangents(Normal(1) + OwnValue(3)), T)
    gram = in_time.gram()
    assert gram.shape == (B, T, K, K)
    combined = in_time.combine(torch.ones(K, B, T, device=DEVICE))
    assert combined["a"].shape == (B, T, 3)


def test_a_discount():
    whole = tangents(Normal(K))
    last = torch.zeros(K, B, T, device=DEVICE, dtype=torch.float64)
    last[..., -1] = 1.0
    full = TangentsInTime(whole, T).combine(last)["a"]
    found = TangentsInTime(whole, T, 0.5).combine(last)["a"]
    factors = torch.tensor([1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0], device=DEVICE)
    torch.testing.assert_close(found, full * factors[:, None])


def test_tangents_of_low_precision():
    in_time = TangentsInTime(tangents(Normal(K), dtype=torch.bfloat16), T)
    assert in_time.gram().dtype == torch.float64
    assert in_time.combine(torch.ones(K, B, T, device=DEVICE))["b"].dtype == torch.float32


def test_nothing_is_perturbed():
    in_time = TangentsInTime(Tangents(Normal(K), Stream(0, 0)), T)
    assert in_time.dimension == (0,) * T
    assert in_time.gram().shape == (T, K, K)
    assert in_time.combine(torch.ones(K, B, T)) == {}


def test_another_number_of_positions():
    with pytest.raises(ValueError, match=r"\[B, 6\]. Found shape \[20, 5, 3\] at 'a'"):
        TangentsInTime(tangents(Normal(K)), T + 1)
