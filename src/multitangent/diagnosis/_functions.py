"""Which functions of a model meet tangents, where they do, and how they carry them."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as hooks

from multitangent.diagnosis._remedies import attention_to_repair
from multitangent.diagnosis._report import Finding, Support
from multitangent.dual import (
    constant,
    function_name,
    is_query,
    observed_functions,
    record_fallbacks,
)

_NO_RULE = (
    "nothing needs to be done; `multitangent.dual.register_rule` adds a rule, which is quicker"
)
_NO_ADVICE = "functions of PyTorch that docs/supported.md lists, or `perturb='weights'`"


def find_functions(
    model: nn.Module, loss: Any, run: Callable[[], Any]
) -> tuple[tuple[Finding, ...], Exception | None]:
    """The functions that meet dual tensors during a run, with the modules that call them.

    A function that can not carry tangents is noted, and the run goes on with a constant in place of
    its result, so that one run finds all of them.

    Args:
        model: The model, whose modules are named.
        loss: The loss.
        run: Pushes tangents through model and loss.

    Returns:
        The functions in the order of their first call. Then the error that ended the run, if it
        came from none of these functions.
    """
    notes = _Notes(model, loss)
    error: Exception | None = None
    try:
        with notes.of_modules(), observed_functions(notes.observe):
            run()
    except Exception as found:
        if not notes.has_unsupported:  # otherwise it may follow from them
            notes.add_error(found)
            error = found
    return notes.findings(), error


class _Notes:
    """The functions that were seen so far."""

    def __init__(self, model: nn.Module, loss: Any) -> None:
        named = {id(module): name for name, module in reversed(list(model.named_modules()))}
        parts = loss.modules() if isinstance(loss, nn.Module) else ()
        self._names = {id(part): "(loss)" for part in parts} | named | {id(model): "(model)"}
        self._running: list[nn.Module] = []
        self._paths: dict[tuple[str, Support], dict[str, None]] = {}
        self._advice: dict[str, tuple[str, str]] = {}

    @property
    def has_unsupported(self) -> bool:
        return any(support == "unsupported" for _, support in self._paths)

    def findings(self) -> tuple[Finding, ...]:
        return tuple(
            Finding(function, support, tuple(paths), *self._said(function, support))
            for (function, support), paths in self._paths.items()
        )

    def _said(self, function: str, support: Support) -> tuple[str, str]:
        if support == "unsupported":
            return self._advice[function]
        return "", _NO_RULE if support == "fallback" else ""

    @property
    def _path(self) -> str:
        return self._names.get(id(self._running[-1]), "(model)") if self._running else "(loss)"

    @contextmanager
    def of_modules(self) -> Iterator[None]:
        """Keep track of the module that runs. It stays known after an error ends the run."""

        def enter(module: nn.Module, inputs: Any) -> None:
            if id(module) in self._names:
                self._running.append(module)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            if any(module is running for running in self._running):
                while self._running.pop() is not module:
                    pass

        handles = [
            hooks.register_module_forward_pre_hook(enter),
            hooks.register_module_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def observe(
        self,
        compute: Callable[..., Any],
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Note a function, and return what it returns."""
        if is_query(func):
            return compute(func, args, kwargs)
        try:
            with record_fallbacks() as names:
                out = compute(func, args, dict(kwargs))
        except Exception as error:
            with torch.no_grad():
                try:
                    out = constant(func, args, kwargs)
                except Exception:
                    raise error from None  # the model itself is at fault
            self._advise(function_name(func), error)
            return out
        self._add(function_name(func), "fallback" if names else "rule", self._path)
        return out

    def add_error(self, error: Exception) -> None:
        """Note an error that came from none of the observed functions."""
        place = _place(error)
        if place is not None:
            self._advise(place, error)
            return
        # A check of the library, which names what it found.
        names = [name for name in _QUOTED.findall(str(error)) if name in self._names.values()]
        self._advise("ForwardGradient", error, *(names or ["(model)"]))

    def _advise(self, function: str, error: Exception, *paths: str) -> None:
        reason, remedy = _reason_and_remedy(error)
        if any(attention_to_repair(module) for module in self._running):
            remedy = "`fix=True`, or `set_attn_implementation('sdpa')`"
        self._advice.setdefault(function, (reason, remedy))
        for path in paths or [self._path]:
            self._add(function, "unsupported", path)

    def _add(self, function: str, support: Support, path: str) -> None:
        self._paths.setdefault((function, support), {})[path] = None


def _reason_and_remedy(error: Exception) -> tuple[str, str]:
    """What an error says, and what it advises: errors end in "Try ..."."""
    text = " ".join(str(error).split()) or "no reason is given"
    reason, advises, remedy = text.partition(" Try ")
    name = type(error).__name__
    return f"{name}: {reason}", remedy.rstrip(".") if advises else _NO_ADVICE


_QUOTED = re.compile("'([^']+)'")
_OF_OTHERS = re.compile(r"[/\\](torch|multitangent)[/\\]")


def _place(error: BaseException) -> str | None:
    """The innermost line of others' code that an error passed, if it passed any."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _OF_OTHERS.search(frame.filename)]
    if not own:
        return None
    return f"{own[-1].name} ({Path(own[-1].filename).name}, line {own[-1].lineno})"
