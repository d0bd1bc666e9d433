"""Some samples of a batch, with random numbers that do not depend on the split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from multitangent.dual._registry import function_name, is_query

_DROPOUT: dict[Callable[..., Any], int] = {  # the axes, after the first, that share a mask
    F.dropout: 0,
    F.dropout1d: 1,
    F.dropout2d: 2,
    F.dropout3d: 3,
}


class PartOfBatch(TorchFunctionMode):
    """Inside this block, dropout draws its masks for the whole batch and takes the rows it needs.

    So all tangents of a sample share one mask, and neither the split into micro-batches nor a
    second run of the same module changes it.

    Args:
        generator: Maps the count of the dropout call to a seeded generator on a device.
        rows: The samples of the batch that this sweep carries.
        batch_size: The number of samples of the whole batch.

    Attributes:
        calls: How often dropout has been called.
        between_sites: Whether trainable parameters would be used where their gradient is lost.
    """

    def __init__(
        self,
        generator: Callable[[int, torch.device], torch.Generator],
        rows: slice,
        batch_size: int,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.rows = rows
        self.batch_size = batch_size
        self.calls = 0
        self.between_sites = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.between_sites:
            _refuse_parameters(func, args)
        if func in _DROPOUT:
            return self._dropout(_DROPOUT[func], *args, **(kwargs or {}))
        if func is F.batch_norm:
            _refuse_batch_statistics(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _dropout(
        self, shared: int, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or p == 0:
            return x
        shape = list(x.shape)
        if shared:
            shape[-shared:] = [1] * shared
        count, rest = divmod(x.shape[0], self.rows.stop - self.rows.start)
        if rest == 0:  # a sample may have several rows, such as one for each head of attention
            noise = self._noise([count * self.batch_size, *shape[1:]], x)
            noise = noise[count * self.rows.start : count * self.rows.stop]
        else:
            noise = self._noise(shape, x)
        mask = (noise >= p).to(x.dtype) * (1 / (1 - p) if p < 1 else 0.0)
        return x.mul_(mask) if inplace else x * mask

    def _noise(self, shape: list[int], like: Tensor) -> Tensor:
        generator = self.generator(self.calls, like.device)
        self.calls += 1
        return torch.rand(shape, generator=generator, device=like.device)


def _refuse_parameters(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    for value in args:
        if isinstance(value, nn.Parameter) and value.requires_grad and not is_query(func):
            raise RuntimeError(
                "Trainable parameters should be used inside the site that they belong to: no "
                f"gradient reaches them elsewhere. Found one of shape {list(value.shape)} in "
                f"{function_name(func)} between sites. Try `Activations(sites=[...])` with a "
                "module around that use, or `perturb='weights'`."
            )


def _refuse_batch_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    *rest: Any,
    **kwargs: Any,
) -> None:
    if training:
        raise NotImplementedError(
            "Batch normalisation should use its running statistics: those of the batch tie the "
            "samples together, and directional derivatives are taken sample by sample. Found "
            "batch_norm in training mode. Try `.eval()` on those modules, or nn.GroupNorm."
        )
