"""Dropout inside a sweep: a right distribution, one mask for all tangents, rows of one batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multitangent.dual import DualTensor
from multitangent.objective import BatchMode


def part(start, stop, batch):
    def noise(call, shape, device):
        generator = torch.Generator(device).manual_seed(call)
        return torch.rand(shape, generator=generator, device=device)

    return BatchMode(noise, slice(start, stop), batch)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_zeroes_a_share_p_and_scales_the_rest(p):
    with part(0, 100, 100):
        out = F.dropout(torch.ones(100, 1000), p, training=True)
    assert abs(float((out == 0).float().mean()) - p) < 0.01
    torch.testing.assert_close(out[out != 0], torch.full_like(out[out != 0], 1 / (1 - p)))


def test_calls_differ_and_parts_are_rows_of_the_whole():
    x = torch.ones(6, 50)
    with part(0, 6, 6):
        first, second = F.dropout(x), F.dropout(x)
    with part(2, 4, 6):
        rows = F.dropout(x[2:4])
    assert not torch.equal(first, second)
    assert torch.equal(rows, first[2:4])


def test_all_tangents_of_a_sample_share_a_mask_with_the_primal():
    x = DualTensor(torch.ones(4, 30), torch.ones(3, 4, 30))
    with part(0, 4, 4):
        out = F.dropout(x, 0.5)
    assert torch.equal(out.tangents, out.primal.expand(3, 4, 30))


def test_channels_are_dropped_whole():
    with part(0, 8, 8):
        out = F.dropout2d(torch.ones(8, 20, 5, 5), 0.5)
    means = out.mean((2, 3))
    assert ((means == 0) | (means == 2)).all()
    assert 0.3 < (means == 0).float().mean() < 0.7


@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False)])
def test_dropout_may_do_nothing(p, training):
    x = torch.ones(4, 3)
    with part(0, 4, 4):
        assert F.dropout(x, p, training) is x
        assert (F.dropout(x, 1.0) == 0).all()


def test_dropout_in_place():
    x = torch.ones(4, 30)
    with part(0, 4, 4):
        assert F.dropout(x, 0.5, True, inplace=True) is x
    assert (x == 0).any()
