"""Tangents that are computed only when they are needed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor


class Deferred(ABC):
    """What a dual tensor may hold in place of its tangents.

    Attributes:
        dtype: The type of the tangents.
        is_kept: Whether a dual tensor keeps what was computed.
    """

    __slots__ = ()
    is_kept: ClassVar[bool] = True

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype: ...

    @abstractmethod
    def computed(self) -> Tensor:
        """The tangents ``[K, *shape]``, axes of size 1 where they are constant."""


class OnUse(Deferred):
    """Tangents that are computed once, when somebody needs them.

    Args:
        compute: Returns the tangents.
        dtype: Their type.
    """

    __slots__ = ("_compute", "_dtype", "_result")

    def __init__(self, compute: Callable[[], Tensor], dtype: torch.dtype) -> None:
        self._compute = compute
        self._dtype = dtype
        self._result: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def computed(self) -> Tensor:
        if self._result is None:
            with torch.no_grad(), torch._C.DisableTorchFunction():
                self._result = self._compute()
        return self._result


class Drawn(Deferred):
    """Tangents that are drawn again at every use.

    Args:
        draw: Returns the tangents.
        dtype: Their type.
    """

    __slots__ = ("_draw", "_dtype")
    is_kept = False

    def __init__(self, draw: Callable[[], Tensor], dtype: torch.dtype) -> None:
        self._draw = draw
        self._dtype = dtype

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    def computed(self) -> Tensor:
        return self._draw()
