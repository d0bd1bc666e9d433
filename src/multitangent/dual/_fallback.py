"""The readable twin of every rule: `torch.func.vmap` over `torch.func.jvp`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from multitangent.dual._arguments import find_duals, map_duals, primals
from multitangent.dual._dual_tensor import expanded, pad_rows
from multitangent.dual._registry import FallbackWarning, function_name, record_fallback
from multitangent.dual._views import Call, make_result


def fallback(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any function of dual tensors, without a rule for it."""
    inputs = list(find_duals((args, kwargs)))
    random_state = torch.get_rng_state()  # a random function draws the same numbers twice
    out = func(*primals(args), **primals(kwargs))
    num_tangents = max((dual.tangents.shape[0] for dual in inputs), default=0)
    if not _differentiable(out) or num_tangents == 0:
        none = (item.new_zeros(0, *[1] * item.ndim) for item in _floating(out))
        return _wrap(out, none, (func, args, kwargs, None))
    name = function_name(func)
    record_fallback(name)
    warnings.warn(
        f"{name} has no rule for tangents and falls back to torch.func: the result is right, but "
        "slower than need be. `multitangent.dual.register_rule` adds a rule.",
        FallbackWarning,
        stacklevel=5,
    )
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.set_rng_state(random_state)
        tangents = jvp_by_vmap(func, args, kwargs, num_tangents)
    return _wrap(out, iter(tangents), (func, args, kwargs, None))


def jvp_by_vmap(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], num_tangents: int
) -> list[Tensor]:
    """Tangents ``[K, *shape]`` of every floating-point output, in order."""
    inputs = list(find_duals((args, kwargs)))

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        remaining = iter(values)
        new_args, new_kwargs = map_duals(lambda _: next(remaining), (args, kwargs))
        return tuple(_floating(func(*new_args, **new_kwargs)))

    def along(*tangents: Tensor) -> Any:
        points = tuple(dual.primal.detach().contiguous() for dual in inputs)
        return torch.func.jvp(function, points, tangents)[1]

    rows = [
        pad_rows(expanded(dual), num_tangents).to(dual.primal.dtype).contiguous() for dual in inputs
    ]
    with _without_fused_kernels(func):
        return list(torch.func.vmap(along, randomness="same")(*rows))


@contextmanager
def _without_fused_kernels(func: Callable[..., Any]) -> Iterator[None]:
    """Fused attention and the fused LSTM have no forward derivative."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if func.__name__ == "lstm":
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


def _floating(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        if out.is_complex():
            raise NotImplementedError(
                "Tangents should be real. Found a function whose result is complex. Try an "
                "equivalent in real numbers, such as torch.view_as_real's layout."
            )
        return [out] if out.is_floating_point() else []
    if isinstance(out, (tuple, list)):
        return [tensor for item in out for tensor in _floating(item)]
    return []


def _differentiable(out: Any) -> bool:
    return bool(_floating(out))


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
