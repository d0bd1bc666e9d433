"""What a dual tensor says of the graph that backpropagation would have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from multitangent.dual._dual_tensor import DualTensor


class _NoGraph:
    """In the place of `grad_fn`: not None, and nothing else."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            "`grad_fn` should be compared with None only: tangents are pushed forward, and there "
            f"is no graph. Found a use of its attribute {name!r}. Try the model without it."
        )


_NO_GRAPH = _NoGraph()


def _requires_grad(x: DualTensor) -> bool:
    return not isinstance(x._tangents, Tensor) or len(x.tangents) > 0


def _is_leaf(x: DualTensor) -> bool:
    return x._is_param or not _requires_grad(x)


def _grad_fn(x: DualTensor) -> _NoGraph | None:
    return None if _is_leaf(x) else _NO_GRAPH


def _no_operation(x: DualTensor) -> None:
    """There will be no gradient to retain."""


_descriptors: Any = Tensor
GRAPH_QUERIES: dict[Callable[..., Any], Callable[[DualTensor], Any]] = {
    _descriptors.requires_grad.__get__: _requires_grad,
    _descriptors.is_leaf.__get__: _is_leaf,
    _descriptors.grad_fn.__get__: _grad_fn,
    _descriptors.retain_grad: _no_operation,
}
