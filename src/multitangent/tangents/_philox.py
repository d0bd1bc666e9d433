"""Counter-based random numbers: the same bits on any device, in any order, in any pieces."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_WEYL = 0x9E3779B9, 0xBB67AE85  # by which the two halves of the key grow from round to round
_ROUNDS = 10
_WORD = 0xFFFFFFFF
_AT_ONCE = 2**14  # blocks of four words, whose numbers a core's cache holds
_LEVELS = 2**16  # of normal numbers
Draw = Callable[[Tensor, int, int, torch.dtype], Tensor]


def philox(counters: Tensor, key: int) -> Tensor:
    """Philox 4x32-10: four words of 32 random bits for every counter of 128 bits and a key of 64.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Words are whole numbers
    from 0 to ``2**32 - 1``, the lowest first.

    Args:
        counters: Four words each, int64 ``[4, n]``.
        key: The key.

    Returns:
        int64 ``[4, n]``.

    Examples:
        The first of the vectors that its authors publish:

        >>> [hex(int(word)) for word in philox(torch.zeros(4, 1, dtype=torch.int64), 0)]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    a, b, c, d = counters.unbind()
    low, high = key & _WORD, key >> 32 & _WORD
    for _ in range(_ROUNDS):
        # Products of two words may pass 2**63: the sign is then wrong, and no bit is.
        first, second = a * _MULTIPLIERS[0], c * _MULTIPLIERS[1]
        a = (second >> 32).bitwise_xor_(b).bitwise_xor_(low).bitwise_and_(_WORD)
        c = (first >> 32).bitwise_xor_(d).bitwise_xor_(high).bitwise_and_(_WORD)
        b, d = second, first  # whose lower halves count
        low, high = low + _WEYL[0] & _WORD, high + _WEYL[1] & _WORD
    return torch.stack([a, b & _WORD, c, d & _WORD])


def words(rows: Tensor, count: int, key: int) -> Tensor:
    """Random words for every row, as functions of the key, the row's number and their place.

    Args:
        rows: The numbers of the rows, int64 ``[r]``, below ``2**63``.
        count: How many words a row has.
        key: The key, of 64 bits.

    Returns:
        int32 ``[r, count]``, all 32 bits of which are random.
    """
    blocks = -(-count // 4)
    found = torch.empty(len(rows), blocks, 4, dtype=torch.int32, device=rows.device)
    place = torch.arange(blocks, device=rows.device)
    together = max(1, _AT_ONCE // blocks)
    for start in range(0, len(rows), together):
        some = rows[start : start + together]
        for first in range(0, blocks, _AT_ONCE):
            places = place[first : first + _AT_ONCE]
            shape = len(some), len(places)
            of_row, of_place = some[:, None].expand(shape), places.expand(shape)
            parts = of_place & _WORD, of_place >> 32, of_row & _WORD, of_row >> 32
            drawn = philox(torch.stack(parts).flatten(1), key)
            target = found[start : start + together, first : first + _AT_ONCE]
            target.copy_(drawn.view(4, *shape).movedim(0, -1))
    return found.flatten(1)[:, :count]


def rademacher(rows: Tensor, count: int, key: int, dtype: torch.dtype) -> Tensor:
    """+1 or -1, each with probability one half, ``[r, count]``: one bit each.

    Args:
        rows: The numbers of the rows, int64 ``[r]``.
        count: How many numbers a row has.
        key: The key, of 64 bits.
        dtype: Of the numbers.

    Examples:
        >>> rademacher(torch.arange(2), 4, key=1, dtype=torch.float32).shape
        torch.Size([2, 4])
    """
    table = _signs(dtype, rows.device)
    found = words(rows, -(-count // 32), key).view(torch.uint8)
    return table[found.int()].flatten(1)[:, :count]


def normal(rows: Tensor, count: int, key: int, dtype: torch.dtype) -> Tensor:
    """Normal numbers of variance 1, ``[r, count]``: 16 bits choose one of 65536 levels.

    The levels are the quantiles in the middle of equally likely parts, from -4.33 to 4.33, scaled
    such that their variance is 1. They are the same on every device, for no function but the choice
    is computed there.

    Args:
        rows: The numbers of the rows, int64 ``[r]``.
        count: How many numbers a row has.
        key: The key, of 64 bits.
        dtype: Of the numbers.

    Examples:
        >>> drawn = normal(torch.arange(8), 1000, key=1, dtype=torch.float64)
        >>> bool(abs(drawn.mean()) < 0.05), bool(abs(drawn.var() - 1) < 0.05)
        (True, True)
    """
    table = _levels(dtype, rows.device)
    found = words(rows, -(-count // 2), key).view(torch.int16)
    return table[found.int()][:, :count]  # a negative number counts from the end


def uniform(rows: Tensor, count: int, key: int, dtype: torch.dtype) -> Tensor:
    """Numbers from 0 to below 1, ``[r, count]``: multiples of ``2**-24``.

    Args:
        rows: The numbers of the rows, int64 ``[r]``.
        count: How many numbers a row has.
        key: The key, of 64 bits.
        dtype: Of the numbers.
    """
    found = words(rows, count, key).bitwise_right_shift_(8).bitwise_and_(2**24 - 1)
    return (found.float() * 2.0**-24).to(dtype)


def _kept(make: Callable[[], Tensor]) -> Callable[[torch.dtype, torch.device], Tensor]:
    """A table that is made once for every type and device."""

    @cache
    def table(dtype: torch.dtype, device: torch.device) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return make().to(device, dtype)

    return table


@_kept
def _signs() -> Tensor:
    """The signs of the eight bits of every byte, ``[256, 8]``."""
    bits = torch.arange(256)[:, None] >> torch.arange(8) & 1
    return 2.0 * bits - 1


@_kept
def _levels() -> Tensor:
    """The quantiles of the normal distribution, ``[65536]``."""
    middles = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    quantiles = torch.special.ndtri(middles)
    return quantiles / quantiles.square().mean().sqrt()
