"""Tangents with given lengths or angles, mixed from independent ones by their Gram matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from multitangent.dual import Factored
from multitangent.tangents._random import Normal
from multitangent.tangents._request import Request
from multitangent.tangents._source import TangentSource, check_count


def _lengths(gram: Tensor) -> Tensor:
    return gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()


def _inverse(x: Tensor) -> Tensor:
    """1 / x, and 0 where x is 0: a zero tangent stays zero."""
    return torch.where(x > 0, 1 / torch.where(x > 0, x, torch.ones_like(x)), torch.zeros_like(x))


@dataclass(frozen=True)
class Normalized(TangentSource):
    """The tangents of another source at unit length: ``w = v / |v|`` (Section IV-A).

    Args:
        inner: Where the tangents come from.

    Examples:
        >>> Normalized(Normal(4))
        Normalized(inner=Normal(num_tangents=4))
    """

    inner: TangentSource
    num_tangents: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_tangents", self.inner.num_tangents)

    @property
    def sources(self) -> tuple[TangentSource, ...]:
        return (self.inner,)

    def init(self) -> TangentSource:
        return Normalized(self.inner.init())

    def draw(self, request: Request) -> Tensor:
        return self.inner.draw(request)

    def has_factors(self, request: Request) -> bool:
        return self.inner.has_factors(request)

    def draw_factors(self, request: Request) -> Factored:
        return self.inner.draw_factors(request)

    def draw_one(self, request: Request, k: int) -> Tensor:
        return self.inner.draw_one(request, k)

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        mixed = self.inner.mixing(gram, dimension)
        if mixed is None:
            return torch.diag_embed(_inverse(_lengths(gram)))
        return _inverse(_lengths(mixed @ gram @ mixed.mT)).unsqueeze(-1) * mixed


class _MixedNormal(TangentSource):
    """Sources that draw normal tangents, and differ in how they mix them."""

    def __post_init__(self) -> None:
        check_count(self.num_tangents)

    def draw(self, request: Request) -> Tensor:
        return Normal(self.num_tangents).draw(request)

    def draw_one(self, request: Request, k: int) -> Tensor:
        return Normal(self.num_tangents).draw_one(request, k)


@dataclass(frozen=True)
class Sphere(_MixedNormal):
    """K independent tangents, uniform on the sphere of radius sqrt(n).

    They have the directions of normal tangents without the spread of their lengths; the radius
    keeps the mean forward gradient unbiased (Property 1).

    Args:
        num_tangents: K, the number of tangents.

    Raises:
        ValueError: If `num_tangents` is not an integer of at least 1.

    Examples:
        >>> Sphere(16)
        Sphere(num_tangents=16)
    """

    num_tangents: int

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        return torch.diag_embed(_inverse(_lengths(gram)) * math.sqrt(dimension))


@dataclass(frozen=True)
class Orthogonal(_MixedNormal):
    """K orthogonal tangents of length sqrt(n), their span uniformly distributed.

    ``W = sqrt(n) G^(-1/2) V`` for normal V: then ``W W^T = n I``, and the mean of the forward
    gradients is n/K times their projection. With K > n they cannot be orthogonal;
    ``W = sqrt(K) G^(-1/2) V``, with the pseudoinverse, has ``W^T W = K I`` and an exact mean.

    Args:
        num_tangents: K, the number of tangents.

    Raises:
        ValueError: If `num_tangents` is not an integer of at least 1.

    Examples:
        >>> Orthogonal(16)
        Orthogonal(num_tangents=16)
    """

    num_tangents: int

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        values, vectors = torch.linalg.eigh(gram)
        smallest = self.num_tangents * torch.finfo(gram.dtype).eps * values[..., -1:]
        roots = torch.where(values > smallest, values, torch.zeros_like(values)).sqrt()
        scale = math.sqrt(max(dimension, self.num_tangents))
        return scale * (vectors * _inverse(roots).unsqueeze(-2)) @ vectors.mT


@dataclass(frozen=True)
class Cone(_MixedNormal):
    """One tangent drawn freely, every other at a fixed angle to it (Section IV-C).

    Each other tangent is a normal one, turned in the plane that it spans with the first until the
    angle between the two is the given one; its length stays.

    Args:
        num_tangents: K, the number of tangents.
        angle: The angle in degrees, more than 0 and at most 90.

    Raises:
        ValueError: If `num_tangents` is not an integer of at least 1, or the angle is outside its
            range.

    Examples:
        >>> Cone(16, angle=30.0)
        Cone(num_tangents=16, angle=30.0)
    """

    num_tangents: int
    angle: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.angle <= 90:
            raise ValueError(
                f"`angle` should be in degrees, above 0 and at most 90. Found {self.angle!r}."
            )

    def mixing(self, gram: Tensor, dimension: int) -> Tensor | None:
        lengths = _lengths(gram)
        first = lengths[..., :1]
        components = gram[..., 0, :] * _inverse(first)  # the part of each tangent along the first
        across = (lengths.square() - components.square()).clamp(min=0).sqrt()
        turn = math.sin(math.radians(self.angle)) * lengths * _inverse(across)
        keep = math.cos(math.radians(self.angle)) * lengths - turn * components
        mixed = torch.diag_embed(turn)
        mixed[..., :, 0] += keep * _inverse(first)
        mixed[..., 0, :] = 0
        mixed[..., 0, 0] = 1
        return mixed
