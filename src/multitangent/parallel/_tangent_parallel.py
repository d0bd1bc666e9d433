"""Ranks that hold the same batch, and push some of the tangents each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from multitangent.engine import Derivatives, Engine, precision_of
from multitangent.parallel._ranks import Ranks
from multitangent.perturbation import Run
from multitangent.tangents import TangentRange, Tangents


@dataclass(frozen=True)
class TangentParallel:
    """Another engine, of which every rank runs a part: K / R tangents of R ranks.

    All ranks hold the same batch, and all know V, since tangents are a function of seed, step and
    site. Only directional derivatives are sent, ``[K]`` or ``[K, B]`` numbers, and those of the
    output where the source of the tangents learns from them. So every rank has what a single
    process would have.

    Args:
        inner: The engine.
        ranks: The processes.

    Raises:
        ValueError: When called, if there are fewer tangents than ranks.
    """

    inner: Engine
    ranks: Ranks

    @property
    def statistics(self) -> Literal["frozen", "coupled"]:
        return self.inner.statistics

    def precision(self, dtype: torch.dtype) -> float:
        """The relative precision of the derivatives."""
        precision = precision_of(self.inner, dtype)
        return torch.finfo(dtype).eps if precision is None else precision

    def __call__(self, run: Run, tangents: Tangents) -> Derivatives:
        if tangents.num_tangents < self.ranks.count:
            raise ValueError(
                "`tangents` should have one for every rank of the axis 'tangent' at least. Found "
                f"{tangents.num_tangents} for {self.ranks.count} ranks. Try more tangents or fewer "
                "ranks."
            )
        shares = [
            share(tangents.num_tangents, self.ranks.count, r) for r in range(self.ranks.count)
        ]
        counts = [len(chosen) for chosen in shares]
        own = self.inner(run, TangentRange(tangents, shares[self.ranks.rank]))
        if not tangents.blocks:  # nothing is perturbed
            zeros = own.losses.new_zeros(tangents.num_tangents, *own.losses.shape)
            return Derivatives(own.losses, zeros, None)
        outputs = own.output_tangents
        return Derivatives(
            own.losses,
            self.ranks.gather(own.jvps, counts),
            None if outputs is None else self.ranks.gather(outputs, counts),
        )


def share(num_tangents: int, count: int, rank: int) -> range:
    """The tangents of one of several ranks.

    Examples:
        >>> [share(5, 2, rank) for rank in (0, 1)]
        [range(0, 3), range(3, 5)]
    """
    each, rest = divmod(num_tangents, count)
    start = rank * each + min(rank, rest)
    return range(start, start + each + (rank < rest))
