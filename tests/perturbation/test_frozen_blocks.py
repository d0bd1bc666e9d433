"""Frozen blocks between trained places keep no graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from models_for_tests import relative_error
from multitangent import ForwardGradient, Normal, Projection

DEPTH, WIDTH, LOSS = 12, 8, nn.MSELoss()


class Block(nn.Sequential):
    """A block that adds to its input, as those of a transformer do."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Deep(nn.Module):
    """An embedding, blocks in a list, and a head."""

    def __init__(self, depth: int, embedding: bool, trained: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 1)
        self.blocks[: depth - trained].requires_grad_(False)
        self.embedding.requires_grad_(embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(5, (4, 3)), torch.randn(4, 3, 1)


@pytest.mark.parametrize(
    ("embedding", "trained", "sites"),
    [
        (True, 2, ["blocks.0", "blocks.4", "blocks.5"]),
        (False, 2, ["blocks.4", "blocks.5"]),
        (True, 6, [f"blocks.{i}" for i in range(6)]),
        (True, 1, ["embedding", "blocks.5.0", "blocks.5.2", "head"]),
    ],
)
def test_which_blocks_are_sites(embedding: bool, trained: int, sites: list[str]) -> None:
    gradient = ForwardGradient(Deep(6, embedding, trained), LOSS, Normal(1))
    gradient(*batch())
    assert list(gradient.sites) == sites


def saved_bytes(depth: int) -> int:
    """The bytes of all tensors that autograd keeps in a step."""
    gradient = ForwardGradient(Deep(depth, True, 2), LOSS, Normal(1), verify=False)
    inputs, target = batch()
    gradient(inputs, target)
    saved = []

    def keep(value: Tensor) -> Tensor:
        saved.append(value.nbytes)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        gradient(inputs, target)
    return sum(saved)


def test_more_frozen_blocks_keep_no_more_tensors() -> None:
    assert saved_bytes(DEPTH) == saved_bytes(4) > 0


def test_as_many_tangents_as_dimensions_give_backpropagation() -> None:
    torch.manual_seed(0)
    model = Deep(6, True, 2).double()
    inputs, target = batch()
    target = target.double()
    LOSS(model(inputs), target).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = [p.grad.clone() for p in trained]
    model.zero_grad()
    ForwardGradient(model, LOSS, Normal(3 * 3 * WIDTH + 20), Projection())(inputs, target)
    assert relative_error([p.grad for p in trained], expected) < 1e-8
