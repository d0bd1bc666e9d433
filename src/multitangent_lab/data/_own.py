"""A data set of the user's own, from what a factory returned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate

from multitangent_lab._errors import DataError
from multitangent_lab.data._samples import Loss, Samples

_NAMES = ("train", "validation", "test", "loss")


@dataclass(frozen=True, eq=False)
class OwnData:
    """A data set of the user's own.

    Args:
        train: What to train on.
        validation: What to choose by.
        test: What to report.
        loss: A loss module of PyTorch that takes a mean, or a function to one number per sample.
    """

    train: Samples
    validation: Samples
    test: Samples
    loss: Loss

    @property
    def has_classes(self) -> bool:
        _, targets = self.train[torch.zeros(1, dtype=torch.int64, device=self.train.device)]
        one_each = targets.ndim == 1 and not targets.is_floating_point()
        return one_each and isinstance(self.loss, nn.CrossEntropyLoss)

    @property
    def evaluation_batch(self) -> None:
        return None


def own_data(returned: Any, device: torch.device | str = "cpu") -> OwnData:
    """Returns the data set that a user's factory describes.

    Args:
        returned: A tuple `(train, validation, test, loss)`, or an object with these four
            attributes. Each part is a pair of tensors `(inputs, targets)` with the samples along
            the first axis, or a `torch.utils.data.Dataset` with a length whose items are such
            pairs, of one sample. The loss is a loss module of PyTorch that takes a mean, or a
            function that returns one number per sample, `[B]`.
        device: Where batches live.

    Raises:
        DataError: It is something else.

    Examples:
        >>> part = torch.randn(8, 4), torch.randn(8, 1)
        >>> data = own_data((part, part, part, nn.MSELoss()))
        >>> inputs, targets = data.train[torch.tensor([0, 5])]
        >>> inputs.shape, targets.shape
        (torch.Size([2, 4]), torch.Size([2, 1]))
        >>> own_data((part, part, nn.MSELoss()))
        Traceback (most recent call last):
        ...
        multitangent_lab._errors.DataError: `data` should return train, validation, test, loss, \
as a tuple or as attributes. Found a tuple of tuple, tuple, MSELoss. Try `return train, \
validation, test, torch.nn.CrossEntropyLoss()`.
    """
    train, validation, test, loss = _four(returned)
    return OwnData(
        train=_samples("train", train, device),
        validation=_samples("validation", validation, device),
        test=_samples("test", test, device),
        loss=_loss(loss),
    )


def _four(returned: Any) -> Sequence[Any]:
    if isinstance(returned, tuple | list):
        if len(returned) == len(_NAMES):
            return returned
    elif all(hasattr(returned, name) for name in _NAMES):
        return [getattr(returned, name) for name in _NAMES]
    raise DataError(
        "`data` should return train, validation, test, loss, as a tuple or as attributes. Found "
        f"{_described(returned)}. Try `return train, validation, test, torch.nn.CrossEntropyLoss()`"
        "."
    )


def _loss(loss: Any) -> Loss:
    reduction = getattr(loss, "reduction", "mean")
    if isinstance(loss, type) or not callable(loss) or reduction != "mean":
        stated = f"{type(loss).__name__}(reduction={reduction!r})"
        found = repr(loss) if reduction == "mean" else stated
        raise DataError(
            "`loss`, of what `data` returns, should be a loss module of PyTorch that takes a mean, "
            f"or a function that returns one number per sample. Found {found}. Try "
            "torch.nn.CrossEntropyLoss()."
        )
    function: Callable[[Any, Tensor], Tensor] = loss
    return function


@dataclass(frozen=True, eq=False)
class _Tensors:
    """Inputs and targets, wholly in memory."""

    inputs: Tensor
    targets: Tensor

    @property
    def device(self) -> torch.device:
        return self.targets.device

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.inputs[indices], self.targets[indices]

    def first(self, count: int) -> _Tensors:
        return _Tensors(self.inputs[:count], self.targets[:count])


@dataclass(frozen=True, eq=False)
class _Items:
    """Samples that a `torch.utils.data.Dataset` makes one by one."""

    dataset: Any
    device: torch.device
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        inputs, targets = default_collate([self.dataset[i] for i in indices.tolist()])
        return inputs.to(self.device), targets.to(self.device)

    def first(self, count: int) -> _Items:
        return _Items(self.dataset, self.device, min(count, self.count))


def _samples(name: str, part: Any, device: torch.device | str) -> Samples:
    if isinstance(part, Dataset) and hasattr(part, "__len__") and len(part) > 0:
        item = part[0]
        if isinstance(item, tuple | list) and len(item) == 2:
            collated = default_collate([item])
            if all(isinstance(value, Tensor) for value in collated):
                return _Items(part, torch.device(device), len(part))
        raise _bad_part(name, f"a Dataset whose first item is {_described(item)}")
    if isinstance(part, tuple | list) and len(part) == 2:
        inputs, targets = part
        if isinstance(inputs, Tensor) and isinstance(targets, Tensor):
            if inputs.ndim and targets.ndim and len(inputs) == len(targets) > 0:
                return _Tensors(inputs.to(device), targets.to(device))
            shapes = f"{list(inputs.shape)} and {list(targets.shape)}"
            raise _bad_part(name, f"tensors of the shapes {shapes}")
    raise _bad_part(name, _described(part))


def _bad_part(name: str, found: str) -> DataError:
    return DataError(
        f"`{name}`, of what `data` returns, should be a pair of tensors (inputs, targets), with as "
        "many samples each along the first axis and at least one, or a torch.utils.data.Dataset "
        f"with a length whose items are such pairs of one sample. Found {found}. Try "
        "`torch.utils.data.TensorDataset(inputs, targets)`."
    )


def _described(value: Any) -> str:
    if isinstance(value, tuple | list):
        inside = ", ".join(type(item).__name__ for item in value) or "nothing"
        return f"a {type(value).__name__} of {inside}"
    return f"an object of type {type(value).__name__}"
