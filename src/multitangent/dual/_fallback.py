"""Functions without a rule: their backward, transposed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from multitangent.dual._arguments import find_duals, primals
from multitangent.dual._backward import floating, function_of_duals, push
from multitangent.dual._dual_tensor import expanded, pad_rows
from multitangent.dual._registry import FallbackWarning, function_name, not_dense, record_fallback
from multitangent.dual._views import Call, make_result

_RECURRENT = frozenset({"lstm", "gru", "rnn_tanh", "rnn_relu"})


def fallback(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any function of dual tensors, without a rule for it."""
    inputs = list(find_duals((args, kwargs)))
    random_state = torch.get_rng_state()  # a random function draws the same numbers twice
    out = func(*primals(args), **primals(kwargs))
    if isinstance(out, Tensor) and out.layout is not torch.strided:
        raise not_dense(func)
    num_tangents = max((dual.tangents.shape[0] for dual in inputs), default=0)
    if not _differentiable(out) or num_tangents == 0:
        none = (item.new_zeros(0, *[1] * item.ndim) for item in floating(out))
        return _wrap(out, none, (func, args, kwargs, None))
    name = function_name(func)
    record_fallback(name)
    warnings.warn(
        f"{name} has no rule for tangents, which go through its backward: the result is right, "
        "but slower than need be. `multitangent.dual.register_rule` adds a rule.",
        FallbackWarning,
        stacklevel=5,
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.set_rng_state(random_state)
        try:
            tangents = jvp_by_transposing(func, args, kwargs, num_tangents)
        except torch.OutOfMemoryError:
            raise
        except (NotImplementedError, RuntimeError) as error:
            raise NotImplementedError(_no_derivatives(name, error)) from error
    return _wrap(out, iter(tangents), (func, args, kwargs, None))


def _no_derivatives(name: str, error: Exception) -> str:
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"{name} should have a backward that PyTorch can differentiate, to carry tangents. Found "
        f"none: {reason.rstrip('.')}. Try functions that it is made of, "
        "`multitangent.dual.register_rule`, or `.detach()` before it if no gradient is to pass."
    )


def jvp_by_transposing(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], num_tangents: int
) -> list[Tensor]:
    """Tangents ``[K, *shape]`` of every floating-point output, in order."""
    with _without_fused_kernels(func):
        return push(function_of_duals(func, args, kwargs), *_inputs(args, kwargs, num_tangents))


def jvp_by_vmap(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], num_tangents: int
) -> list[Tensor]:
    """The same by forward mode: the readable twin of every rule, but for kinks."""
    function = function_of_duals(func, args, kwargs)
    points, rows = _inputs(args, kwargs, num_tangents)

    def along(*tangents: Tensor) -> Any:
        return torch.func.jvp(function, tuple(points), tangents)[1]

    with _without_fused_kernels(func):
        return list(torch.func.vmap(along, randomness="same")(*rows))


def _inputs(
    args: tuple[Any, ...], kwargs: dict[str, Any], num_tangents: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The primals of dual arguments, and their tangents in full size."""
    duals = list(find_duals((args, kwargs)))
    return [dual.primal.contiguous() for dual in duals], [
        pad_rows(expanded(dual), num_tangents).to(dual.primal.dtype).contiguous() for dual in duals
    ]


@contextmanager
def _without_fused_kernels(func: Callable[..., Any]) -> Iterator[None]:
    """Fused attention and fused recurrent layers are differentiable once only."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if func.__name__ in _RECURRENT:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield


def _differentiable(out: Any) -> bool:
    return bool(floating(out))


def _wrap(out: Any, tangents: Iterator[Tensor], call: Call) -> Any:
    """The output with each of its floating-point tensors made dual, in order."""
    if isinstance(out, Tensor):
        if not out.is_floating_point():
            return out
        rows = next(tangents)
        arguments = (dual for dual in find_duals(call[1:3]) if dual.primal is out)
        argument = next(arguments, None)
        return make_result(out, rows, call) if argument is None else argument
    if isinstance(out, (tuple, list)):
        items = [_wrap(item, tangents, (*call[:3], i)) for i, item in enumerate(out)]
        return type(out)(*items) if hasattr(out, "_fields") else type(out)(items)
    return out
