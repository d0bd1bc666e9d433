"""Tangents: the sources they come from, and the blocks they are held in."""

from multitangent.tangents._basis import StandardBasis
from multitangent.tangents._block import Block
from multitangent.tangents._blocks import Tangents
from multitangent.tangents._every import Every
from multitangent.tangents._factored_block import FactoredBlock
from multitangent.tangents._feedback import Feedback
from multitangent.tangents._guesses import GuessSource, StatefulSource, guess_block
from multitangent.tangents._homogeneous import Homogeneous
from multitangent.tangents._in_time import TangentsInTime
from multitangent.tangents._independent import IndependentRows
from multitangent.tangents._local_loss import LocalLoss
from multitangent.tangents._low_rank import LowRank
from multitangent.tangents._mixed import Cone, Normalized, Orthogonal, Sphere
from multitangent.tangents._observation import Needs, Observation
from multitangent.tangents._own_value import OwnValue
from multitangent.tangents._random import Normal, Rademacher
from multitangent.tangents._range import TangentRange
from multitangent.tangents._request import Request
from multitangent.tangents._residual import Residual
from multitangent.tangents._rows_block import DenseBlock, RedrawnBlock
from multitangent.tangents._running_mean import RunningMean
from multitangent.tangents._scaled_by_rms import ScaledByRMS
from multitangent.tangents._source import TangentSource
from multitangent.tangents._stream import Stream

__all__ = [
    "Block",
    "Cone",
    "DenseBlock",
    "Every",
    "FactoredBlock",
    "Feedback",
    "GuessSource",
    "Homogeneous",
    "IndependentRows",
    "LocalLoss",
    "LowRank",
    "Needs",
    "Normal",
    "Normalized",
    "Observation",
    "Orthogonal",
    "OwnValue",
    "Rademacher",
    "RedrawnBlock",
    "Request",
    "Residual",
    "RunningMean",
    "ScaledByRMS",
    "Sphere",
    "StandardBasis",
    "StatefulSource",
    "Stream",
    "TangentRange",
    "TangentSource",
    "Tangents",
    "TangentsInTime",
    "guess_block",
]
