"""What a source of tangents is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from multitangent.dual import Factored, Part
from multitangent.tangents._observation import Needs, Observation
from multitangent.tangents._request import Request


class TangentSource(ABC):
    """Where tangents come from. Sources add up: ``Normal(12) + Rademacher(4)``.

    A source draws the K tangents block by block, as the sweep reaches each site, and may then mix
    them: the vectors it stands for are ``M V``, with V what was drawn and M a ``[K, K]`` matrix
    that may depend on the Gram matrix of V. All that concerns whole vectors, such as their length
    or the angles between them, is said by M: no block has to know another, and only V is pushed.

    Attributes:
        num_tangents: K, the number of tangents.

    Examples:
        Tangents with uniform entries of variance 1:

        >>> class Uniform(TangentSource):
        ...     def __init__(self, num_tangents):
        ...         self.num_tangents = num_tangents
        ...
        ...     def draw(self, request):
        ...         return (request.random.uniform(self.num_tangents) - 0.5) * 12**0.5
        >>> from multitangent import Mean, Normal, forward_gradient
        >>> source = Uniform(4) + Normal(2)
        >>> forward_gradient(torch.sum, torch.ones(3), source, Mean())[1].shape
        torch.Size([3])
    """

    num_tangents: int

    @abstractmethod
    def draw(self, request: Request) -> Tensor:
        """One block of V: ``[K, 1, *shape]``, or ``[K, b, *shape]`` where samples differ.

        Rows that are missing at the end are zero. It changes nothing: a block may be drawn several
        times, or for a step that is not taken.
        """

    def has_factors(self, request: Request) -> bool:
        """Whether a block is taken from `draw_factors`, not from `draw`.

        It is asked before the model has run: `request.output` is not known yet.
        """
        return False

    def draw_factors(self, request: Request) -> Factored:
        """One block of V that samples share, without an axis for them: some of it in factors."""
        return Factored([self.draw(request).squeeze(1)])

    def draw_one(self, request: Request, k: int) -> Tensor:
        """Row k of what `draw` returns, ``[1, 1 or b, *shape]``, or no row where it is missing.

        A source that can draws no other row for it: a run with one tangent then holds one.
        """
        return self.draw(request)[k : k + 1]

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        """M for the Gram matrix ``V V^T`` ``[..., K, K]``; ``None`` is the identity.

        Args:
            gram: Gram matrix of what was drawn, in float64.
            dimension: n, the number of perturbed scalars.
        """
        return None

    @property
    def mixes(self) -> bool:
        """Whether `mixing` may return a matrix."""
        return type(self).mixing is not TangentSource.mixing

    @property
    def sources(self) -> tuple[TangentSource, ...]:
        """Those that this one is made of, none by default."""
        return ()

    @property
    def summands(self) -> tuple[TangentSource, ...]:
        """The terms of a sum of sources; of any other, itself."""
        return (self,)

    @property
    def parts(self) -> tuple[TangentSource, ...]:
        """The sources whose tangents this one joins, in order; for most, the source itself."""
        return (self,)

    @property
    def guesses(self) -> tuple[bool, ...]:
        """Which of the K tangents are guesses of the gradient rather than random directions."""
        if self.sources:
            return tuple(guess for source in self.sources for guess in source.guesses)
        return (False,) * self.num_tangents

    @property
    def has_length(self) -> bool:
        """Whether its guesses are as long as the gradient, rather than directions only."""
        return all(source.has_length for source in self.sources)

    def needs(self, step: int) -> Needs:
        """What the source needs of one step.

        Args:
            step: The count of the step.
        """
        return reduce(or_, (source.needs(step) for source in self.sources), Needs.NOTHING)

    def init(self) -> TangentSource:
        """What draws for one gradient: this object, or one with a state of its own."""
        return self

    def update(self, observation: Observation) -> None:
        """Take note of what came of a step.

        A step that fails later puts back what `state_dict` returned before: replace the tensors of
        the state rather than write into them.
        """
        for source in self.sources:
            source.update(observation)

    def state_dict(self) -> dict[str, Any]:
        """The state, of tensors and plain values."""
        states = {str(i): source.state_dict() for i, source in enumerate(self.sources)}
        return {place: state for place, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the state that `state_dict` returned."""
        for place, source in enumerate(self.sources):
            source.load_state_dict(state.get(str(place), {}))

    def __add__(self, other: TangentSource) -> TangentSource:
        if not isinstance(other, TangentSource):
            return NotImplemented
        return _SumOfSources((*self.summands, *other.summands))


@dataclass(frozen=True, repr=False)
class _SumOfSources(TangentSource):
    """The tangents of several sources, one after the other."""

    terms: tuple[TangentSource, ...]
    num_tangents: int = field(init=False)

    def __post_init__(self) -> None:
        total = sum(source.num_tangents for source in self.sources)
        object.__setattr__(self, "num_tangents", total)

    @property
    def sources(self) -> tuple[TangentSource, ...]:
        return self.terms

    @property
    def summands(self) -> tuple[TangentSource, ...]:
        return self.terms

    @property
    def parts(self) -> tuple[TangentSource, ...]:
        return tuple(part for term in self.terms for part in term.parts)

    def init(self) -> TangentSource:
        return _SumOfSources(tuple(source.init() for source in self.terms))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.sources))

    def draw(self, request: Request) -> Tensor:
        blocks = [source.draw(here) for source, here in self._requests(request)]
        counts = [source.num_tangents for source in self.sources]
        counts[-1] = len(blocks[-1])  # only the last rows of all may be missing
        samples = max(block.shape[1] for block in blocks)
        return torch.cat(
            [_filled(block, n, samples) for block, n in zip(blocks, counts, strict=True)]
        )

    def has_factors(self, request: Request) -> bool:
        return any(source.has_factors(request) for source in self.sources)

    def draw_factors(self, request: Request) -> Factored:
        parts: list[Part] = []
        missing = 0
        for source, here in self._requests(request):
            if missing:  # only the last rows of all may be missing
                zero = torch.zeros((), dtype=request.dtype, device=request.device)
                parts.append(zero.expand(missing, *request.shape))
            drawn = source.draw_factors(here)
            parts += drawn.parts
            missing = source.num_tangents - len(drawn)
        return Factored(parts)

    def _requests(self, request: Request) -> Iterator[tuple[TangentSource, Request]]:
        """The sources, each with what it is asked for."""
        first = request.first
        for source in self.sources:
            yield source, replace(request, first=first)
            first += source.num_tangents

    def draw_one(self, request: Request, k: int) -> Tensor:
        first = 0
        for source in self.sources:
            if k < first + source.num_tangents:
                return source.draw_one(replace(request, first=request.first + first), k - first)
            first += source.num_tangents
        return self.draw(request)[k:]

    @property
    def mixes(self) -> bool:
        return any(source.mixes for source in self.sources)

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        found: list[tuple[slice, Tensor]] = []
        first = 0
        for source in self.sources:
            block = slice(first, first + source.num_tangents)
            matrix = source.mixing(gram[..., block, block], dimension)
            if matrix is not None:
                found.append((block, matrix))
            first = block.stop
        if not found:
            return None
        mixed = torch.eye(self.num_tangents, dtype=gram.dtype, device=gram.device)
        mixed = mixed.expand_as(gram).clone()
        for block, matrix in found:
            mixed[..., block, block] = matrix
        return mixed


def _filled(block: Tensor, count: int, samples: int) -> Tensor:
    """A block ``[k, 1 or b, *shape]`` as ``[count, samples, *shape]``."""
    missing = count - len(block)
    if missing:
        block = torch.cat([block, block.new_zeros(missing, *block.shape[1:])])
    return block.expand(-1, samples, *[-1] * (block.ndim - 2))


def check_count(num_tangents: int) -> None:
    """Raise unless there is at least one tangent."""
    if not isinstance(num_tangents, int) or num_tangents < 1:
        raise ValueError(
            f"`num_tangents` should be an integer of at least 1. Found {num_tangents!r}."
        )
