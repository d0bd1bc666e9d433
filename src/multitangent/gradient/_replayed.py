"""How a graph gets its random numbers: they are drawn outside of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import reduce
from operator import add
from typing import Any

from torch import Tensor

from multitangent.tangents import Request, Stream, TangentSource


class RecordingStream(Stream):
    """A stream that records how each of its random tensors is drawn.

    Args:
        stream: The stream whose numbers it returns.
    """

    def __init__(self, stream: Stream) -> None:
        super().__init__(stream.seed, stream.step, stream.kind)
        self.draws: list[Callable[[Stream], Tensor]] = []

    def drawn(self, draw: Callable[[Stream], Tensor]) -> Tensor:
        self.draws.append(draw)
        return draw(
            Stream(self.seed, self.step, self.kind)
        )  # which does not record the draws inside


class ReplayedStream(Stream):
    """A stream whose random tensors are all drawn already.

    Args:
        stream: The stream that it replaces.
        values: The random tensors, in the order of the step.
    """

    def __init__(self, stream: Stream, values: Sequence[Tensor]) -> None:
        super().__init__(stream.seed, stream.step, stream.kind)
        self._values = iter(values)

    def drawn(self, draw: Callable[[Stream], Tensor]) -> Tensor:
        return next(self._values)


def drawn_outside(source: TangentSource, step: int) -> TangentSource:
    """The same source, in which summands that need nothing of the step are drawn as a whole."""
    terms = [
        term if term.needs(step) or any(term.guesses) else _DrawnOutside(term)
        for term in source.summands
    ]
    return reduce(add, terms)


class _DrawnOutside(TangentSource):
    """A source whose blocks count as random tensors of the stream, whatever draws them."""

    def __init__(self, source: TangentSource) -> None:
        self.source = source
        self.num_tangents = source.num_tangents

    def draw(self, request: Request) -> Tensor:
        plain = replace(request, value=None, target=None, loss=None)
        return request.stream.drawn(lambda stream: self.source.draw(replace(plain, stream=stream)))

    def has_factors(self, request: Request) -> bool:
        return self.source.has_factors(request)

    @property
    def mixes(self) -> bool:
        return self.source.mixes

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        return self.source.mixing(gram, dimension)

    def state_dict(self) -> dict[str, Any]:
        return self.source.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.source.load_state_dict(state)
