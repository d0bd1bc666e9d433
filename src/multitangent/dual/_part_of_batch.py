"""Some samples of a batch, with random numbers and statistics that do not depend on the split."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from multitangent.dual._dispatch import result_of
from multitangent.dual._dual_tensor import DualTensor
from multitangent.dual._kernels import FASTER
from multitangent.dual._registry import COMPOSITES, function_name, is_query
from multitangent.dual._reuse import EXPENSIVE, Primals, Recorded

_DROPOUT: dict[Callable[..., Any], int] = {  # the axes, after the first, that share a mask
    F.dropout: 0,
    F.dropout1d: 1,
    F.dropout2d: 2,
    F.dropout3d: 3,
}

Statistics = Literal["update", "hold", "couple"]


class PartOfBatch(TorchFunctionMode):
    """Inside this block a part of a batch is treated as the whole batch would be.

    Dropout draws its masks for the whole batch and takes the rows it needs: all tangents of a
    sample share one mask, and neither the split into micro-batches nor a second run of the same
    module changes it. Batch normalisation in training mode takes its statistics from the whole
    batch, and updates running averages in the first run only.

    Args:
        generator: Maps the count of the dropout call to a seeded generator on a device.
        rows: The samples of the batch that this sweep carries.
        batch_size: The number of samples of the whole batch.
        statistics: What batch normalisation in training mode does. ``"update"``: as ever, for the
            whole batch. ``"hold"``: takes mean and variance from `recorded`, as constants.
            ``"couple"``: as ever, tangents included, but leaves the running averages alone.
        recorded: What the whole batch leaves for its parts, filled by ``"update"`` and used by
            ``"hold"``; ``None`` records nothing.

    Attributes:
        calls: How often dropout has been called.
        between_sites: Whether trainable parameters would be used where their gradient is lost.
    """

    def __init__(
        self,
        generator: Callable[[int, torch.device], torch.Generator],
        rows: slice,
        batch_size: int,
        statistics: Statistics = "update",
        recorded: Recorded | None = None,
    ) -> None:
        super().__init__()
        self.generator = generator
        self.rows = rows
        self.batch_size = batch_size
        self.statistics = statistics
        self.recorded = recorded
        self._primals = None if recorded is None else recorded.primals
        self.calls = 0
        self.between_sites = False
        self._normalizations = 0
        self._expensive_calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self.between_sites:
            _refuse_parameters(func, args)
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self, func, *args, **(kwargs or {}))
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **(kwargs or {}))
        if self._primals is not None and func in EXPENSIVE and args:
            return self._expensive(self._primals, func, types, args, kwargs or {})
        return self._call(func, types, args, kwargs or {})

    @staticmethod
    def _call(
        func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return (func if types else FASTER.get(func, func))(*args, **kwargs)

    def _expensive(
        self,
        primals: Primals,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if self.statistics == "update":
            out = self._call(func, types, args, kwargs)
            primals.record(args[0], out)
            return out
        found = primals.find(self._expensive_calls, args[0], self.rows, self.batch_size)
        self._expensive_calls += 1
        if found is None:
            return self._call(func, types, args, kwargs)
        return result_of(func, found, args, dict(kwargs)) if types else found

    def _dropout(
        self,
        func: Callable[..., Any],
        input: Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> Tensor:
        if not training or p == 0:
            return input
        shape, shared = list(input.shape), _DROPOUT[func]
        if shared:
            shape[-shared:] = [1] * shared
        size = self.rows.stop - self.rows.start
        axis = self._batch_axis(input, size)
        if axis is None:
            noise = self._noise(shape, input)
        else:  # a sample may have several rows, such as one for each head of attention
            count = shape[axis] // size
            shape[axis] = count * self.batch_size
            noise = self._noise(shape, input)
            noise = noise.narrow(axis, count * self.rows.start, count * size)
        mask = (noise >= p).to(input.dtype) * (1 / (1 - p) if p < 1 else 0.0)
        return input.mul_(mask) if inplace else input * mask

    def _batch_axis(self, input: Tensor, size: int) -> int | None:
        """The axis of the samples: that of the whole batch, else the first that it can be."""
        known = self.recorded.batch_axes if self.recorded is not None else []
        if self.statistics == "hold" and self.calls < len(known):
            return known[self.calls]
        fitting = (axis for axis, length in enumerate(input.shape) if length % size == 0)
        axis = next(fitting, None)
        if self.statistics == "update" and self.recorded is not None:
            known.append(axis)
        return axis

    def _noise(self, shape: list[int], like: Tensor) -> Tensor:
        generator = self.generator(self.calls, like.device)
        self.calls += 1
        return torch.rand(shape, generator=generator, device=like.device)

    def _attention(
        self,
        func: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **kwargs: Any,
    ) -> Any:
        if dropout_p == 0:
            return func(query, key, value, attn_mask, 0.0, is_causal, **kwargs)
        from multitangent.dual._rules.attention import attention_with_dropout

        with self:
            return attention_with_dropout(
                query, key, value, attn_mask, dropout_p, is_causal, **kwargs
            )

    def _batch_norm(
        self,
        func: Callable[..., Any],
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Any:
        rest = weight, bias, training, momentum, eps
        if not training:
            return func(input, running_mean, running_var, *rest)
        if self.statistics == "couple":
            if type(input) is DualTensor:
                return _normalized(input, weight, bias, eps)
            return func(input, None, None, *rest)
        if self.statistics == "hold":
            assert self.recorded is not None
            mean, var = self.recorded.statistics[self._normalizations]
            self._normalizations += 1
            return func(input, mean, var, weight, bias, False, momentum, eps)
        if self.rows.stop - self.rows.start < self.batch_size:
            raise NotImplementedError(
                "Batch normalisation in training mode should be a module, such as nn.BatchNorm2d, "
                "where weights are perturbed in micro-batches: it needs the statistics of the "
                "whole batch. Found a call of batch_norm elsewhere. Try `micro_batch` as large as "
                "the batch."
            )
        if self.recorded is None:
            return func(input, running_mean, running_var, *rest)
        out, mean, spread = torch.native_batch_norm(  # which tells its statistics
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )
        self.recorded.statistics.append((mean.detach(), spread.detach().pow(-2) - eps))
        return out

    def _instance_norm(
        self,
        func: Callable[..., Any],
        input: Tensor,
        running_mean: Tensor | None = None,
        running_var: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        use_input_stats: bool = True,
        *rest: Any,
        **kwargs: Any,
    ) -> Any:
        if use_input_stats and self.statistics != "update":
            running_mean = running_var = None
        affine = weight, bias, use_input_stats
        return func(input, running_mean, running_var, *affine, *rest, **kwargs)


def _normalized(input: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Batch normalisation whose statistics carry tangents too."""
    axes = [0, *range(2, input.ndim)]
    centered = input - input.mean(axes, keepdim=True)
    standard = centered * (centered.square().mean(axes, keepdim=True) + eps).rsqrt()
    channels = [-1, *[1] * (input.ndim - 2)]
    scaled = standard if weight is None else standard * weight.reshape(channels)
    return scaled if bias is None else scaled + bias.reshape(channels)


_SPECIAL: dict[Callable[..., Any], Callable[..., Any]] = {
    **dict.fromkeys(_DROPOUT, PartOfBatch._dropout),
    F.scaled_dot_product_attention: PartOfBatch._attention,
    F.batch_norm: PartOfBatch._batch_norm,
    F.instance_norm: PartOfBatch._instance_norm,
}


def _refuse_parameters(func: Callable[..., Any], args: tuple[Any, ...]) -> None:
    for value in args:
        if isinstance(value, nn.Parameter) and value.requires_grad and not is_query(func):
            raise RuntimeError(
                "Trainable parameters should be used inside the site that they belong to: no "
                f"gradient reaches them elsewhere. Found one of shape {list(value.shape)} in "
                f"{function_name(func)} between sites. Try `Activations(sites=[...])` with a "
                "module around that use, or `perturb='weights'`."
            )
