"""What an aggregator is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from multitangent._conditions import NonFiniteError, holds


@dataclass(frozen=True)
class Measured:
    """What one sweep tells about the gradient, in the form that aggregators compute on.

    Attributes:
        gram: ``V V^T``, float64 ``[1 or B, K, K]``.
        jvps: ``V grad f``, float64 ``[B, K]``.
        dimension: n, the number of perturbed scalars.
        precision: The relative precision of the directional derivatives as they were computed.
        informed: Which of the tangents are guesses of the gradient.
    """

    gram: Tensor
    jvps: Tensor
    dimension: int | None
    precision: float
    informed: tuple[bool, ...]

    def take(self, indices: list[int]) -> Measured:
        """The same of some of the tangents."""
        return replace(
            self,
            gram=self.gram[:, indices][:, :, indices],
            jvps=self.jvps[:, indices],
            informed=tuple(self.informed[k] for k in indices),
        )


class Aggregator(ABC):
    """Turns K directional derivatives into the coefficients of a gradient ``g = V^T c``.

    Aggregators see two small tensors, and never the tangents or the model. All algebra runs in
    float64. One of your own defines `_coefficients`, which gets what was `Measured` with the
    samples first, whatever the shapes it was called with.

    Examples:
        The forward gradients of tangents at unit length, added up:

        >>> class SumOfUnit(Aggregator):
        ...     def _coefficients(self, measured):  # [B, K]
        ...         return measured.jvps / measured.gram.diagonal(dim1=-2, dim2=-1)
        >>> SumOfUnit()(2 * torch.eye(2), torch.tensor([3.0, 4.0]))
        tensor([1.5000, 2.0000], dtype=torch.float64)
    """

    def __call__(
        self,
        gram: Tensor,
        jvps: Tensor,
        *,
        dimension: int | None = None,
        informed: Sequence[bool] | None = None,
    ) -> Tensor:
        """The coefficients c.

        Args:
            gram: The Gram matrix ``V V^T`` of the tangents, ``[K, K]``, or ``[B, K, K]`` where
                each sample has tangents of its own.
            jvps: The directional derivatives ``V grad f``, ``[K]`` or ``[K, B]``.
            dimension: n, the number of perturbed scalars, which `Rescaled` needs; `Projection`
                takes it for a bound of the rank of `gram`.
            informed: Which of the tangents are guesses of the gradient, none by default;
                `ControlVariate` treats them apart.

        Returns:
            The coefficients in float64, of the shape of `jvps`.

        Raises:
            ValueError: If the shapes do not fit each other or a value is not finite.
        """
        _check(gram, jvps)
        guesses = (False,) * len(jvps) if informed is None else tuple(informed)
        if len(guesses) != len(jvps):
            raise ValueError(
                f"`informed` should say of each of the {len(jvps)} tangents whether it is a guess. "
                f"Found {len(guesses)} values."
            )
        measured = Measured(
            gram=gram.double().reshape(-1, *gram.shape[-2:]),
            jvps=jvps.double().reshape(jvps.shape[0], -1).T,
            dimension=dimension,
            precision=torch.finfo(jvps.dtype).eps,
            informed=guesses,
        )
        return self._coefficients(measured).T.reshape(jvps.shape)

    @abstractmethod
    def _coefficients(self, measured: Measured) -> Tensor:
        """The coefficients ``[B, K]``."""

    def expected_squared_norm(self, num_tangents: int, dimension: int) -> float:
        """``E |g|^2 / |grad f|^2`` for independent normal tangents.

        Args:
            num_tangents: K.
            dimension: n.

        Raises:
            NotImplementedError: If there is no closed form.
        """
        raise self._no_closed_form()

    def expected_alignment(self, num_tangents: int, dimension: int) -> float:
        """``E[g . grad f] / |grad f|^2`` for independent normal tangents.

        Args:
            num_tangents: K.
            dimension: n.

        Raises:
            NotImplementedError: If there is no closed form.
        """
        raise self._no_closed_form()

    def _no_closed_form(self) -> NotImplementedError:
        return NotImplementedError(
            "`aggregator` should be one whose expected length is known in closed form. "
            f"Found {self!r}. Try Sum, Mean or Projection."
        )


def _check(gram: Tensor, jvps: Tensor) -> None:
    count = jvps.shape[0] if jvps.ndim else 0
    samples = jvps.shape[1] if jvps.ndim == 2 else 1
    shapes = ([count, count], [samples, count, count])
    if jvps.ndim not in (1, 2) or list(gram.shape) not in shapes:
        raise ValueError(
            "`gram` should have the shape [K, K] or [B, K, K] and `jvps` [K] or [K, B], of the "
            f"same tangents and samples. Found {list(gram.shape)} and {list(jvps.shape)}."
        )
    for name, value in (("gram", gram), ("jvps", jvps)):
        if not holds(value.isfinite().all()):
            raise NonFiniteError(
                f"`{name}` should be finite. Found {int((~value.isfinite()).sum())} of "
                f"{value.numel()} values that are infinite or not a number. Try a lower learning "
                "rate, or look for the layer whose output is not finite."
            )
