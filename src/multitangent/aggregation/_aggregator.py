"""What an aggregator is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from multitangent._deferred_checks import are_finite
from multitangent._errors import NonFiniteError


@dataclass(frozen=True)
class Measured:
    """What one sweep tells about the gradient, in the form that aggregators compute on.

    Attributes:
        gram: ``V V^T``, float64 ``[*samples, K, K]``, where `samples` broadcasts against `losses`.
        jvps: ``V grad f``, float64 ``[*losses, K]``, for all losses that are differentiated.
        dimension: n, the number of perturbed scalars.
        precision: The relative precision of the directional derivatives as they were computed.
        guesses: Which of the tangents are guesses of the gradient.
    """

    gram: Tensor
    jvps: Tensor
    dimension: int | None
    precision: float
    guesses: tuple[bool, ...]

    def take(self, indices: list[int]) -> Measured:
        """The same of some of the tangents."""
        return replace(
            self,
            gram=self.gram[..., indices, :][..., indices],
            jvps=self.jvps[..., indices],
            guesses=tuple(self.guesses[k] for k in indices),
        )


class Aggregator(ABC):
    """Turns K directional derivatives into the coefficients of a gradient ``g = V^T c``.

    Aggregators see two small tensors, and never the tangents or the model. All algebra runs in
    float64. One of your own defines `coefficients`, which gets what was `Measured` with the
    tangents last.

    Attributes:
        needs_derivatives: Whether the coefficients depend on directional derivatives. If not, these
            may be missing, which is not a number.

    Examples:
        The forward gradients of tangents at unit length, added up:

        >>> class SumOfUnit(Aggregator):
        ...     def coefficients(self, measured):  # [*losses, K]
        ...         return measured.jvps / measured.gram.diagonal(dim1=-2, dim2=-1)
        >>> SumOfUnit()(2 * torch.eye(2), torch.tensor([3.0, 4.0]))
        tensor([1.5000, 2.0000], dtype=torch.float64)
    """

    needs_derivatives: ClassVar[bool] = True

    def of_step(self, learns: bool) -> Aggregator:
        """The aggregator of one step, by default this one.

        Args:
            learns: Whether the source learns from the step.
        """
        return self

    def __call__(
        self,
        gram: Tensor,
        jvps: Tensor,
        *,
        dimension: int | None = None,
        guesses: Sequence[bool] | None = None,
        precision: float | None = None,
    ) -> Tensor:
        """The coefficients c.

        Args:
            gram: The Gram matrix ``V V^T`` of the tangents, ``[K, K]``, or ``[B, K, K]`` where
                each sample has tangents of its own; in general ``[*samples, K, K]``, where
                `samples` broadcasts against `losses`.
            jvps: The directional derivatives ``V grad f``: ``[K]`` of one loss, ``[K, B]`` of the
                samples' losses; in general ``[K, *losses]``.
            dimension: n, the number of perturbed scalars, which `Rescaled` needs; `Projection`
                takes it for a bound of the rank of `gram`.
            guesses: Which of the tangents are guesses of the gradient, none by default;
                `ControlVariate` treats them apart.
            precision: The relative precision of `jvps`, by default that of their type.

        Returns:
            The coefficients in float64, of the shape of `jvps`.

        Raises:
            ValueError: If the shapes do not fit each other or a value is not finite.
        """
        _check_shapes(gram, jvps)
        flags = (False,) * len(jvps) if guesses is None else tuple(guesses)
        if len(flags) != len(jvps):
            raise ValueError(
                f"`guesses` should say of each of the {len(jvps)} tangents whether it is one. "
                f"Found {len(flags)} values."
            )
        measured = Measured(
            gram=gram.double(),
            jvps=jvps.double().movedim(0, -1),
            dimension=dimension,
            precision=torch.finfo(jvps.dtype).eps if precision is None else precision,
            guesses=flags,
        )
        if not are_finite(measured.gram, *[measured.jvps] * self.needs_derivatives):
            raise _not_finite(gram, jvps)
        coefficients = self.coefficients(measured)
        self._check_result(coefficients, measured)
        return coefficients.movedim(-1, 0)

    def _check_result(self, coefficients: Tensor, measured: Measured) -> None:
        if not isinstance(coefficients, Tensor) or coefficients.shape != measured.jvps.shape:
            kind = type(coefficients).__name__
            shape = list(coefficients.shape) if isinstance(coefficients, Tensor) else kind
            raise ValueError(
                f"`coefficients` of {self!r} should return a tensor of the shape "
                f"{list(measured.jvps.shape)}, that of `measured.jvps`. Found {shape}."
            )
        if not are_finite(coefficients):
            raise NonFiniteError(
                f"`coefficients` of {self!r} should be finite. Found values that are infinite or "
                "not a number, for a Gram matrix and directional derivatives that are finite. Try "
                "to see what it does with zero and parallel tangents."
            )

    @abstractmethod
    def coefficients(self, measured: Measured) -> Tensor:
        """The coefficients ``[*losses, K]`` for what was measured: the method to define."""

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


def _check_shapes(gram: Tensor, jvps: Tensor) -> None:
    if jvps.ndim == 0 or not _fits(gram, jvps):
        raise ValueError(
            "`gram` should have the shape [K, K] or [B, K, K] and `jvps` [K] or [K, B], of the "
            f"same tangents and samples. Found {list(gram.shape)} and {list(jvps.shape)}."
        )


def _not_finite(gram: Tensor, jvps: Tensor) -> NonFiniteError:
    name, value = ("jvps", jvps) if gram.isfinite().all() else ("gram", gram)
    return NonFiniteError(
        f"`{name}` should be finite. Found {int((~value.isfinite()).sum())} of "
        f"{value.numel()} values that are infinite or not a number. Try a lower learning "
        "rate, or look for the layer whose output is not finite."
    )


def _fits(gram: Tensor, jvps: Tensor) -> bool:
    count, *values = jvps.shape
    *samples, rows, columns = gram.shape if gram.ndim >= 2 else (0, 0)
    aligned = values[len(values) - len(samples) :] if len(samples) <= len(values) else None
    fits = aligned is not None and all(
        extent in (1, size) for extent, size in zip(samples, aligned, strict=True)
    )
    return fits and rows == columns == count
