"""Small models of sequences, and what compares their gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models_for_tests import DEVICE

B, T, WIDTH, CLASSES = 4, 4, 3, 5
SIZE = T * (2 * WIDTH + CLASSES)  # n


class Causal(nn.Module):
    """A running mean over time between layers within tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + torch.tanh(self.second(self.mixed(h)))
        return self.last(self.mixed(torch.tanh(h)))

    def mixed(self, h: Tensor) -> Tensor:
        counts = torch.arange(1, h.shape[1] + 1, device=h.device)[:, None]
        return h.cumsum(1) / counts


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(2, WIDTH, batch_first=True)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)[0])


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(DEVICE, torch.float64)


def batch(size: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, T, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (size, T), generator=generator)
    return x.to(DEVICE), y.to(DEVICE)


def gradients_of(model: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return grads


def true_gradients(model: nn.Module, value: Tensor) -> list[Tensor]:
    value.backward()
    return gradients_of(model)


def assert_close(found: list[Tensor], expected: list[Tensor], atol: float = 1e-9) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def of_logits(output: Tensor, target: Tensor) -> Tensor:
    """The losses ``[B, T]`` of logits ``[B, T, classes]``."""
    return nn.functional.cross_entropy(output.mT, target, reduction="none")
