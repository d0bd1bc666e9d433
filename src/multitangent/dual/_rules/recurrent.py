"""Packed sequences: linear in what is packed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from multitangent.dual._algebra import full
from multitangent.dual._registry import register_rule

_functions: Any = torch


@register_rule(_functions._pack_padded_sequence)
def _pack(out: Any, input: Any, lengths: Tensor, batch_first: bool) -> Any:
    t = full(input).movedim(0, -1)  # as one more feature
    packed, _ = _functions._pack_padded_sequence(t, lengths, batch_first)
    return packed.movedim(-1, 0), None


@register_rule(_functions._pad_packed_sequence)
def _unpack(
    out: Any,
    data: Any,
    batch_sizes: Tensor,
    batch_first: bool,
    padding_value: float,
    total_length: int,
) -> Any:
    t = full(data).movedim(0, -1)
    padded, _ = _functions._pad_packed_sequence(t, batch_sizes, batch_first, 0.0, total_length)
    return padded.movedim(-1, 0), None
