"""Ranks that differ, or are gone, end the run on all ranks."""

from __future__ import annotations

import pytest
import torch
from shared_steps import run_ranks, run_until_one_dies, run_with_faults

from multitangent.parallel import checksum, share


@pytest.fixture(scope="module")
def errors(tmp_path_factory):
    return run_ranks({"tangent": 2}, tmp_path_factory.mktemp("ranks"), run_with_faults)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("seed", "RuntimeError: All ranks along 'tangent' should have the same random numbers"),
        ("parameters", "RuntimeError: All ranks along 'tangent' should have the same parameters"),
        ("drift", "RuntimeError: All ranks along 'tangent' should have the same parameters"),
        ("few tangents", "ValueError: `tangents` should have one for every rank"),
        ("none", ""),
    ],
)
def test_all_ranks_say_what_differs(errors, fault, message):
    for of_rank in errors:
        assert of_rank[fault].startswith(message)
        assert bool(of_rank[fault]) == bool(message)


def test_a_rank_that_is_gone_ends_the_others(tmp_path):
    found = run_ranks({"tangent": 2}, tmp_path, run_until_one_dies)
    assert found[1] == {}
    assert found[0]["error"].startswith("RuntimeError")
    assert found[0]["seconds"] < 60


def test_a_checksum_sees_every_bit_and_every_place():
    values = (
        torch.randn(5),
        torch.randn(3, dtype=torch.float64),
        torch.arange(4),
        torch.tensor(True),
    )
    total = checksum(values)
    assert checksum([v.clone() for v in values]) == total
    assert checksum([*values[:2], values[2] + 1, values[3]]) != total
    changed = values[0].clone()
    changed.view(torch.int32)[2] ^= 1
    assert checksum([changed, *values[1:]]) != total
    assert checksum([torch.ones(2), torch.zeros(2)]) != checksum([torch.zeros(2), torch.ones(2)])


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_tangent_has_one_rank(count):
    shares = [share(11, count, rank) for rank in range(count)]
    assert [k for chosen in shares for k in chosen] == list(range(11))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
