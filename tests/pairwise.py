"""Tables of cases in which every two values meet, in place of the full product."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows with one value of each axis, such that any two values of two axes share a row.

    Faults that need three particular values at once are rare; those of two are all found, with
    about as many rows as the product of the two longest axes.

    Examples:
        >>> len(pairwise("ab", "cde", "fgh"))
        9
    """
    missing = {
        ((i, a), (j, b))
        for i, j in combinations(range(len(axes)), 2)
        for a in range(len(axes[i]))
        for b in range(len(axes[j]))
    }
    rows = []
    while missing:
        row = dict(min(missing))  # the first pair that is missing, and greedily what adds most
        for axis in range(len(axes)):
            if axis not in row:
                row[axis] = max(
                    range(len(axes[axis])),
                    key=lambda value, axis=axis: sum(
                        tuple(sorted([(axis, value), known])) in missing for known in row.items()
                    ),
                )
        missing -= set(combinations(sorted(row.items()), 2))
        rows.append(tuple(axes[axis][row[axis]] for axis in range(len(axes))))
    return rows
