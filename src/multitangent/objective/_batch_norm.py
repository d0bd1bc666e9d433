"""Normalisation whose statistics do not depend on how a batch is split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from multitangent.dual import DualTensor, constant_statistics, function_name, primal
from multitangent.objective._record import BatchRecord

Statistics = Literal["update", "frozen", "coupled"]


class Normalization:
    """Batch and instance normalisation of a batch, or of a part of it, in training mode.

    Args:
        statistics: What batch normalisation does. ``"update"``: as ever, for the whole batch.
            ``"frozen"``: takes mean and variance from `record`, as constants. ``"coupled"``: as
            ever, tangents included, but leaves the running averages alone.
        record: Filled by ``"update"`` and used by ``"frozen"``; ``None`` records nothing.
    """

    def __init__(self, statistics: Statistics, record: BatchRecord | None) -> None:
        self._statistics = statistics
        self._record = record
        self._calls = 0

    def batch_norm(
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
        """`F.batch_norm`."""
        rest = weight, bias, training, momentum, eps
        if not training:
            return func(input, running_mean, running_var, *rest)
        if self._statistics == "coupled":
            if type(input) is DualTensor:
                return _normalized(input, weight, bias, eps)
            return func(input, None, None, *rest)
        if self._statistics == "frozen":
            assert self._record is not None
            if self._calls == len(self._record.statistics):
                raise RuntimeError("a part of the batch normalises more often than the whole")
            mean, var = self._record.statistics[self._calls]
            self._calls += 1
            return func(input, mean, var, weight, bias, False, momentum, eps)
        has_duals = any(type(value) is DualTensor for value in (input, weight, bias))
        if self._record is not None and has_duals:
            axes = [axis for axis in range(input.ndim) if axis != 1]
            var, mean = torch.var_mean(primal(input).detach(), axes, correction=0)
            self._record.statistics.append((mean, var))
        is_single = input.numel() == input.shape[1]  # of which PyTorch complains
        if self._record is None or has_duals or is_single:
            with constant_statistics():
                return func(input, running_mean, running_var, *rest)
        out, mean, spread = torch.native_batch_norm(  # which tells its statistics
            input, weight, bias, running_mean, running_var, training, momentum, eps
        )
        self._record.statistics.append((mean.detach(), spread.detach().pow(-2) - eps))
        return out

    def with_weights_first(self, function: str) -> Callable[..., Any]:
        """`torch.batch_norm` or `torch.instance_norm`: the same with other places of arguments."""

        def normalized(
            func: Callable[..., Any],
            input: Tensor,
            weight: Tensor | None,
            bias: Tensor | None,
            running_mean: Tensor | None,
            running_var: Tensor | None,
            of_batch: bool,
            momentum: float,
            eps: float,
            cudnn_enabled: bool = True,
        ) -> Any:
            arguments = running_mean, running_var, weight, bias, of_batch, momentum, eps
            of_module = getattr(torch.nn.functional, function)
            return getattr(self, function)(of_module, input, *arguments)

        return normalized

    def refuse(self, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Functions that return statistics, which are none of the batch in a part of it."""
        raise NotImplementedError(
            f"{function_name(func)} should not be called by a model: it returns statistics that "
            "depend on how the batch is split. Try `torch.nn.functional.batch_norm`."
        )

    def instance_norm(
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
        """`F.instance_norm`."""
        if use_input_stats and self._statistics != "update":
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


def normalizes_batches(module: nn.Module) -> bool:
    """Whether a module normalises by its batch's statistics."""
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
    return batch_norm and (module.training or not module.track_running_stats)
