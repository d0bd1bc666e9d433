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

    Guesses should soon be useful, and they change most at the start. So the first m steps have all
    tangents, the next m steps every second time, the next m every third time, and so on up to every
    m-th step, after `settled` steps. The other steps learn nothing. They neither draw nor push
    random tangents, and they do not look at the model's responses. Such a step pushes the guesses
    only, or nothing at all with `WhenLearning` or `SumOfGuesses`.

    The guesses of the source come first among the tangents, wherever they stand in the source. Put
    `Every` last in a sum with other sources. Then the random tangents that most steps lack cost
    nothing.

    Args:
        period: m, the number of steps from one that learns to the next in the end; 1 learns in
            every step.
        inner: The source: guesses, and the random tangents from which they learn.

    Raises:
        ValueError: If `period` is not an integer of at least 1, or there are no guesses.

    Examples:
        >>> from multitangent import Feedback, Normal, OwnValue
        >>> source = Every(16, Normal(2) + Feedback(3) + OwnValue())
        >>> source.guesses
        (True, True, True, True, False, False)
        >>> [bool(source.init().needs(step) & Needs.UPDATE) for step in (0, 15, 16, 17, 18)]
        [True, True, True, False, True]
        >>> source.settled
        240
        >>> [step for step in range(2000, 2040) if source.learns(step)]
        [2000, 2016, 2032]
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
                "`inner` should have guesses, since most steps push nothing else. Found "
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
        """Whether the step with this count is one that learns."""
        distance = min(self.period, 1 + step // self.period)
        return step % distance == 0

    @property
    def settled(self) -> int:
        """The number of steps before those of which every m-th learns."""
        return self.period * (self.period - 1)

    def needs(self, step: int) -> Needs:
        if self.learns(step):
            return self._all.needs(step) | Needs.UPDATE  # marks the steps that learn
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

    @property
    def mixes(self) -> bool:
        return self._all.mixes

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        return self._all.mixing(gram, dimension)

    def update(self, observation: Observation) -> None:
        requests = list(observation.requests.values())
        if self.learns(requests[0].stream.step):  # another source may learn in every step
            self._all.update(observation)
