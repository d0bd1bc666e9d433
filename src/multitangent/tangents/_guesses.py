"""What sources of guesses have in common."""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor

from multitangent.tangents._observation import Needs
from multitangent.tangents._request import Request
from multitangent.tangents._source import TangentSource, check_count


class GuessSource(TangentSource):
    """A description of guesses; `init` makes what draws them, with a state, for one gradient."""

    def __post_init__(self) -> None:
        check_count(self.num_tangents)

    @property
    def guesses(self) -> tuple[bool, ...]:
        return (True,) * self.num_tangents

    def draw(self, request: Request) -> Tensor:
        raise RuntimeError(
            f"`{self!r}` learns from step to step, and should be drawn from after `init()`. "
            "Found a single draw. Try ForwardGradient, which keeps what is learned."
        )


Options = TypeVar("Options", bound=GuessSource)


class StatefulSource(TangentSource, Generic[Options]):
    """A source of guesses with its state."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.num_tangents = options.num_tangents

    @property
    def guesses(self) -> tuple[bool, ...]:
        return self.options.guesses

    def needs(self, step: int) -> Needs:
        return Needs.UPDATE

    def __repr__(self) -> str:
        return repr(self.options)


def guess_block(guess: Tensor, request: Request, num_tangents: int) -> Tensor:
    """A guess ``[b, *shape]`` as the block of its site, in row ``site mod K``.

    Rows behind the last one in use so far are left out: before the first K sites have passed, the
    model carries fewer tangents.
    """
    row = request.site % num_tangents
    used = min(request.site + 1, num_tangents)
    if used == 1:
        return guess.unsqueeze(0)
    block = guess.new_zeros(used, *guess.shape)
    block[row] = guess
    return block
