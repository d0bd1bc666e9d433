"""Functions whose results carry no tangents: questions, comparisons, `detach`."""

from __future__ import annotations

import torch
from torch import Tensor

from multitangent.dual._registry import register_plain, register_rule

_METHODS = ["__bool__", "__contains__", "__float__", "__format__", "__hash__", "__int__", "__index__", "__len__", "__array__", "all", "allclose", "any", "argmax", "argmin", "argsort", "bool", "data_ptr", "detach", "dim", "element_size", "eq", "equal", "ge", "get_device", "gt", "int", "is_complex", "is_contiguous", "is_conj", "is_cuda", "is_floating_point", "is_inference", "is_neg", "is_nonzero", "is_same_size", "is_signed", "is_set_to", "isclose", "isfinite", "isinf", "isnan", "item", "le", "logical_and", "logical_not", "logical_or", "logical_xor", "long", "lt", "ndimension", "ne", "nelement", "nonzero", "numel", "numpy", "retain_grad", "requires_grad_", "sign", "sgn", "floor", "ceil", "round", "trunc", "heaviside", "size", "storage_offset", "stride", "tolist", "type", "untyped_storage", "__eq__", "__ge__", "__gt__", "__le__", "__lt__", "__ne__", "__floordiv__", "floor_divide", "is_pinned", "dim_order", "is_shared", "new_empty", "new_full", "new_ones", "new_tensor"]

_FUNCTIONS = ["all", "allclose", "any", "argmax", "argmin", "argsort", "eq", "equal", "floor", "ceil", "round", "trunc", "sign", "sgn", "floor_divide", "ge", "gt", "is_complex", "is_floating_point", "is_nonzero", "is_same_size", "is_tensor", "isclose", "isfinite", "isinf", "isnan", "le", "logical_and", "logical_not", "logical_or", "logical_xor", "lt", "ne", "nonzero", "numel", "result_type", "bernoulli", "empty_like", "full_like", "ones_like", "rand_like", "randn_like", "randint_like", "bucketize", "get_device", "is_inference", "is_signed", "promote_types", "can_cast"]

register_plain(
    *[getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)],
    *[getattr(torch, name) for name in _FUNCTIONS if hasattr(torch, name)],
)


@register_rule(torch.zeros_like, Tensor.new_zeros)
def _zeros(out: Tensor, x: Tensor, *args: object, **kwargs: object) -> Tensor | None:
    """No tangents yet, but a tensor that can be written into."""
    return out.new_zeros(0, *[1] * out.ndim) if out.is_floating_point() else None
