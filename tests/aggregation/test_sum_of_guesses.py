"""The guesses as they are."""

from __future__ import annotations

import math

import pytest
import torch

from multitangent.aggregation import SumOfGuesses


def test_guesses_count_once_and_others_not():
    gram, jvps = torch.eye(3), torch.randn(3, 4)
    coefficients = SumOfGuesses()(gram, jvps, guesses=[True, False, True])
    expected = torch.tensor([1.0, 0.0, 1.0]).double().unsqueeze(1).expand(3, 4)
    torch.testing.assert_close(coefficients, expected)


def test_derivatives_may_be_missing():
    jvps = torch.full((2, 3), math.nan)
    coefficients = SumOfGuesses()(torch.eye(2), jvps, guesses=[True, True])
    torch.testing.assert_close(coefficients, torch.ones(2, 3).double())


def test_a_gram_matrix_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="`gram` should be finite"):
        SumOfGuesses()(torch.full((1, 1), math.inf), torch.ones(1), guesses=[True])


def test_no_guess_is_refused():
    with pytest.raises(ValueError, match="should have guesses of the gradient among them"):
        SumOfGuesses()(torch.eye(2), torch.ones(2))
