"""Tangents of weights that are products of two thin random factors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod

from torch import Tensor

from multitangent.dual import Factored, Factors
from multitangent.tangents._request import Request
from multitangent.tangents._source import TangentSource, check_count


@dataclass(frozen=True)
class LowRank(TangentSource):
    """K independent tangents of low rank for every matrix of weights, with ``perturb="weights"``.

    A parameter of shape ``[m, *rest]`` is a matrix of m rows and ``n = prod(rest)`` columns. Its
    tangents are ``U_k W_k^T / sqrt(rank)``, with ``U_k [m, rank]`` and ``W_k [n, rank]`` of
    independent standard normal entries. Then ``E[v v^T] = I``, and the mean forward gradient is
    unbiased. Only factors are drawn, kept and pushed, through linear layers, products of matrices,
    embeddings and convolutions: ``K rank (m + n)`` numbers in place of ``K m n``. Any other
    function of the weights multiplies the factors first.

    All else gets the tangents of `Normal`: activations, vectors such as biases, and matrices so
    small that factors are no fewer numbers.

    The price is variance. For one matrix with the gradient g, ``E|(v.g) v|^2`` is
    ``|g|^2 (m n + 2 + 2 (m + n + 1) / rank)``, for normal tangents ``|g|^2 (m n + 2)``. Of rank one
    that is ``(1 + 2/m) (1 + 2/n)`` times as much, but for a term of the order 1/(m n)
    (docs/design.md has the derivation).

    Args:
        num_tangents: K, the number of tangents.
        rank: The rank of the tangents of a matrix.
        share: ``"batch"``: all samples share the tangents, the only choice so far.

    Raises:
        ValueError: If `num_tangents` or `rank` is not an integer of at least 1, or `share` is
            anything else.

    Examples:
        >>> import torch
        >>> from multitangent import ForwardGradient
        >>> model = torch.nn.Linear(100, 50)
        >>> gradient = ForwardGradient(model, torch.nn.MSELoss(), LowRank(8), perturb="weights")
        >>> value = gradient(torch.randn(4, 100), torch.zeros(4, 50))
        >>> model.weight.grad.shape
        torch.Size([50, 100])
    """

    num_tangents: int
    rank: int = 1
    share: str = "batch"

    def __post_init__(self) -> None:
        check_count(self.num_tangents)
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"`rank` should be an integer of at least 1. Found {self.rank!r}.")
        if self.share != "batch":
            raise ValueError(
                "`share` should be 'batch': all samples share the tangents of the weights. Found "
                f"{self.share!r}. Try more tangents, or `Activations(share='sample')`."
            )

    def has_factors(self, request: Request) -> bool:
        if not request.is_weight or len(request.shape) < 2:
            return False
        rows, columns = request.shape[0], prod(request.shape[1:])
        return self.rank * (rows + columns) < rows * columns

    def draw(self, request: Request) -> Tensor:
        if self.has_factors(request):
            return self.draw_factors(request).computed().unsqueeze(1)
        return request.random.normal(self.num_tangents)

    def draw_factors(self, request: Request) -> Factored:
        if not self.has_factors(request):
            return super().draw_factors(request)
        rows, *rest = request.shape
        sizes = [rows * self.rank, prod(rest) * self.rank]
        random = replace(request.random, shape=(sum(sizes),), place=("factors", self.rank))
        numbers = random.normal(self.num_tangents).squeeze(1)
        left = numbers[:, : sizes[0]].reshape(-1, rows, self.rank) * self.rank**-0.5
        right = numbers[:, sizes[0] :].reshape(-1, self.rank, *rest)
        return Factored([Factors(left, right)])
