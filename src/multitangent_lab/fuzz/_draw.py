"""Random choices that a seed fixes, tables of building blocks, and those that wait for a mend."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Table = Mapping[str, Callable[..., Any]]

# Building blocks that are wrong or unclear today. The command draws them with `--pending` alone.
PENDING: set[str] = set()


def table(text: str, arguments: str, names: dict[str, Any]) -> Table:
    """Building blocks by their own text: one a line, or several that differ in ``{one two}``.

    Args:
        text: Python expressions; lines that begin with a space go on with the one before.
        arguments: What the expressions are functions of.
        names: What else the expressions use, beside `torch`, `nn` and `F`.

    Examples:
        >>> table("abs({x -x})", "x", {})["abs(-x)"](3)
        3
    """
    lines = re.sub(r"\n +", " ", text.strip()).splitlines()
    blocks = [
        line.replace(f"{{{found[1]}}}", one) if found else line
        for line in lines
        for found in [re.search(r"{(.*)}", line)]
        for one in (found[1].split() if found else [""])
    ]
    names = {"torch": torch, "nn": nn, "F": F, **names}
    return {block: eval(f"lambda {arguments}: {block}", names) for block in blocks}


class Draw(Random):
    """Random choices: two with the same seed make the same ones.

    Attributes:
        pending: Whether building blocks that are pending are drawn too.
    """

    pending = False

    def allows(self, block: str) -> bool:
        """Whether a building block may be drawn."""
        return self.pending or block not in PENDING

    def name(self, *tables: Mapping[str, Any]) -> str:
        """The name of a building block of one of these tables."""
        names = [name for table in tables for name in table]
        while not self.allows(name := self.choice(names)):
            pass
        return name

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random() < probability

    def axis(self, x: Tensor) -> int:
        """One of the axes of a tensor, counted from either end."""
        return self.randrange(-x.ndim, x.ndim) if x.ndim else 0

    def rows(self, x: Tensor, count: int = 3, axis: int = 0) -> Tensor:
        """Positions along an axis, some of them twice."""
        return torch.tensor([self.randrange(x.shape[axis]) for _ in range(count)])

    def mask(self, shape: Sequence[int]) -> Tensor:
        """True and false in equal parts."""
        size = torch.Size(shape).numel()
        return torch.tensor([self.chance(0.5) for _ in range(size)]).reshape(shape)

    def tensor(self, *shape: int) -> Tensor:
        """Normal numbers; one tensor in four is rounded, and so has exact zeros and ties."""
        x = torch.randn(shape)
        return x.mul(2).round().div(2) if self.chance(0.25) else x
