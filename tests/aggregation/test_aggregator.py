"""What every aggregator refuses."""

from __future__ import annotations

import pytest
import torch

from multitangent import ControlVariate, Projection
from multitangent.aggregation import Aggregator


@pytest.mark.parametrize(
    ("gram", "jvps", "message"),
    [
        (torch.eye(3), torch.ones(2), "of the same tangents and samples"),
        (torch.ones(4, 2, 2), torch.ones(2, 3), "of the same tangents and samples"),
        (torch.eye(2), torch.ones(()), "of the same tangents and samples"),
        (torch.eye(2), torch.tensor([1.0, float("nan")]), "`jvps` should be finite. Found 1 of 2"),
        (torch.eye(2) / 0, torch.ones(2), "`gram` should be finite"),
    ],
)
def test_what_does_not_fit_is_an_error(gram, jvps, message):
    with pytest.raises(ValueError, match=message):
        Projection()(gram, jvps)


def test_as_many_words_on_guesses_as_tangents():
    message = "`guesses` should say of each of the 2 tangents .* Found 3 values"
    with pytest.raises(ValueError, match=message):
        ControlVariate()(torch.eye(2), torch.ones(2), guesses=[True, False, False])


class Wrong(Aggregator):
    """Returns something else than coefficients."""

    def __init__(self, result):
        self.result = result

    def coefficients(self, measured):
        return self.result

    def __repr__(self):
        return "Wrong()"


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (
            torch.ones(3),
            r"`coefficients` of Wrong\(\) should return a tensor .*\[2\].* Found \[3\]",
        ),
        (None, "Found NoneType"),
        (torch.tensor([1.0, float("nan")]), "should be finite"),
    ],
)
def test_what_an_aggregator_of_ones_own_returns_is_checked(result, message):
    with pytest.raises(ValueError, match=message):
        Wrong(result)(torch.eye(2), torch.ones(2))
