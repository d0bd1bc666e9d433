"""Sources without a state, and their tangents."""

from __future__ import annotations

import torch

from multitangent import Normal, Rademacher
from multitangent.tangents import (
    Cone,
    LowRank,
    Normalized,
    Orthogonal,
    Sphere,
    StandardBasis,
    Stream,
    Tangents,
)

RANDOM = [Normal, Rademacher, Sphere, Orthogonal, LowRank]


TABLE = [
    Normal(4), Rademacher(4), Sphere(4), Orthogonal(4), StandardBasis(4), Cone(4, 60.0),
    LowRank(4), LowRank(4, rank=2), Normalized(LowRank(3)), LowRank(2) + Normal(2) + LowRank(1),
    Normalized(Normal(4)), Normalized(Cone(3, 20.0)), Normal(2) + Rademacher(3) + Sphere(1),
]  # fmt: skip


def drawn(source, shapes=((64,),), *, seed=0, step=0, samples=None, dtype=torch.float64):
    """All tangents of a source over some sites: ``[b, K, n]``."""
    tangents = Tangents(source, Stream(seed, step))
    for site, shape in enumerate(shapes):
        tangents.add(str(site), torch.zeros(shape, dtype=dtype), samples=samples)
    blocks = [block.rows().flatten(2) for block in tangents.blocks.values()]
    rows = torch.cat(blocks, 2).transpose(0, 1)
    mixing = source.mixing(tangents.gram(), tangents.dimension)
    return rows if mixing is None else mixing.to(dtype) @ rows
