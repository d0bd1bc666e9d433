"""Tangents along the coordinates."""

from __future__ import annotations

import torch
from source_laws import drawn

from multitangent.tangents import (
    StandardBasis,
)


def test_standard_basis_counts_the_sites_one_after_another():
    rows = drawn(StandardBasis(4), ((1,), (2,), (3,)))[0]
    torch.testing.assert_close(rows, torch.eye(6, dtype=torch.float64)[:4])
    torch.testing.assert_close(drawn(StandardBasis(3), ((2,),))[0], torch.eye(3).double()[:, :2])
