"""The K tangents V, held as named blocks and never put together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from multitangent.tangents._block import Block
from multitangent.tangents._factored_block import FactoredBlock
from multitangent.tangents._observation import Needs
from multitangent.tangents._request import Request
from multitangent.tangents._rows_block import SMALL, DenseBlock, RedrawnBlock, RowsBlock, gram_of
from multitangent.tangents._source import TangentSource
from multitangent.tangents._stream import Stream


class Tangents:
    """V: K vectors whose blocks ``[K, 1 or b, *shape]`` are added site by site.

    Args:
        source: Where the tangents come from.
        stream: The random numbers of the step.
        store: Whether tangents are kept, or drawn again where they are needed.
        dtype: The type in which tangents are carried, by default the perturbed value's.

    Attributes:
        needs: What the source needs of this step.
        dtype: The type in which tangents are carried, ``None`` for the perturbed value's.

    Examples:
        >>> from multitangent.tangents import Normal
        >>> tangents = Tangents(Normal(2), Stream(0, 0))
        >>> block = tangents.add("hidden", torch.zeros(3))
        >>> tangents.gram().shape, tangents.dimension
        (torch.Size([2, 2]), 3)
        >>> tangents.combine(torch.ones(2))["hidden"].shape
        torch.Size([3])
    """

    def __init__(
        self,
        source: TangentSource,
        stream: Stream,
        *,
        store: bool = True,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.source = source
        self.stream = stream
        self._blocks: dict[str, Block] = {}
        # Asked once: a source may need the output of its first step only.
        self.needs = source.needs(stream.step)
        self._store = store
        self.dtype = dtype
        self._joined: Tensor | None = None  # the rows [K, n] of all small blocks

    @property
    def blocks(self) -> dict[str, Block]:
        """The blocks by the names of their sites."""
        return self._blocks

    def block(self, name: str) -> Block | None:
        """The block of a site, ``None`` if there is none."""
        return self._blocks.get(name)

    @property
    def num_tangents(self) -> int:
        """K."""
        return self.source.num_tangents

    @property
    def guesses(self) -> tuple[bool, ...]:
        """Which of the tangents are guesses of the gradient."""
        return self.source.guesses

    @property
    def dimension(self) -> int:
        """n: the number of perturbed scalars, per sample for activations."""
        return sum(block.dimension for block in self.blocks.values())

    def add(
        self,
        name: str,
        value: Tensor,
        shape: Sequence[int] | None = None,
        *,
        samples: Sequence[int] | None = None,
        target: Any = None,
        loss: Callable[[Any, Any], Tensor] | None = None,
    ) -> Block:
        """Add the block of one site.

        Args:
            name: The name of the site.
            value: What is perturbed. A source that needs it gets a copy: the model may write into
                it.
            shape: The shape of its tangents: of one sample for activations; by default the value's.
            samples: The samples that want tangents of their own, ``None`` to share one set.
            target: What the loss compares with, for sources that use it.
            loss: From outputs and target to the losses ``[b]``, for sources that use it.
        """
        kept = value.clone() if self.needs & Needs.PRIMAL else value
        request = Request(
            stream=self.stream,
            site=len(self.blocks),
            shape=tuple(value.shape if shape is None else shape),
            samples=samples,
            offset=self.dimension,
            dtype=value.dtype,
            device=value.device,
            name=name,
            value=kept,
            version=kept._version,
            target=target,
            loss=loss,
        )
        block = self.blocks[name] = self._block(request)
        return block

    def _block(self, request: Request) -> Block:
        if self.source.has_factors(request):
            return FactoredBlock(self.source, request, self.dtype, store=self._store)
        kind = DenseBlock if self._store else RedrawnBlock
        return kind(self.source, request, self.dtype)

    def with_output(self, output: Tensor, output_gradient: Tensor) -> None:
        """Add the model's output to what the source knows, before the first use of a block."""
        for block in self.blocks.values():
            block.with_output(output, output_gradient)

    def with_last_gradient(self, gradient: Tensor) -> None:
        """Add the gradient of the last perturbed value to that, before the first use of a block."""
        for block in self.blocks.values():
            block.with_last_gradient(gradient)

    def gram(self) -> Tensor:
        """``V V^T`` in float64, the sum over the blocks: ``[K, K]``, or ``[b, K, K]``."""
        small: list[Tensor] = []
        grams: list[Tensor] = []
        for block in self.blocks.values():
            if isinstance(block, RowsBlock) and block.is_small:
                if not block.is_stored and sum(map(torch.numel, small)) > SMALL:
                    grams.append(gram_of(torch.cat(small, 2)))  # memory is short
                    small.clear()
                small.append(block.flat_rows())
            else:
                grams.append(block.gram())
        if small:  # one product for many blocks
            joined = small[0] if len(small) == 1 else torch.cat(small, 2)
            grams.append(gram_of(joined))
            if len(small) == len(self.blocks) and self._can_join(joined.dtype):
                self._joined = joined[0]
        if not grams:  # nothing is perturbed
            return torch.zeros(self.num_tangents, self.num_tangents, dtype=torch.float64)
        total = grams[0] if len(grams) == 1 else sum(grams[1:], start=grams[0])
        return total[0] if len(total) == 1 else total

    def _can_join(self, dtype: torch.dtype) -> bool:
        """Whether all blocks are stored and their rows have the type of the gradients."""
        return all(
            block.is_stored and block.dtype is block.request.dtype is dtype
            for block in self.blocks.values()
        )

    def apply(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """``V g``: the directional derivatives ``[K, b]`` for gradients ``[b, *shape]`` by name."""
        jvps = [self.blocks[name].apply(gradient) for name, gradient in gradients.items()]
        return torch.stack(jvps).sum(0)

    def combine(self, coefficients: Tensor) -> dict[str, Tensor]:
        """``V^T c`` for coefficients ``[K, *losses]``, block by block: ``[*losses, *shape]``."""
        if self._joined is not None:
            return self._combined_at_once(self._joined, coefficients)
        columns = coefficients if coefficients.ndim > 1 else coefficients.unsqueeze(1)
        combined = {name: block.combine(columns) for name, block in self.blocks.items()}
        if coefficients.ndim > 1:
            return combined
        return {name: gradient[0] for name, gradient in combined.items()}

    def total(self, chosen: Sequence[int], losses: Sequence[int]) -> dict[str, Tensor]:
        """The sum of some tangents, for losses of that shape, block by block."""
        return {name: block.total(chosen, losses) for name, block in self.blocks.items()}

    def _combined_at_once(self, rows: Tensor, coefficients: Tensor) -> dict[str, Tensor]:
        """The same for small blocks, by one product for all of them."""
        losses = coefficients.shape[1:]
        weights = coefficients.to(rows.dtype).reshape(len(rows), -1)
        sizes = [block.dimension for block in self.blocks.values()]
        total = torch.split(weights.mT @ rows, sizes, 1)
        return {
            name: gradient.reshape((*losses, *block.request.shape))
            for (name, block), gradient in zip(self.blocks.items(), total, strict=True)
        }
