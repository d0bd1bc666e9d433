"""Settings of all tests."""

import os
import warnings

import pytest
import torch

from multitangent.dual import FallbackWarning

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models are built from configurations

torch.set_num_threads(1)  # the tensors are tiny, and the tests may share the machine


@pytest.fixture(autouse=True)
def _fallbacks_are_allowed():
    """Falling back is slow, not wrong; tests that are about it ask for the warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield
