"""Random numbers as a function of (seed, step, place): any of them can be drawn again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor


class Stream:
    """Seeded generators for every place of one step.

    Args:
        seed: The user's seed.
        step: The count of the step.
        kind: Where tangents and masks come from: ``"torch"``, PyTorch's generators, or
            ``"philox"``, whose bits are the same on every device.
    """

    def __init__(self, seed: int, step: int, kind: Literal["torch", "philox"] = "torch") -> None:
        self.seed = seed
        self.step = step
        self.kind = kind
        self._generators: dict[torch.device, torch.Generator] = {}

    def drawn(self, draw: Callable[[Stream], Tensor]) -> Tensor:
        """Random numbers, as a function of a stream.

        All tangents and masks of a step come through here, so that a compiled step can draw them
        outside of its graph.

        Args:
            draw: A function that draws them from a stream, and keeps no tensor.
        """
        return draw(self)

    def fold_in(self, *place: int | str) -> int:
        """The seed of a place; those that follow it are free for the rows of a block."""
        text = repr((self.seed, self.step, *place)).encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1

    def generator(self, device: torch.device, key: int) -> torch.Generator:
        """The generator with a seed, at its start; valid until the next call.

        The generator of the CPU reads 32 bits of the seed, that of CUDA 64.
        """
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(key)
