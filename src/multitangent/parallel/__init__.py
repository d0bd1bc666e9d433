"""Steps that several processes share."""

from multitangent.parallel._agreement import check_agreement, checksum
from multitangent.parallel._parallel import Parallel
from multitangent.parallel._ranks import Ranks
from multitangent.parallel._tangent_parallel import TangentParallel, share

__all__ = ["Parallel", "Ranks", "TangentParallel", "check_agreement", "checksum", "share"]
