"""The doctor, where the losses of tokens are measured."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from multitangent import Activations
from multitangent.diagnosis import doctor


class Mixed(nn.Module):
    def __init__(self, *, is_causal: bool) -> None:
        super().__init__()
        self.is_causal = is_causal
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = nn.functional.scaled_dot_product_attention(h, h, h, is_causal=self.is_causal)
        return self.last(h)


def of_tokens(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.mT, target, reduction="none")


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_model_should_be_causal(is_causal):
    batch = torch.randn(4, 6, 2), torch.randint(5, (4, 6))
    report = doctor(
        Mixed(is_causal=is_causal), batch, of_tokens, perturb=Activations(credit="token")
    )
    assert report.is_healthy == is_causal
    assert report.sites == {"first": 18, "last": 30}
    assert is_causal or "causal in time" in report.fault
