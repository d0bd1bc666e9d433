"""A batch of samples, and its split into parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from multitangent._structures import hidden_tensors, leaves_of, map_tensors, tensors_of
from multitangent.objective._state import version


@dataclass(frozen=True)
class Batch:
    """The samples of a batch, or some of them.

    Attributes:
        inputs: What the model is called with: a tensor, a tuple or a mapping.
        target: What the loss compares with.
        rows: Which samples of the batch these are. The first one is not 0 where other processes
            have the samples before it.
        batch_size: The number of samples of the whole batch, on all processes.
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

    def place_in(self, whole: Batch) -> slice:
        """Which samples of another batch these are, counted from its first one."""
        first = whole.rows.start
        return slice(self.rows.start - first, self.rows.stop - first)

    def split(self, size: int) -> Iterator[Batch]:
        """Parts of `size` samples each; the last one may have fewer.

        Tensors whose first axis is the batch are split, anything else is handed to every part.

        Raises:
            ValueError: If there are tensors of samples in an object that can not be split.
        """
        if size >= self.size:
            yield self
            return
        for start in range(0, self.size, size):
            yield self.take(slice(start, min(start + size, self.size)))

    def _check_structure(self) -> None:
        for kind, tensor in hidden_tensors((self.inputs, self.target)):
            if tensor.shape[:1] == (self.size,):
                raise _unknown_structure(kind, self.size)

    def pick(self, samples: Sequence[int]) -> Batch:
        """Some samples, as a batch of its own in memory of its own."""

        def pick(value: Tensor) -> Tensor:
            return value[list(samples)] if value.shape[:1] == (self.size,) else value

        if len(samples) != self.size:
            self._check_structure()
        return replace(
            self,
            inputs=map_tensors(pick, self.inputs),
            target=map_tensors(pick, self.target),
            rows=slice(0, len(samples)),
            batch_size=len(samples),
        ).copied()

    def copied(self) -> Batch:
        """The same samples in memory of their own, such that writes into them can be noticed."""
        return replace(
            self,
            inputs=map_tensors(torch.clone, self.inputs),
            target=map_tensors(torch.clone, self.target),
            rows=slice(0, self.size),
            batch_size=self.size,
        )

    @property
    def device(self) -> torch.device:
        """That of the first input."""
        return tensors_of(self.inputs)[0].device

    @property
    def is_written(self) -> bool:
        """Whether someone wrote into tensors that `copied` made."""
        return any(version > 0 for version in self.versions)

    @property
    def versions(self) -> list[int]:
        """How often someone has written into the tensors."""
        return [version(tensor) for tensor in tensors_of((self.inputs, self.target))]

    def take(self, rows: slice) -> Batch:
        """The samples `rows`, which count from the first of this part."""

        def take(value: Tensor) -> Tensor:
            return value[rows] if value.shape[:1] == (self.size,) else value

        self._check_structure()
        first = self.rows.start
        return replace(
            self,
            inputs=map_tensors(take, self.inputs),
            target=map_tensors(take, self.target),
            rows=slice(first + rows.start, first + rows.stop),
        )


def whole_batch(inputs: Any, target: Any) -> Batch:
    """The whole batch; the first axis of the first input is its size.

    Raises:
        ValueError: If there is no sample.
    """
    inputs = _as_dict(inputs)
    size = _batch_size(inputs)
    return Batch(
        map_tensors(Tensor.detach, inputs),
        map_tensors(Tensor.detach, target),
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
    for value in tensors_of(inputs):
        if value.ndim > 0:
            if value.shape[0] == 0:
                break
            return value.shape[0]
    raise ValueError(
        "`inputs` should hold a tensor whose first axis is the batch, with at least one sample. "
        f"Found {_describe(inputs)}."
    )


def _unknown_structure(kind: str, size: int) -> ValueError:
    return ValueError(
        "`inputs` and `target` should hold tensors in tuples, lists, mappings or dataclasses: only "
        f"those can be split into micro-batches. Found tensors of {size} samples inside {kind}. "
        f"Try one of those in its place, or `micro_batch={size}`."
    )


def _describe(inputs: Any) -> str:
    if isinstance(inputs, Tensor):
        return f"a tensor of shape {list(inputs.shape)}"
    return f"a {type(inputs).__name__}"


def shapes(batch: Batch) -> Any:
    """The shapes, types and devices of a batch, to tell one kind of batch from another."""
    values = batch.inputs, batch.target
    if all(isinstance(value, Tensor) for value in values):
        return tuple(_shape(value) for value in values)
    kinds = [_shape(v) if isinstance(v, Tensor) else repr(v) for v in leaves_of(values)]
    return tuple(kinds), pytree.tree_structure(values)


def _shape(value: Tensor) -> Any:
    return value.shape, value.dtype, value.device
