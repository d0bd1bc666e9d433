"""Tangents: the sources they come from, and the blocks they are held in."""

from multitangent.tangents._balanced import Balanced
from multitangent.tangents._basis import StandardBasis
from multitangent.tangents._blocks import Block, Tangents
from multitangent.tangents._feedback import Feedback
from multitangent.tangents._local_loss import LocalLoss
from multitangent.tangents._mixed import Cone, Normalized, Orthogonal, Sphere
from multitangent.tangents._previous import Previous
from multitangent.tangents._radial import Radial
from multitangent.tangents._random import Normal, Rademacher
from multitangent.tangents._source import Lesson, Request, TangentSource, draw_independent
from multitangent.tangents._stream import Stream

__all__ = [
    "Balanced",
    "Block",
    "Cone",
    "Feedback",
    "Lesson",
    "LocalLoss",
    "Normal",
    "Normalized",
    "Orthogonal",
    "Previous",
    "Rademacher",
    "Radial",
    "Request",
    "Sphere",
    "StandardBasis",
    "Stream",
    "TangentSource",
    "Tangents",
    "draw_independent",
]
