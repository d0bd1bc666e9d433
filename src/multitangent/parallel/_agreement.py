"""Whether all processes hold the same numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from multitangent.parallel._ranks import Ranks
from multitangent.tangents import IndependentRows, Stream

_DRAWN = 4096  # random numbers that are compared


def check_agreement(axes: Sequence[Ranks], model: nn.Module, stream: Stream) -> None:
    """Raise unless all ranks have the same parameters, buffers, seed, step and random numbers.

    Checksums of the bits are compared, three numbers a rank.

    Raises:
        RuntimeError: If a rank differs from the first one of an axis, whose name it says.
    """
    device = next(model.parameters()).device
    place = ("agreement",)
    rows = IndependentRows(stream, 0, (_DRAWN,), None, 0, torch.float32, device, place)
    drawn = rows.normal(1)
    sums = {
        "parameters": checksum(model.parameters()),
        "buffers": checksum(model.buffers()),
        "random numbers, seed or count of steps": checksum([drawn]),
    }
    for ranks in axes:
        _compare(ranks, {name: value.to(device) for name, value in sums.items()})


def _compare(ranks: Ranks, sums: Mapping[str, Tensor]) -> None:
    found = ranks.gather(torch.stack(list(sums.values())).unsqueeze(0), [1] * ranks.count)
    for name, of_ranks in zip(sums, found.T.tolist(), strict=True):
        if others := [rank for rank, value in enumerate(of_ranks) if value != of_ranks[0]]:
            raise RuntimeError(
                f"All ranks along {ranks.axis!r} should have the same {name}. Found others on "
                f"rank {', '.join(map(str, others))} than on rank 0. Try to begin with the same "
                "seed and checkpoint on every rank, and to change the model nowhere but in the "
                "optimiser's steps."
            )


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """The sum of the bits of tensors, read as whole numbers, each weighted by its tensor's place.

    Examples:
        >>> checksum([torch.ones(2)]) == checksum([torch.ones(3)])
        tensor(False)
    """
    total = torch.zeros((), dtype=torch.int64)
    for place, tensor in enumerate(tensors):
        bits = tensor.detach().reshape(-1).contiguous().view(torch.uint8)
        width = tensor.element_size()
        whole = bits.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(width, torch.int64))
        total = total + (2 * place + 1) * whole.sum(dtype=torch.int64).cpu()
    return total
