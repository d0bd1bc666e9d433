"""A batch, and its split into parts of some samples each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Part:
    """Some samples of a batch.

    Attributes:
        inputs: What the model is called with: a tensor, a tuple or a mapping.
        target: What the loss compares with.
        rows: Which samples of the batch these are.
        batch_size: The number of samples of the whole batch.
    """

    inputs: Any
    target: Any
    rows: slice
    batch_size: int

    @property
    def size(self) -> int:
        """The number of samples of this part."""
        return self.rows.stop - self.rows.start


def split(inputs: Any, target: Any, size: int | None) -> Iterator[Part]:
    """The parts of a batch, of `size` samples each, or the batch as one part.

    Tensors whose first axis is the batch are split, anything else is handed to every part.
    """
    batch_size = _batch_size(inputs)
    size = batch_size if size is None else size

    def take(value: Any, rows: slice) -> Any:
        if not isinstance(value, Tensor):
            return value
        whole = value.ndim == 0 or value.shape[0] != batch_size or size >= batch_size
        return (value if whole else value[rows]).detach()

    for start in range(0, batch_size, size):
        rows = slice(start, min(start + size, batch_size))
        yield Part(
            pytree.tree_map(lambda value, rows=rows: take(value, rows), inputs),
            pytree.tree_map(lambda value, rows=rows: take(value, rows), target),
            rows,
            batch_size,
        )


def call_model(model: nn.Module, inputs: Any) -> Any:
    """The model's output for inputs given as one value, as a tuple or as a mapping."""
    args, kwargs = arguments(inputs)
    return model(*args, **kwargs)


def arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the model's call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _batch_size(inputs: Any) -> int:
    for value in pytree.tree_leaves(inputs):
        if isinstance(value, Tensor) and value.ndim > 0:
            if value.shape[0] == 0:
                break
            return value.shape[0]
    raise ValueError(
        "`inputs` should hold a tensor whose first axis is the batch, with at least one sample. "
        f"Found {_describe(inputs)}."
    )


def _describe(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return f"a tensor of shape {list(inputs.shape)}"
    return f"a {type(inputs).__name__}"
