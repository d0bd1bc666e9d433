"""Several processes take the steps that a single one takes."""

from __future__ import annotations

import pytest
import torch
from shared_steps import OF_DATA, OF_TANGENTS, run_ranks, trained

MESHES = [
    {"tangent": 2}, {"tangent": 4}, {"data": 2}, {"data": 4}, {"data": 2, "tangent": 2},
]  # fmt: skip


@pytest.fixture(scope="module", params=MESHES, ids=str)
def ranks(request, tmp_path_factory):
    return request.param, run_ranks(request.param, tmp_path_factory.mktemp("ranks"))


def test_they_are_those_of_a_single_process(ranks):
    shape, found = ranks
    cases = OF_DATA if "data" in shape else OF_TANGENTS
    for name, case in cases.items():
        expected = trained(case)
        for rank, of_rank in enumerate(found):
            assert not isinstance(of_rank.get(name), str), (name, rank, of_rank[name])
            for value, wanted in zip(of_rank[name], expected, strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9, msg=f"{name}")
