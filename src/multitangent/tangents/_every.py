"""Guesses that are learned in some steps, and only used in the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from operator import add

from torch import Tensor

from multitangent.dual import Factored
from multitangent.tangents._observation import Needs, Observation
from multitangent.tangents._request import Request
from multitangent.tangents._source import TangentSource


@dataclass(frozen=True)
class Every(TangentSource):
    """All tangents of a source in every m-th step, and its guesses alone in the others.

    In the first m steps it has all of them, so that guesses are soon of use. In the steps between
    those that learn nothing is learned: random tangents are neither drawn nor pushed, and the
    model's responses to them are not looked at. Such a step carries the guesses alone, or nothing
    at all with `SumOfGuesses`.

    The guesses of the source come first among the tangents, whatever their place in it. In a sum
    with other sources it should be the last: the random tangents that are missing in most steps
    then cost nothing.

    Args:
        period: m, from one step that learns to the next; 1 learns in all.
        inner: The source: guesses, and random tangents from which they learn.

    Raises:
        ValueError: If `period` is not an integer of at least 1, or there are no guesses.

    Examples:
        >>> from multitangent import Feedback, Normal, OwnValue
        >>> source = Every(16, Normal(2) + Feedback(3) + OwnValue())
        >>> source.guesses
        (True, True, True, True, False, False)
        >>> [bool(source.init().needs(step) & Needs.UPDATE) for step in (0, 15, 16, 17, 32)]
        [True, True, True, False, True]
    """

    period: int
    inner: TangentSource
    num_tangents: int = field(init=False, repr=False)
    _all: TangentSource = field(init=False, repr=False, compare=False)
    _alone: TangentSource = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.period, int) or self.period < 1:
            raise ValueError(
                f"`period` should be an integer of at least 1. Found {self.period!r}. Try 4."
            )
        if not any(all(term.guesses) for term in self.inner.summands):
            raise ValueError(
                "`inner` should have guesses, which the steps between push alone. Found "
                f"{self.inner!r}. Try `Every({self.period}, {self.inner!r} + Feedback())`."
            )
        alone = [term for term in self.inner.summands if all(term.guesses)]
        others = [term for term in self.inner.summands if not all(term.guesses)]
        object.__setattr__(self, "num_tangents", self.inner.num_tangents)
        object.__setattr__(self, "_alone", reduce(add, alone))
        object.__setattr__(self, "_all", reduce(add, [*alone, *others]))

    @property
    def sources(self) -> tuple[TangentSource, ...]:
        return (self._all,)

    @property
    def parts(self) -> tuple[TangentSource, ...]:
        return self._all.parts

    def init(self) -> TangentSource:
        return Every(self.period, self.inner.init())

    def learns(self, step: int) -> bool:
        """Whether a step is one of those that learn, by its count."""
        return step < self.period or step % self.period == 0

    def needs(self, step: int) -> Needs:
        if self.learns(step):
            return self._all.needs(step) | Needs.UPDATE  # by which the two kinds of steps differ
        return self._alone.needs(step) & ~(Needs.OUTPUT_TANGENTS | Needs.UPDATE)

    def _drawn(self, request: Request) -> TangentSource:
        return self._all if self.learns(request.stream.step) else self._alone

    def draw(self, request: Request) -> Tensor:
        return self._drawn(request).draw(request)

    def draw_one(self, request: Request, k: int) -> Tensor:
        return self._drawn(request).draw(request)[k : k + 1]

    def has_factors(self, request: Request) -> bool:
        return self._drawn(request).has_factors(request)

    def draw_factors(self, request: Request) -> Factored:
        return self._drawn(request).draw_factors(request)

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        return self._all.mixing(gram, dimension)

    def update(self, observation: Observation) -> None:
        requests = list(observation.requests.values())
        if self.learns(requests[0].stream.step):  # another source may learn in every step
            self._all.update(observation)
