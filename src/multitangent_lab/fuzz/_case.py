"""One case of the fuzz: a pure function of a seed and an index."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from multitangent import NonFiniteError
from multitangent_lab.fuzz._comparison import Case, Values, difference
from multitangent_lab.fuzz._draw import Draw
from multitangent_lab.fuzz._functions import draw_functions
from multitangent_lab.fuzz._modules import draw_modules
from multitangent_lab.fuzz._states import draw_states

KINDS: dict[str, Callable[[Draw], Case]] = {
    "functions": draw_functions,
    "modules": draw_modules,
    "states": draw_states,
}
Verdict = Literal["right", "refused", "wrong", "unclear"]


@dataclass(frozen=True)
class Result:
    """What came of a case.

    Attributes:
        index: Its number; that modulo 3 is its kind.
        kind: functions, modules or states.
        verdict: right; refused with an error that says what was found and what to try; wrong;
            unclear: any other error, where plain PyTorch has none.
        blocks: What the case is made of.
        settings: Shapes and options, in words.
        detail: What differs, or the error.
    """

    index: int
    kind: str
    verdict: Verdict
    blocks: tuple[str, ...]
    settings: str
    detail: str = ""


def run_case(seed: int, index: int, *, pending: bool = False) -> Result:
    """Draw a case and compare.

    Args:
        seed: The seed of the fuzz.
        index: The number of the case.
        pending: Whether building blocks that are pending are drawn too.

    Examples:
        >>> run_case(0, 0).kind
        'functions'
    """
    kind = list(KINDS)[index % len(KINDS)]
    r = Draw(f"{seed} {index}")
    r.pending = pending
    with _surroundings(r):
        case, expected = _drawn(KINDS[kind], r)
        verdict, detail = _judged(case, expected)
    return Result(index, kind, verdict, case.blocks, case.settings, detail)


def _drawn(draw: Callable[[Draw], Case], r: Draw) -> tuple[Case, Values]:
    """A case that plain PyTorch can do, to finite values, and those."""
    while True:
        case = draw(r)
        try:
            expected = case.expected()
        except Exception:
            continue
        if all(v.isfinite().all() and (v.abs() < _LARGE).all() for v in expected.values()):
            return case, expected


def _judged(case: Case, expected: Values) -> tuple[Verdict, str]:
    try:
        found = difference(expected, case.found(), case.tolerance)
    except NonFiniteError as error:  # backpropagation's values are finite
        return "wrong", str(error)
    except Exception as error:
        return "refused" if _is_clear(error) else "unclear", f"{type(error).__name__}: {error}"
    return "wrong" if found else "right", found


_LARGE = 1e4


@contextmanager
def _surroundings(r: Draw) -> Iterator[None]:
    """Double precision and random numbers of the case's own, without warnings."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(r.getrandbits(32))
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _is_clear(error: Exception) -> bool:
    kinds = ValueError, RuntimeError, NotImplementedError, TypeError
    return isinstance(error, kinds) and "Found" in str(error) and "Try" in str(error)
