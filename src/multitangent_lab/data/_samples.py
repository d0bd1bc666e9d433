"""What all data sets have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, Self

import torch
from torch import Tensor

Loss = Callable[[Any, Tensor], Tensor]


class Samples(Protocol):
    """One part of a data set: `part[indices]` is the batch of the samples at `indices`, `[B]`."""

    @property
    def device(self) -> torch.device:
        """Where batches live."""

    def __len__(self) -> int:
        """How many samples there are."""

    def __getitem__(self, indices: Tensor, /) -> tuple[Tensor, Tensor]:
        """Inputs and targets, with the samples along the first axis."""

    def first(self, count: int) -> Self:
        """The first `count` samples, or all of them if there are fewer."""


class Data(Protocol):
    """A data set in three parts, and how a model's outputs are judged."""

    @property
    def train(self) -> Samples:
        """What to train on."""

    @property
    def validation(self) -> Samples:
        """What to choose by."""

    @property
    def test(self) -> Samples:
        """What to report."""

    @property
    def loss(self) -> Loss:
        """From outputs and targets to the loss: one number per sample, or their mean."""

    @property
    def has_classes(self) -> bool:
        """Whether a sample has one class as its target, so that answers are right or wrong."""

    @property
    def evaluation_batch(self) -> int | None:
        """Samples per batch of validation and test; `None`: as many as in training."""
