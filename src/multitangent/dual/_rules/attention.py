"""Attention: scaled dot products, and PyTorch's layer of several heads made of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from multitangent._deferred_checks import tracing
from multitangent.dual._algebra import full_tangents, primal, tangents
from multitangent.dual._registry import register_composite, register_rule


@register_rule(F.scaled_dot_product_attention)
def _attention(
    out: Tensor,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """With S the scores and P their softmax, ``dO = P (dS - <P, dS>) V + P dV``."""
    if dropout_p > 0:
        raise NotImplementedError(
            "`dropout_p` should be 0 where tangents are carried: the mask must be known. Found "
            f"{dropout_p}. Try it inside a model, or F.dropout on the weights."
        )
    q, k, v = primal(query), primal(key), primal(value)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dq, dk, dv = full_tangents(query), full_tangents(key), full_tangents(value)
    if enable_gqa:
        k, v, dk, dv = (_repeat_heads(x, q.shape[-3]) for x in (k, v, dk, dv))
    bias = _bias(q, k, primal(attn_mask), is_causal)
    scores = scale * (q @ k.mT)
    weights = (scores if bias is None else scores + bias).softmax(-1)
    if bias is not None:  # a row without any key has no weights, and PyTorch's value for it is 0
        weights = weights.nan_to_num(0.0)
    dbias = tangents(attn_mask, scores.ndim)
    terms = [t for t in (dq, dk, dv, dbias) if t is not None]
    count = max(len(t) for t in terms)
    # One tangent at a time: nothing has to be repeated K times, and what is at work is small.
    matrices = _Matrices(out.shape[:-2], terms[0].dtype)
    q, k, v, weights = (matrices(x) for x in (q, k, v, weights))

    def along(i: int, into: Tensor | None) -> Tensor:
        dq_i, dk_i, dv_i, scores_i = (_row(t, i, matrices) for t in (dq, dk, dv, dbias))
        for left, right in ((dq_i, k), (q, dk_i)):
            if left is not None and right is not None:
                addend = weights if scores_i is None else scores_i.expand_as(weights)
                beta = 0 if scores_i is None else 1
                scores_i = torch.baddbmm(addend, left, right.mT, beta=beta, alpha=scale)
        if scores_i is None:
            assert dv_i is not None
            return torch.bmm(weights, dv_i, out=into)
        # The Jacobian of softmax is symmetric, so this is the forward derivative too.
        scores_i = scores_i.expand_as(weights).contiguous()
        weights_i = torch.ops.aten._softmax_backward_data(scores_i, weights, -1, weights.dtype)
        o = torch.bmm(weights_i, v, out=into)
        return o if dv_i is None else o.baddbmm_(weights, dv_i)

    if tracing() or any(is_functorch_wrapped_tensor(x) for x in (q, k, v, *terms)):
        return torch.stack([along(i, None) for i in range(count)]).reshape(count, *out.shape)
    result = terms[0].new_empty(count, *out.shape)
    for i, row in enumerate(result):
        along(i, matrices(row))
    return result


class _Matrices:
    """Brings tensors ``[..., M, N]`` to ``[L, M, N]``, with L for all axes before, broadcast."""

    def __init__(self, lead: Sequence[int], dtype: torch.dtype) -> None:
        self._lead = lead
        self._dtype = dtype

    def __call__(self, x: Tensor) -> Tensor:
        value = x.to(self._dtype).expand(*self._lead, *x.shape[-2:])
        return value.reshape(-1, *x.shape[-2:])


def _row(t: Tensor | None, index: int, matrices: _Matrices) -> Tensor | None:
    """One tangent; those missing at the end are zero."""
    return None if t is None or index >= len(t) else matrices(t[index])


def _repeat_heads(x: Tensor | None, heads: int) -> Any:
    return None if x is None else x.repeat_interleave(heads // x.shape[-3], dim=-3)


def _bias(q: Tensor, k: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """What is added to the scores: minus infinity where attention is not allowed."""
    if is_causal:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)


def attention_with_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`F.scaled_dot_product_attention` whose dropout is a call of `F.dropout`."""
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], dim=-3)
    scores = (scale * query) @ key.transpose(-1, -2)
    bias = _bias(query, key, attn_mask, is_causal)
    weights = torch.softmax(scores if bias is None else scores + bias, -1)
    if bias is not None:  # a row without any key has no weights
        nowhere = (bias == -math.inf).all(-1, keepdim=True)
        weights = torch.masked_fill(weights, nowhere, 0.0)
    return F.dropout(weights, dropout_p) @ value


@register_composite(F.multi_head_attention_forward)
def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """What `nn.MultiheadAttention` computes, in functions that have rules.

    The arguments are those of `torch.nn.functional.multi_head_attention_forward`; it returns the
    output in the shape of `query`, and the weights of attention if they are needed.
    """
    if query.ndim == 2:  # one sample
        out, weights = multi_head_attention(
            query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), embed_dim_to_check,
            num_heads, in_proj_weight, in_proj_bias, bias_k, bias_v, add_zero_attn, dropout_p,
            out_proj_weight, out_proj_bias, training,
            None if key_padding_mask is None else key_padding_mask.unsqueeze(0), need_weights,
            attn_mask, use_separate_proj_weight, q_proj_weight, k_proj_weight, v_proj_weight,
            static_k, static_v, average_attn_weights, is_causal,
        )  # fmt: skip
        return out.squeeze(1), None if weights is None else weights.squeeze(0)
    if static_k is not None or static_v is not None:
        raise NotImplementedError(
            "`static_k` and `static_v` should be None where tangents are carried. Found one of "
            "them. Try to call the projections yourself."
        )
    if use_separate_proj_weight:
        filters: list[Any] = [q_proj_weight, k_proj_weight, v_proj_weight]
    else:
        assert in_proj_weight is not None
        filters = list(in_proj_weight.chunk(3))
    biases = [None] * 3 if in_proj_bias is None else list(in_proj_bias.chunk(3))
    q, k, v = (
        F.linear(x, w, b) for x, w, b in zip((query, key, value), filters, biases, strict=True)
    )
    batch = q.shape[1]
    extra = 0  # keys that no mask knows of
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.expand(1, batch, -1)])
        v = torch.cat([v, bias_v.expand(1, batch, -1)])
        extra += 1
    q, k, v = (x.view(*x.shape[:2], num_heads, -1).permute(1, 2, 0, 3) for x in (q, k, v))
    if add_zero_attn:
        k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
        extra += 1
    bias = _masks(q, key_padding_mask, attn_mask, num_heads, extra)
    dropout_p = dropout_p if training else 0.0
    if not need_weights and dropout_p == 0:
        attended, weights = F.scaled_dot_product_attention(q, k, v, bias), None
    else:
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-1, -2)
        weights = torch.softmax(scores if bias is None else scores + bias, -1)
        weights = weights if dropout_p == 0 else F.dropout(weights, dropout_p)
        attended = weights @ v
    out = F.linear(attended.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if not need_weights:
        return out, None
    return out, weights.mean(1) if average_attn_weights and weights is not None else weights


def _masks(
    q: Tensor, padding: Tensor | None, mask: Tensor | None, heads: int, extra: int
) -> Tensor | None:
    """Both masks as one, added to the scores ``[B, heads, T, S]``."""
    total = None
    if mask is not None:
        mask = mask.view(-1, heads, *mask.shape[1:]) if mask.ndim == 3 else mask
        total = _added(mask, q)
    if padding is not None:
        of_padding = _added(padding, q)[:, None, None, :]
        total = of_padding if total is None else total + of_padding
    return total if total is None or extra == 0 else F.pad(total, (0, extra))


def _added(mask: Tensor, q: Tensor) -> Tensor:
    """A mask of `nn.MultiheadAttention`, where true means not allowed, as a summand."""
    if mask.is_floating_point():
        return mask
    return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, -math.inf)
