"""Parameters that a model writes into while it runs, to be put back where nothing may stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from multitangent.dual import primal


@contextmanager
def kept_parameters(model: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Put back the parameters that a model writes into while it runs, such as at its first batch.

    Yields a list that holds those parameters at the end. Embeddings that are normalised where they
    are looked up are put back too, but do not count: a second time changes nothing.
    """
    guard = _ParameterGuard()
    written: list[nn.Parameter] = []
    try:
        with guard:
            yield written
    finally:
        for parameter, value in guard.copies.values():
            if parameter.data_ptr() != value[0] or not torch.equal(parameter.detach(), value[1]):
                written.append(parameter)
                parameter.data = value[2]
                with torch.no_grad():
                    parameter.copy_(value[1])
        for weight, before in guard.looked_up.values():
            weight.copy_(before)


class _ParameterGuard(TorchFunctionMode):
    """Copies parameters before they may be written into."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, tuple[nn.Parameter, tuple[int, Tensor, Tensor]]] = {}
        self.looked_up: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if args and (parameter := _written(func, args[0])) is not None:
            data = parameter.detach()
            entry = parameter, (data.data_ptr(), data.clone(), data)
            self.copies.setdefault(id(parameter), entry)
        if func in _EMBEDDINGS:
            self._look_up(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _look_up(
        self,
        input: Tensor,
        weight: Tensor,
        _: Any = None,
        max_norm: Any = None,
        *rest: Any,
        **kwargs: Any,
    ) -> None:
        if max_norm is not None:
            data = primal(weight).detach()
            self.looked_up.setdefault(data.data_ptr(), (data, data.clone()))


_EMBEDDINGS = frozenset({F.embedding, F.embedding_bag})

_DATA = (Tensor.data.__get__, Tensor.data.__set__)  # type: ignore[attr-defined]


def _written(func: Callable[..., Any], target: Any) -> nn.Parameter | None:
    """The parameter that a function may write into, by itself or by what it returns."""
    name = getattr(func, "__name__", "")
    if func in _DATA or name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        if isinstance(target, nn.Parameter):
            return target
        base = target._base if isinstance(target, Tensor) else None
        return base if isinstance(base, nn.Parameter) else None
    return None
