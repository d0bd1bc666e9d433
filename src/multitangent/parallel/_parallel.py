"""How a step is shared by the processes of a device mesh."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from multitangent.engine import Engine
from multitangent.objective import Batch
from multitangent.parallel._agreement import check_agreement
from multitangent.parallel._ranks import Ranks
from multitangent.parallel._tangent_parallel import TangentParallel, share
from multitangent.tangents import Stream

_AXES = ("tangent", "data")
_INTERVAL = 100  # steps between two comparisons of the ranks


class Parallel:
    """The processes of a mesh: what they share, and what they send.

    Args:
        mesh: The mesh, with axes ``"tangent"``, ``"data"`` or both; ``None`` for a single process.
    """

    def __init__(self, mesh: DeviceMesh | None) -> None:
        names = () if mesh is None else mesh.mesh_dim_names or ()
        if mesh is not None and not (names and set(names) <= set(_AXES)):
            raise ValueError(
                f"`mesh` should have axes of the names {list(_AXES)}. Found {list(names)}. Try "
                "`init_device_mesh('cpu', (2,), mesh_dim_names=('tangent',))`."
            )
        self._axes = {} if mesh is None else {name: Ranks(mesh, name) for name in names}
        self._is_checked = False

    def __bool__(self) -> bool:
        return bool(self._axes)

    @property
    def bytes_sent(self) -> int:
        """The bytes that this process has handed to collectives so far."""
        return sum(ranks.bytes_sent for ranks in self._axes.values())

    @property
    def splits_data(self) -> bool:
        """Whether every process has samples of its own."""
        return self._data is not None

    @property
    def _data(self) -> Ranks | None:
        return self._axes.get("data")

    def check(self, model: nn.Module, stream: Stream) -> None:
        """Compare the ranks, at the first step and in every hundredth.

        Raises:
            RuntimeError: If a rank holds other numbers.
        """
        if self._axes and (not self._is_checked or stream.step % _INTERVAL == 0):
            check_agreement(list(self._axes.values()), model, stream)
            self._is_checked = True

    def most_tangents(self, num_tangents: int) -> int:
        """How many of all tangents a rank pushes at most."""
        ranks = self._axes.get("tangent")
        return num_tangents if ranks is None else len(share(num_tangents, ranks.count, 0))

    def engine(self, engine: Engine) -> Engine:
        """The engine, which pushes this rank's tangents only."""
        ranks = self._axes.get("tangent")
        return engine if ranks is None else TangentParallel(engine, ranks)

    def share(self, batch: Batch, weight: float) -> tuple[Batch, float]:
        """This rank's samples as a part of those of all ranks, and the weight of all."""
        if self._data is None:
            return batch, weight
        own = torch.tensor([[batch.size, weight]], dtype=torch.float64)
        found = self._data.gather(own.to(batch.device), [1] * self._data.count).cpu()
        sizes = [int(size) for size in found[:, 0].tolist()]
        first, size = sum(sizes[: self._data.rank]), sum(sizes)
        part = replace(batch, rows=slice(first, first + batch.size), batch_size=size)
        return part, float(found[:, 1].sum())

    def reduce(self, gram: Tensor, jvps: Tensor) -> tuple[Tensor, Tensor]:
        """What was measured, of the samples of all ranks: derivatives of the batch's loss add up.

        Those of a sample's loss belong to the rank that has the sample.
        """
        of_batch = self._data is not None and jvps.ndim == 1
        return gram, self._data.sum(jvps) if of_batch and self._data is not None else jvps

    def total(self, loss: Tensor) -> Tensor:
        """The loss of all samples, from that of this rank's."""
        return loss if self._data is None else self._data.sum(loss)

    def gradients(
        self, gradients: Mapping[nn.Parameter, Tensor], *, per_sample: bool
    ) -> Mapping[nn.Parameter, Tensor]:
        """The gradients of the loss of all samples, from those of this rank's.

        Args:
            gradients: By parameter.
            per_sample: Whether they come from derivatives of each sample's loss. Gradients of the
                batch's loss are those of all samples already.
        """
        if self._data is None or not per_sample:
            return gradients
        return {parameter: self._data.sum(gradient) for parameter, gradient in gradients.items()}
