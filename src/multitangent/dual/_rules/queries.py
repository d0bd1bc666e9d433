"""Functions whose results carry no tangents: questions, comparisons, `detach`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from multitangent.dual._dual_tensor import DualTensor
from multitangent.dual._registry import (
    register_composite,
    register_nondifferentiable,
    register_refused,
    register_rule,
)

_METHODS = """
    __bool__ __contains__ __eq__ __float__ __floordiv__ __rfloordiv__ __format__ __ge__ __gt__
    __hash__ __index__ __int__ __le__ __len__ __lt__ __ne__ all allclose any argmax argmin
    argsort bool ceil data_ptr detach dim dim_order element_size eq equal floor floor_divide ge
    get_device gt heaviside int is_complex is_conj is_contiguous is_cuda is_floating_point
    is_inference is_neg is_nonzero is_pinned is_same_size is_set_to is_shared is_signed isclose
    isfinite isinf isnan item le logical_and logical_not logical_or logical_xor long lt
    ndimension ne nelement nonzero numel
    requires_grad_ round sgn sign size storage_offset stride tolist trunc
    untyped_storage
""".split()  # noqa: SIM905 (a list this long reads better as text)

_FUNCTIONS = """
    all allclose any argmax argmin argsort bernoulli bucketize can_cast ceil  eq equal
    floor floor_divide  ge get_device gt is_complex is_floating_point is_inference
    is_nonzero is_same_size is_signed is_tensor isclose isfinite isinf isnan le logical_and
    logical_not logical_or logical_xor lt ne nonzero numel  promote_types
    randint_like  result_type round sgn sign trunc
""".split()  # noqa: SIM905 (a list this long reads better as text)

register_nondifferentiable(
    *[getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)],
    *[getattr(torch, name) for name in _FUNCTIONS if hasattr(torch, name)],
)


register_refused(
    Tensor.numpy, Tensor.__array__, Tensor.__dlpack__,
    error=lambda: RuntimeError(
        "A tensor that carries tangents should stay one of PyTorch's: NumPy would lose them. Found "
        "a conversion to an array. Try `.detach()` before it, if no gradient is to pass."
    ),
)  # fmt: skip
register_refused(
    Tensor.__reduce_ex__, Tensor.__deepcopy__,
    error=lambda: RuntimeError(
        "A tensor that carries tangents should be copied by `.clone()`: `copy`, `pickle` and "
        "`torch.save` would lose them. Found one of those. Try `.detach()` before it, if no "
        "gradient is to pass."
    ),
)  # fmt: skip
register_refused(
    torch._make_dual, torch._unpack_dual,
    error=lambda: NotImplementedError(
        "A model should not differentiate its own trained layers while it runs: tangents would "
        "not know of it. Found a dual number of torch.autograd.forward_ad. Try finite differences "
        "or a formula in its place."
    ),
)  # fmt: skip
register_refused(
    Tensor.register_post_accumulate_grad_hook,
    error=lambda: NotImplementedError(
        "A tensor that carries tangents should have no hooks: there is no backward pass that would "
        "call them. Found one inside a model. Try `register_hook` on parameters."
    ),
)  # fmt: skip


@register_composite(Tensor.requires_grad_)
def _requires_grad(x: Tensor, requires_grad: bool = True) -> Tensor:
    if type(x) is DualTensor:
        return x  # as whatever depends on perturbed values
    with torch._C.DisableTorchFunction():
        return x.requires_grad_(requires_grad)


@register_composite(Tensor.register_hook)
def _register_hook(x: Tensor, *args: object, **kwargs: object) -> object:
    if isinstance(x, nn.Parameter):  # whoever accumulates gradients calls its hooks
        with torch._C.DisableTorchFunction():
            return x.register_hook(*args, **kwargs)  # type: ignore[no-untyped-call]
    raise RuntimeError(
        "`register_hook` should be called on parameters: without a backward pass no other tensor "
        "of a model has a gradient, which the hook might change. Found a tensor of shape "
        f"{list(x.shape)}. Try to remove the hook, or a torch.autograd.Function in its place, "
        "whose backward is obeyed."
    )


@register_rule(
    torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like, torch.rand_like,
    torch.randn_like, Tensor.new_zeros, Tensor.new_ones, Tensor.new_empty, Tensor.new_full,
    Tensor.new,
)  # fmt: skip
def _new(out: Tensor, x: Tensor, *args: object, **kwargs: object) -> Tensor | None:
    """No tangents yet, but a tensor that can be written into."""
    return out.new_zeros(0, *[1] * out.ndim) if out.is_floating_point() else None
