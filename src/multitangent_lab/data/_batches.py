"""A split, batch by batch, in an order that can be had again."""

import hashlib
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from multitangent_lab._errors import DataError
from multitangent_lab.data._samples import Samples


@dataclass(eq=False)
class Batches:
    """Iterates over a split in batches of `(inputs, targets)`.

    The order is a function of `(seed, epoch)` and nothing else, so a run resumed at an epoch sees
    the batches it would have seen. The epoch is 0 until `set_epoch` is called: iterating again
    gives the same order again.

    Args:
        split: The samples.
        batch_size: Samples per batch; the last batch has what is left.
        shuffle: Whether to draw a new order every epoch, rather than keep that of the split.
        seed: The seed of the order.
        drop_last: Whether to leave out a last batch that is not full.

    Raises:
        DataError: `batch_size` is less than one, or `drop_last` would leave no batch.

    Examples:
        >>> from multitangent_lab.data import Batches, load_dataset
        >>> train = load_dataset("digits").train
        >>> batches = Batches(train, 64, shuffle=True, seed=0)
        >>> len(batches)
        18
        >>> for epoch in range(2):
        ...     batches.set_epoch(epoch)
        ...     for images, labels in batches:
        ...         pass
        >>> images.shape, labels.shape
        (torch.Size([62, 1, 8, 8]), torch.Size([62]))
    """

    split: Samples
    batch_size: int
    _: KW_ONLY
    shuffle: bool
    seed: int
    drop_last: bool = False
    _epoch: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise DataError(
                f"`batch_size` should be at least 1. Found {self.batch_size}. "
                f"Try batch_size={min(64, max(1, len(self.split)))}."
            )
        if self.drop_last and self.batch_size > len(self.split):
            raise DataError(
                f"`batch_size` should be at most the {len(self.split)} samples of the split, as "
                f"drop_last leaves out what does not fill a batch. Found {self.batch_size}. "
                "Try a smaller one, or drop_last=False."
            )

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration; without effect unless `shuffle`."""
        self._epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(len(self.split), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._order()
        for batch in range(len(self)):
            indices = order[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.split[indices]

    def _order(self) -> Tensor:
        count, device = len(self.split), self.split.device
        if not self.shuffle:
            return torch.arange(count, device=device)
        # Drawn on the CPU, so the order does not depend on the device.
        digest = hashlib.blake2b(f"{self.seed} {self._epoch}".encode(), digest_size=8).digest()
        generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "big"))
        return torch.randperm(count, generator=generator, device="cpu").to(device)
