"""What a source of tangents is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from multitangent.tangents._stream import Stream


@dataclass(frozen=True)
class Request:
    """One block of tangents to be drawn: those of one site.

    Attributes:
        stream: Random numbers of the step.
        site: The count of the site in the sweep.
        shape: The shape of the perturbed value, of one sample for activations.
        samples: The samples that want tangents of their own, ``None`` to share one set.
        offset: How many perturbed scalars the sites before have.
        dtype: Of the perturbed value.
        device: Of the perturbed value.
        first: The number of tangents that other sources draw before this one.
        name: The name of the site.
        primal: The perturbed value, ``[b, *shape]`` for activations and ``[*shape]`` for weights.
        target: What the loss compares with, for activations.
        loss: From outputs and target to the losses ``[b]``.
        output: The model's output, ``[b, *output]``, where a source asked for it.
        output_gradient: The derivative of each sample's loss by it, of the same shape.
    """

    stream: Stream
    site: int
    shape: tuple[int, ...]
    samples: Sequence[int] | None
    offset: int
    dtype: torch.dtype
    device: torch.device
    first: int = 0
    name: str = ""
    primal: Tensor | None = None
    target: Any = None
    loss: Callable[[Any, Any], Tensor] | None = None
    output: Tensor | None = None
    output_gradient: Tensor | None = None

    @property
    def batch(self) -> int | None:
        """The number of samples, ``None`` where the perturbed value is not one of each sample."""
        if self.samples is not None:
            return len(self.samples)
        if self.primal is None or self.primal.ndim == len(self.shape):
            return None
        return len(self.primal)

    def take(self, samples: slice) -> Request:
        """The same for some of the samples."""
        if (count := self.batch) is None:
            return self

        def part(value: Any) -> Any:
            of_samples = isinstance(value, Tensor) and value.shape[:1] == (count,)
            return value[samples] if of_samples else value

        return replace(
            self,
            samples=None if self.samples is None else self.samples[samples],
            primal=part(self.primal),
            target=pytree.tree_map(part, self.target),
            output=part(self.output),
            output_gradient=part(self.output_gradient),
        )


@dataclass(frozen=True)
class Lesson:
    """What came of one step, for sources that learn.

    Attributes:
        requests: What was asked for at each site, by its name.
        tangents: V as it was drawn, ``[at most K, 1 or b, *shape]`` by site, where a source asked
            for the output; elsewhere empty.
        informed: Which of the K tangents are guesses.
        gradients: The forward gradient of each site's value, ``[b, *shape]``; for weights of the
            batch's loss, ``[1, *shape]``.
        output_tangents: The derivatives of the model's output along V, ``[K, b, *output]``, where
            a source asked for the output.
    """

    requests: Mapping[str, Request]
    tangents: Mapping[str, Tensor]
    informed: Sequence[bool]
    gradients: Mapping[str, Tensor]
    output_tangents: Tensor | None = None


_TOGETHER = 16  # rows at most that have a generator in common,
_SHORT = 4096  # and numbers at most


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
        ...         def fill(row, generator):
        ...             row.uniform_(-(3**0.5), 3**0.5, generator=generator)
        ...
        ...         return draw_independent(request, self.num_tangents, fill)
        >>> from multitangent import Mean, Normal, forward_gradient
        >>> source = Uniform(4) + Normal(2)
        >>> forward_gradient(torch.sum, torch.ones(3), source, Mean())[1].shape
        torch.Size([3])
    """

    num_tangents: int

    @abstractmethod
    def draw(self, request: Request) -> Tensor:
        """One block of V: ``[K, 1, *shape]``, or ``[K, b, *shape]`` where samples differ.

        Rows that are missing at the end are zero.
        """

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        """M for the Gram matrix ``V V^T`` ``[..., K, K]``; ``None`` is the identity.

        Args:
            gram: Gram matrix of what was drawn, in float64.
            dimension: n, the number of perturbed scalars.
        """
        return None

    @property
    def sources(self) -> tuple[TangentSource, ...]:
        """Those that this one is made of, none by default."""
        return ()

    @property
    def summands(self) -> tuple[TangentSource, ...]:
        """The terms of a sum of sources; of any other, itself."""
        return (self,)

    @property
    def informed(self) -> tuple[bool, ...]:
        """Which of the K tangents are guesses of the gradient rather than random directions."""
        if self.sources:
            return tuple(guess for source in self.sources for guess in source.informed)
        return (False,) * self.num_tangents

    @property
    def sees_output(self) -> bool:
        """Whether tangents depend on the model's output, which then is computed before them."""
        return any(source.sees_output for source in self.sources)

    def started(self) -> TangentSource:
        """What draws for one gradient: this object, or one with a memory if it is to learn."""
        return self

    @property
    def learns(self) -> bool:
        """Whether `learn` does anything."""
        return any(source.learns for source in self.sources)

    def learn(self, lesson: Lesson) -> None:
        """Take note of what came of a step."""
        for source in self.sources:
            source.learn(lesson)

    def state_dict(self) -> dict[str, Any]:
        """The memory, of tensors and plain values."""
        states = {str(i): source.state_dict() for i, source in enumerate(self.sources)}
        return {place: state for place, state in states.items() if state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with the memory that `state_dict` returned."""
        for place, source in enumerate(self.sources):
            source.load_state_dict(state.get(str(place), {}))

    def __add__(self, other: TangentSource) -> TangentSource:
        if not isinstance(other, TangentSource):
            return NotImplemented
        return _Together((*self.summands, *other.summands))


@dataclass(frozen=True, repr=False)
class _Together(TangentSource):
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

    def started(self) -> TangentSource:
        return _Together(tuple(source.started() for source in self.terms))

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.sources))

    def draw(self, request: Request) -> Tensor:
        blocks, first = [], request.first
        for source in self.sources:
            blocks.append(source.draw(replace(request, first=first)))
            first += source.num_tangents
        counts = [source.num_tangents for source in self.sources]
        counts[-1] = len(blocks[-1])  # only the last rows of all may be missing
        samples = max(block.shape[1] for block in blocks)
        return torch.cat(
            [_filled(block, n, samples) for block, n in zip(blocks, counts, strict=True)]
        )

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        mixed = torch.eye(self.num_tangents, dtype=gram.dtype, device=gram.device)
        mixed = mixed.expand_as(gram).clone()
        first = 0
        for source in self.sources:
            own = slice(first, first + source.num_tangents)
            matrix = source.mixing(gram[..., own, own], dimension)
            if matrix is not None:
                mixed[..., own, own] = matrix
            first = own.stop
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


def draw_independent(
    request: Request, num_tangents: int, fill: Callable[[Tensor, torch.Generator], object]
) -> Tensor:
    """A block of independent random rows.

    Row k of a shared block is a function of (seed, step, site, k) and of the size of the block's
    rows, whatever K is; the rows of a sample are one of (seed, step, site, sample).

    Args:
        request: The block.
        num_tangents: K.
        fill: Writes random numbers of a generator into a tensor.

    Returns:
        ``[K, 1, *shape]``, or ``[K, b, *shape]`` for b samples of their own.
    """
    stream, device = request.stream, request.device
    if request.samples is None:
        return _shared(request, num_tangents, fill).view(num_tangents, 1, *request.shape)
    own = _empty(request, len(request.samples), num_tangents, prod(request.shape))
    first = stream.key(request.site, "sample", request.first)
    for sample, rows in zip(request.samples, own.unbind(), strict=True):
        fill(rows, stream.generator(device, first + sample))
    return own.transpose(0, 1).reshape(num_tangents, len(request.samples), *request.shape)


def _shared(
    request: Request, num_tangents: int, fill: Callable[[Tensor, torch.Generator], object]
) -> Tensor:
    """Rows ``[K, n]``, of which short ones have a generator in common, always filled together."""
    size = prod(request.shape)
    together = max(1, min(_TOGETHER, _SHORT // max(size, 1)))
    first = request.first // together
    groups = range(first, -(-(request.first + num_tangents) // together))
    rows = _empty(request, len(groups), together * size)
    key = request.stream.key(request.site)
    for group, row in zip(groups, rows.unbind() if len(groups) > 1 else (rows[0],), strict=True):
        fill(row, request.stream.generator(request.device, key + group))
    start = request.first - first * together
    return rows.view(-1, size)[start : start + num_tangents]


def _empty(request: Request, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=request.dtype, device=request.device)
