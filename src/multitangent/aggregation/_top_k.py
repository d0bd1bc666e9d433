"""Only the tangents that point along the gradient best."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from multitangent.aggregation._aggregator import Aggregator, Measured


@dataclass(frozen=True)
class TopK(Aggregator):
    """``c = d`` for the m tangents of largest ``|cos| = |d| / |v|``, else 0.

    The choice depends on the directional derivatives, so it is not linear in them: with weight
    perturbation it is made once for the loss of the batch, with activity perturbation per sample.

    Args:
        num_kept: m; all tangents if there are fewer.

    Raises:
        ValueError: If `num_kept` is not an integer of at least 1.

    Examples:
        >>> TopK(1)(torch.eye(2), torch.tensor([3.0, -4.0]))
        tensor([ 0., -4.], dtype=torch.float64)
    """

    num_kept: int

    def __post_init__(self) -> None:
        if not isinstance(self.num_kept, int) or self.num_kept < 1:
            raise ValueError(
                f"`num_kept` should be an integer of at least 1. Found {self.num_kept!r}."
            )

    def coefficients(self, measured: Measured) -> Tensor:
        lengths = measured.gram.diagonal(dim1=-2, dim2=-1).sqrt()
        alignment = torch.where(lengths > 0, measured.jvps.abs() / lengths, 0.0)
        chosen = alignment.topk(min(self.num_kept, alignment.shape[-1])).indices
        return torch.zeros_like(measured.jvps).scatter(-1, chosen, measured.jvps.gather(-1, chosen))
