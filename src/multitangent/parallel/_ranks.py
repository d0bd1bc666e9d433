"""The processes along one axis of a device mesh, and what they send to each other."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


class Ranks:
    """The processes along one axis of a device mesh.

    Every rank calls the same methods in the same order.

    Args:
        mesh: The mesh.
        axis: The name of the axis.

    Attributes:
        axis: That name.
        count: How many processes there are.
        rank: Which of them this one is.
        bytes_sent: How many bytes this process has handed to collectives.
    """

    def __init__(self, mesh: DeviceMesh, axis: str) -> None:
        self.axis = axis
        self._group = mesh.get_group(axis)
        self.count: int = mesh.size((mesh.mesh_dim_names or ()).index(axis))
        self.rank: int = mesh.get_local_rank(axis)
        self.bytes_sent = 0

    def gather(self, value: Tensor, counts: list[int]) -> Tensor:
        """The values of all ranks, one behind the other along the first axis.

        Args:
            value: That of this rank, ``[counts[rank], *rest]``.
            counts: The length of the first axis on every rank.
        """
        longest = max(counts)
        own = value.detach().contiguous()
        if len(own) < longest:  # collectives want equal shapes
            own = torch.cat([own, own.new_zeros(longest - len(own), *own.shape[1:])])
        found = [torch.empty_like(own) for _ in counts]
        self._count(own)
        dist.all_gather(found, own, group=self._group)
        return torch.cat([part[:count] for part, count in zip(found, counts, strict=True)])

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all ranks."""
        total = value.detach().clone(memory_format=torch.contiguous_format)
        self._count(total)
        dist.all_reduce(total, group=self._group)
        return total

    def _count(self, value: Tensor) -> None:
        self.bytes_sent += value.numel() * value.element_size()
