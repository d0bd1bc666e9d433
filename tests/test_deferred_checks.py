"""Checks that a compiled step makes after the fact."""

from __future__ import annotations

import torch

from multitangent._deferred_checks import check, deferred_checks, tracing


def test_conditions_are_assumed_and_collected_block_by_block():
    false, true = torch.tensor(False), torch.tensor(True)
    assert not check(false)
    with deferred_checks() as outer:
        assert check(false)
        with deferred_checks() as inner:
            assert check(true) and check(false)
        assert check(true) and tracing()
    assert not tracing()
    assert [bool(c) for c in outer] == [False, True]
    assert [bool(c) for c in inner] == [True, False]
