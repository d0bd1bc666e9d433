"""A part of a batch, run as the whole batch would be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from multitangent.dual import (
    COMPOSITES,
    FASTER,
    GRAPH_QUERIES,
    DualTensor,
    attention_with_dropout,
    constant,
    find_duals,
    function_name,
    result_of,
)
from multitangent.objective._batch_norm import Normalization, Statistics
from multitangent.objective._dropout import DROPOUTS, Dropout, Noise
from multitangent.objective._randomness import RANDOM, Randomness
from multitangent.objective._record import EXPENSIVE, BatchRecord, PrimalCache


class GraphQuery(BaseException):
    """A model asks a tensor for its graph, in a run that has neither a graph nor tangents."""


class BatchMode(TorchFunctionMode):
    """Inside this block a part of a batch is treated as the whole batch would be.

    Neither random numbers nor the statistics of batch normalisation depend on the split into
    micro-batches, nor on whether a module runs a second time; and what the run of the whole batch
    has computed is not computed again.

    Args:
        noise: Uniform numbers for one call of dropout: see `Dropout`.
        rows: The samples of the batch that are at hand.
        batch_size: The number of samples of the whole batch.
        statistics: What batch normalisation in training mode does: see `Normalization`.
        record: What the whole batch leaves for its parts, filled by ``"update"`` and used by
            ``"frozen"``; ``None`` records nothing.
        records_graph: See below.

    Attributes:
        dropout: What draws the masks.
        stand_ins: What takes the place of parameters, by their `id`, wherever they are used.
        is_plain: Whether the run has no tangents, by which a model's questions for the graph of
            backpropagation are answered.
        records_graph: Whether autograd records what is computed. Gradients are enabled all the
            while, so that a model that switches them off is noticed.
    """

    def __init__(
        self,
        noise: Noise,
        rows: slice,
        batch_size: int,
        statistics: Statistics = "update",
        record: BatchRecord | None = None,
        *,
        records_graph: bool = False,
    ) -> None:
        super().__init__()
        self.stand_ins: Mapping[int, Tensor] = {}
        self.is_plain = False
        self.records_graph = records_graph
        self.dropout = Dropout(noise, rows, batch_size, record, statistics == "update")
        self._randomness = Randomness(rows, batch_size, record, statistics == "update")
        self._normalization = Normalization(statistics, record)
        self._records = statistics == "update"
        self._cache = None if record is None else record.primals
        self._is_off = False  # whether the model has switched gradients off
        self._level = torch._C._functorch.maybe_current_level()
        self._rows = rows
        self._batch_size = batch_size
        self._expensive_calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch._C._set_grad_enabled:
            return func(*args)
        kwargs = {} if kwargs is None else kwargs
        if not torch.is_grad_enabled():
            return self._constant(func, args, kwargs)
        if DualTensor in types and torch._C._functorch.maybe_current_level() != self._level:
            raise NotImplementedError(_NESTED.format("torch.func"))
        if func in _DIFFERENTIATING:
            return self._differentiate(func, args, kwargs)
        if self.stand_ins and (_holds_parameter(args) or kwargs):
            args, kwargs = pytree.tree_map(self._stand_in, (args, dict(kwargs)))
        if func in COMPOSITES:
            with self:
                return COMPOSITES[func](*args, **kwargs)
        if self.records_graph:
            return self._result(func, types, args, kwargs)
        torch._C._set_grad_enabled(False)
        try:
            return self._result(func, types, args, kwargs)
        finally:
            torch._C._set_grad_enabled(True)

    def _stand_in(self, value: Any) -> Any:
        return self.stand_ins.get(id(value), value) if isinstance(value, nn.Parameter) else value

    def _differentiate(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What a model differentiates by itself, where that has nothing to do with tangents."""
        if next(find_duals((args, dict(kwargs))), None) is not None:
            raise NotImplementedError(_NESTED.format(f"{function_name(func)}"))
        try:
            return func(*args, **kwargs)
        except RuntimeError as error:  # a part of a batch has no graph; the whole has one
            kind = NotImplementedError if self.records_graph else RuntimeError
            raise kind(_NESTED.format(f"{function_name(func)}")) from error

    def _constant(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What a function returns where the model has switched gradients off."""
        if func in GRAPH_QUERIES:  # which are about what came before
            return self._query(func, *args)

        def result(*args: Any, **kwargs: Any) -> Any:
            if func in COMPOSITES:
                with self:
                    return COMPOSITES[func](*args, **kwargs)
            return self._result(func, (), args, kwargs)

        self._is_off = True
        try:
            return constant(result, args, kwargs)
        finally:
            self._is_off = False

    def _result(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        special = _SPECIAL.get(func)
        if special is not None:
            return special(self)(func, *args, **kwargs)
        if self._cache is not None and func in EXPENSIVE and args:
            return self._expensive(self._cache, func, types, args, kwargs)
        return self._call(func, types, args, kwargs)

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
        with torch.set_grad_enabled(not self._is_off), self:
            return attention_with_dropout(
                query, key, value, attn_mask, dropout_p, is_causal, **kwargs
            )

    def _query(self, func: Callable[..., Any], x: Tensor) -> Any:
        if self.is_plain and x.is_floating_point() and not x.requires_grad:
            raise GraphQuery
        return func(x)

    @staticmethod
    def _call(
        func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        return (func if types else FASTER.get(func, func))(*args, **kwargs)

    def _expensive(
        self,
        cache: PrimalCache,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if self._records:
            out = self._call(func, types, args, kwargs)
            cache.record(args[0], out)
            return out
        output = cache.find(self._expensive_calls, args[0], self._rows, self._batch_size)
        self._expensive_calls += 1
        if output is None:
            return self._call(func, types, args, kwargs)
        return result_of(func, output, args, dict(kwargs)) if types else output


# Differentiation inside of a model, as for the residual of a differential equation.
_DIFFERENTIATING = frozenset({torch.autograd.grad, torch.autograd.backward, Tensor.backward})
_NESTED = (
    "A model should not differentiate its own trained layers while it runs: tangents would not "
    "know of it. Found a call of {} that reaches them. Try finite differences or a formula in its "
    "place, or `torch.no_grad()` around it if it is meant as a constant."
)

_SPECIAL: dict[Callable[..., Any], Callable[[BatchMode], Callable[..., Any]]] = {
    **dict.fromkeys(DROPOUTS, lambda mode: mode.dropout),
    **dict.fromkeys(RANDOM, lambda mode: mode._randomness),
    F.batch_norm: lambda mode: mode._normalization.batch_norm,
    F.instance_norm: lambda mode: mode._normalization.instance_norm,
    torch.batch_norm: lambda mode: mode._normalization.with_weights_first("batch_norm"),
    torch.instance_norm: lambda mode: mode._normalization.with_weights_first("instance_norm"),
    torch.native_batch_norm: lambda mode: mode._normalization.refuse,
    F.scaled_dot_product_attention: lambda mode: mode._attention,
    **dict.fromkeys(GRAPH_QUERIES, lambda mode: mode._query),
}


def _holds_parameter(args: tuple[Any, ...]) -> bool:
    return any(
        type(arg) is nn.Parameter or (type(arg) in (list, tuple) and _holds_parameter(arg))
        for arg in args
    )
