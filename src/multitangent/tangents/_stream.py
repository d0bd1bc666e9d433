"""Random numbers as a function of (seed, step, place): any of them can be drawn again."""

from __future__ import annotations

import hashlib

import torch


class Stream:
    """Seeded generators for every place of one step.

    Args:
        seed: The user's seed.
        step: The count of the step.
    """

    def __init__(self, seed: int, step: int) -> None:
        self.seed = seed
        self.step = step
        self._generators: dict[torch.device, torch.Generator] = {}

    def generator(self, device: torch.device, *place: int | str) -> torch.Generator:
        """The generator of a place, at its start; valid until the next call."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        text = repr((self.seed, self.step, *place)).encode()
        key = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
        # The generator of the CPU reads 32 bits, that of CUDA 64.
        return self._generators[device].manual_seed(key % (1 << 63))
