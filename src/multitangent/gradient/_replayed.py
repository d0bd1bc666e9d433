"""Sources that write down what they are asked for, and that answer from what was drawn before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from multitangent.tangents import Request, TangentSource


class RecordingSource(TangentSource):
    """A source that notes what it is asked for."""

    def __init__(self, source: TangentSource) -> None:
        self.source = source
        self.num_tangents = source.num_tangents
        self.requests: list[Request] = []

    def draw(self, request: Request) -> Tensor:
        self.requests.append(replace(request, value=None, target=None))
        return self.source.draw(request)

    def has_factors(self, request: Request) -> bool:
        if self.source.has_factors(request):
            raise NotImplementedError(f"tangents in factors, at {request.name!r}")
        return False


class ReplayedSource(TangentSource):
    """A source of tangents that are drawn already."""

    def __init__(self, source: TangentSource, blocks: Sequence[Tensor]) -> None:
        self.source = source
        self.num_tangents = source.num_tangents
        self._blocks = iter(blocks)

    def draw(self, request: Request) -> Tensor:
        return next(self._blocks)

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        return self.source.mixing(gram, dimension)
