"""A source with other random numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from multitangent.dual import Factored
from multitangent.tangents import Needs, Request, Stream, TangentSource


class RedrawnSource(TangentSource):
    """A source that takes its random numbers from a stream of its own. All else stays the same.

    So several estimates of one step differ in their tangents, but not in the masks of dropout.

    Args:
        source: The source.
        stream: Its random numbers.

    Attributes:
        is_random: Whether the source has asked for a random number so far.
    """

    def __init__(self, source: TangentSource, stream: Stream) -> None:
        self.source = source
        self.num_tangents = source.num_tangents
        self._stream = _NotedStream(stream.seed, stream.step, stream.kind)

    @property
    def is_random(self) -> bool:
        return self._stream.is_used

    @property
    def guesses(self) -> tuple[bool, ...]:
        return self.source.guesses

    def needs(self, step: int) -> Needs:
        return self.source.needs(step)

    def has_factors(self, request: Request) -> bool:
        return self.source.has_factors(request)

    def draw(self, request: Request) -> Tensor:
        with self._redrawn(request) as here:
            return self.source.draw(here)

    def draw_factors(self, request: Request) -> Factored:
        with self._redrawn(request) as here:
            return self.source.draw_factors(here)

    def draw_one(self, request: Request, k: int) -> Tensor:
        with self._redrawn(request) as here:
            return self.source.draw_one(here, k)

    @property
    def mixes(self) -> bool:
        return self.source.mixes

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        return self.source.mixing(gram, dimension)

    @contextmanager
    def _redrawn(self, request: Request) -> Iterator[Request]:
        """The same request, with other random numbers.

        Raises:
            ValueError: If the source takes random numbers from elsewhere.
        """
        before = _states(request.device)
        yield replace(request, stream=self._stream)
        pairs = zip(before, _states(request.device), strict=True)
        if any(not torch.equal(*pair) for pair in pairs):
            raise ValueError(
                "`tangents` should take random numbers from `request.random`, so that estimates of "
                f"one step differ. Found that {self.source!r} uses torch's own generator, at "
                f"{request.name!r}. Try `request.random.normal(K)`, or repeats=1."
            )


def _states(device: torch.device) -> list[Tensor]:
    """The states of torch's own generators."""
    of_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *of_device]


class _NotedStream(Stream):
    """A stream that records whether it was used."""

    is_used = False

    def fold_in(self, *place: int | str) -> int:
        self.is_used = True
        return super().fold_in(*place)

    def generator(self, device: torch.device, key: int) -> torch.Generator:
        self.is_used = True
        return super().generator(device, key)
