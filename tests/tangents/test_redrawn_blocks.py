"""Tangents that are drawn again: one alone, and a few of many at a time."""

from __future__ import annotations

import pytest
import torch
from source_laws import TABLE

from multitangent import Normal
from multitangent.tangents import Stream, Tangents, _rows_block
from multitangent.tangents._basis import StandardBasis

SOURCES = [*TABLE, StandardBasis(9) + Normal(2)]


def block_of(source, *, store, samples=None, shape=(3, 4)):
    tangents = Tangents(source, Stream(3, 1), store=store)
    tangents.add("before", torch.zeros(5, dtype=torch.float64))
    return tangents.add("site", torch.zeros(shape, dtype=torch.float64), samples=samples)


@pytest.mark.parametrize("source", SOURCES, ids=repr)
@pytest.mark.parametrize("samples", [None, range(4)])
@pytest.mark.parametrize("store", [True, False])
def test_one_tangent_is_a_row_of_all(source, samples, store):
    rows = block_of(source, store=True, samples=samples).rows()
    block = block_of(source, store=store, samples=samples)
    for k in range(source.num_tangents):
        assert torch.equal(block.row(k).expand_as(rows[k]), rows[k])
    if samples is not None:
        some = block_of(source, store=True, samples=samples).rows(slice(1, 3))
        assert torch.equal(block.row(0, slice(1, 3)).expand_as(some[0]), some[0])


def test_one_long_tangent_is_drawn_without_the_others():
    class Counting(Normal):
        drawn = 0

        def draw(self, request):
            Counting.drawn += 1
            return super().draw(request)

    block = block_of(Counting(4) + Normal(2), store=False, shape=(5000,))
    assert block.row(2).shape == (1, 5000)
    assert Counting.drawn == 0


@pytest.mark.parametrize("source", SOURCES, ids=repr)
@pytest.mark.parametrize("numbers", [1, 16, 25])
def test_a_few_tangents_at_a_time_give_what_all_give(source, numbers, monkeypatch):
    expected = block_of(source, store=True)
    columns = torch.arange(1.0, source.num_tangents + 1, dtype=torch.float64).unsqueeze(1)
    monkeypatch.setattr(_rows_block, "_LARGE", numbers)
    block = block_of(source, store=False)
    torch.testing.assert_close(block.gram(), expected.gram(), rtol=1e-14, atol=1e-14)
    found = block.combine(columns)
    torch.testing.assert_close(found, expected.combine(columns), rtol=1e-14, atol=1e-13)
