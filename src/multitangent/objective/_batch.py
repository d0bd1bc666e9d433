"""A batch of samples, and its split into parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Batch:
    """The samples of a batch, or some of them.

    Attributes:
        inputs: What the model is called with: a tensor, a tuple or a mapping.
        target: What the loss compares with.
        rows: Which samples of the batch these are.
        batch_size: The number of samples of the whole batch.
        correction: What the losses are multiplied by, for the sake of a weighted mean.
        shapes_of_few: The shapes of perturbed values, by name, of a run of fewer samples.
        has_target_per_sample: Whether the first axis of the target is the batch.
    """

    inputs: Any
    target: Any
    rows: slice
    batch_size: int
    correction: float = 1.0
    shapes_of_few: Mapping[str, torch.Size] = field(default_factory=dict)
    has_target_per_sample: bool = False

    @property
    def size(self) -> int:
        """The number of these samples."""
        return self.rows.stop - self.rows.start

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of `size` samples each; the last one may have fewer.

        Tensors whose first axis is the batch are split, anything else is handed to every part.
        """
        if size >= self.size:
            yield self
            return
        for start in range(0, self.size, size):
            yield self.take(slice(start, min(start + size, self.size)))

    def pick(self, samples: Sequence[int]) -> Batch:
        """Some samples, as a batch of its own in memory of its own."""

        def pick(value: Any) -> Any:
            per_sample = isinstance(value, Tensor) and value.shape[:1] == (self.size,)
            return value[list(samples)] if per_sample else value

        return replace(
            self,
            inputs=pytree.tree_map(pick, self.inputs),
            target=pytree.tree_map(pick, self.target),
            rows=slice(0, len(samples)),
            batch_size=len(samples),
        ).copied()

    def copied(self) -> Batch:
        """The same samples in memory of their own, such that writes into them can be noticed."""

        def copy(value: Any) -> Any:
            return value.clone() if isinstance(value, Tensor) else value

        return replace(
            self,
            inputs=pytree.tree_map(copy, self.inputs),
            target=pytree.tree_map(copy, self.target),
            rows=slice(0, self.size),
            batch_size=self.size,
        )

    @property
    def is_written(self) -> bool:
        """Whether someone wrote into tensors that `copied` made."""
        return any(version > 0 for version in self.versions)

    @property
    def versions(self) -> list[int]:
        """How often someone has written into the tensors."""
        leaves = pytree.tree_leaves((self.inputs, self.target))
        return [leaf._version for leaf in leaves if isinstance(leaf, Tensor)]

    def take(self, rows: slice) -> Batch:
        """The samples `rows`, which count from the first of this part."""

        def take(value: Any) -> Any:
            per_sample = isinstance(value, Tensor) and value.shape[:1] == (self.size,)
            return value[rows] if per_sample else value

        first = self.rows.start
        return replace(
            self,
            inputs=pytree.tree_map(take, self.inputs),
            target=pytree.tree_map(take, self.target),
            rows=slice(first + rows.start, first + rows.stop),
        )


def whole_batch(inputs: Any, target: Any) -> Batch:
    """The whole batch; the first axis of the first input is its size.

    Raises:
        ValueError: If there is no sample.
    """

    def detach(value: Any) -> Any:
        return value.detach() if isinstance(value, Tensor) else value

    inputs = _as_dict(inputs)
    size = _batch_size(inputs)
    return Batch(
        pytree.tree_map(detach, inputs),
        pytree.tree_map(detach, target),
        slice(0, size),
        size,
        has_target_per_sample=isinstance(target, Tensor) and target.shape[:1] == (size,),
    )


def _as_dict(inputs: Any) -> Any:
    """Any mapping as a dictionary, whose values can be split: a tokenizer's output is another."""
    return dict(inputs) if isinstance(inputs, Mapping) else inputs


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


def shapes(batch: Batch) -> Any:
    """The shapes, types and devices of a batch, to tell one kind of batch from another."""
    leaves, structure = pytree.tree_flatten((batch.inputs, batch.target))
    kinds = [(v.shape, v.dtype, v.device) if isinstance(v, Tensor) else repr(v) for v in leaves]
    return tuple(kinds), structure
