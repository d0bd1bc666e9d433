"""Tangents: the sources they come from, and the blocks they are held in."""

from multitangent.tangents._basis import StandardBasis
from multitangent.tangents._blocks import Block, Tangents
from multitangent.tangents._mixed import Cone, Normalized, Orthogonal, Sphere
from multitangent.tangents._random import Normal, Rademacher
from multitangent.tangents._source import Request, TangentSource, draw_independent
from multitangent.tangents._stream import Stream

__all__ = [
    "Block",
    "Cone",
    "Normal",
    "Normalized",
    "Orthogonal",
    "Rademacher",
    "Request",
    "Sphere",
    "StandardBasis",
    "Stream",
    "TangentSource",
    "Tangents",
    "draw_independent",
]
