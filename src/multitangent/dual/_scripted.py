"""Functions and methods of TorchScript, which ask nobody before they run."""

from __future__ import annotations

from typing import Any

import torch

from multitangent.dual._arguments import find_duals, primals
from multitangent.dual._fallback import fallback

_KINDS: tuple[Any, ...] = (torch._C.ScriptFunction, torch._C.ScriptMethod)
CALLS = {kind: kind.__call__ for kind in _KINDS}  # as PyTorch has them
_unoptimized: Any = torch.jit.optimized_execution  # type: ignore[attr-defined]
# What a run of a part of the batch would do unlike a run of the whole batch.
_UNLIKE = ("dropout", "batch_norm", "instance_norm", "rand", "bernoulli", "normal_", "uniform_")


def call(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A scripted function that takes dual tensors."""
    plain = CALLS[type(self)]
    if next(find_duals((args, kwargs)), None) is None or not torch.is_grad_enabled():
        return plain(self, *primals(args), **primals(kwargs))
    if getattr(getattr(self, "owner", None), "training", True):
        _refuse_random(self)

    def function(*args: Any, **kwargs: Any) -> Any:
        return plain(self, *args, **kwargs)

    function.__name__ = self.name
    with torch._C.DisableTorchFunction(), _unoptimized(False):
        return fallback(function, args, kwargs)


def _refuse_random(function: Any) -> None:
    graph = str(function.inlined_graph)
    for name in _UNLIKE:
        if f"aten::{name}" in graph:
            raise NotImplementedError(
                "A function of TorchScript should treat a part of a batch like the whole of it. "
                f"Found {name} in {function.name!r}, which TorchScript keeps to itself. Try the "
                "function or module before `torch.jit.script` or `torch.jit.trace`."
            )
