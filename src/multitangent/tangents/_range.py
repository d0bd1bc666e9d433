"""Some of the tangents of a step, as an engine pushes them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual import Factored
from multitangent.tangents._block import Block
from multitangent.tangents._blocks import Tangents
from multitangent.tangents._factored_block import FactoredBlock


class TangentRange(Tangents):
    """Consecutive tangents out of V: the same blocks, with fewer rows.

    Blocks that a run adds to V are seen here too. Rows are drawn for all of V where they are kept,
    and alone where they are not.

    Args:
        whole: V.
        chosen: Which of its tangents.

    Examples:
        >>> from multitangent.tangents import Normal, Stream
        >>> whole = Tangents(Normal(4), Stream(0, 0))
        >>> some = TangentRange(whole, range(1, 3))
        >>> block = whole.add("hidden", torch.zeros(3))
        >>> torch.equal(some.blocks["hidden"].rows(), block.rows()[1:3])
        True
    """

    def __init__(self, whole: Tangents, chosen: range) -> None:
        super().__init__(whole.source, whole.stream, dtype=whole.dtype)
        self._whole = whole
        self._chosen = chosen

    @property
    def blocks(self) -> dict[str, Block]:
        return {name: self._part(block) for name, block in self._whole.blocks.items()}

    def block(self, name: str) -> Block | None:
        block = self._whole.block(name)
        return None if block is None else self._part(block)

    def _part(self, block: Block) -> Block:
        if isinstance(block, FactoredBlock):
            return _FactoredRange(block, self._chosen)
        return _BlockRange(block, self._chosen)

    @property
    def num_tangents(self) -> int:
        return len(self._chosen)

    @property
    def guesses(self) -> tuple[bool, ...]:
        return self._whole.guesses[self._chosen.start : self._chosen.stop]


class _BlockRange(Block):
    """Some rows of a block."""

    def __init__(self, whole: Block, chosen: range) -> None:
        super().__init__(whole.source, whole.request, whole.dtype)
        self.num_tangents = len(chosen)
        self.is_stored = whole.is_stored
        self.may_be_unused = whole.may_be_unused
        self._whole = whole
        self._chosen = chosen
        self._rows = slice(chosen.start, chosen.stop)

    def rows(self, samples: slice | None = None) -> Tensor:
        if self.is_stored:
            rows = self._whole.rows(samples)
            return (
                rows[self._rows] if len(rows) > self._chosen.start else torch.zeros_like(rows[:1])
            )
        drawn = [self._whole.row(k, samples) for k in self._chosen]
        there = [row for row in drawn if row is not None]
        return torch.stack(there) if there else torch.zeros_like(self._whole.rows(samples)[:1])

    def row(self, k: int, samples: slice | None = None) -> Tensor | None:
        return self._whole.row(self._chosen[k], samples) if k < len(self._chosen) else None

    def gram(self) -> Tensor:
        return self._whole.gram()[:, self._rows, self._rows]

    def apply(self, gradient: Tensor) -> Tensor:
        return self._whole.apply(gradient)[self._rows]

    def combine(self, coefficients: Tensor) -> Tensor:
        behind = self._whole.num_tangents - self._chosen.stop
        others = (0, 0) * (coefficients.ndim - 1)
        return self._whole.combine(F.pad(coefficients, (*others, self._chosen.start, behind)))


class _FactoredRange(FactoredBlock):
    """Some tangents of a block in factors."""

    def __init__(self, whole: FactoredBlock, chosen: range) -> None:
        super().__init__(whole.source, whole.request, whole.dtype, store=whole.is_stored)
        self.num_tangents = len(chosen)
        self._whole = whole
        self._chosen = chosen

    def factored(self) -> Factored:
        return self._whole.factored().take(self._chosen)
