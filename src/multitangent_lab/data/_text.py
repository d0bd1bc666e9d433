"""A text, as windows of tokens."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent_lab._errors import DataError
from multitangent_lab._texts import read_text
from multitangent_lab.data._samples import Loss

Level = Literal["character", "byte"]

_MOST_UNKNOWN = 0.01  # as a share of the characters to validate or to test with
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, eq=False)
class Windows:
    """Tokens, cut into windows of T that do not overlap; the target is every token's successor.

    A rest that does not fill a window is left out.

    Args:
        tokens: A text, int64, `[L]` with L > T.
        context: T.

    Examples:
        >>> windows = Windows(torch.arange(10), context=4)
        >>> len(windows)
        2
        >>> inputs, targets = windows[torch.tensor([1])]
        >>> inputs.tolist(), targets.tolist()
        ([[4, 5, 6, 7]], [[5, 6, 7, 8]])
    """

    tokens: Tensor
    context: int

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    def __len__(self) -> int:
        return (len(self.tokens) - 1) // self.context

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and targets, `[B, T]` each."""
        places = torch.arange(self.context, device=self.device)
        places = indices[:, None] * self.context + places
        return self.tokens[places], self.tokens[places + 1]

    def first(self, count: int) -> Windows:
        """The first `count` windows, or all of them if there are fewer."""
        return Windows(self.tokens[: count * self.context + 1], self.context)


@dataclass(frozen=True, eq=False)
class Text:
    """A text in three parts, one after another: 90 % to train, 5 % to validate, 5 % to test.

    Args:
        train: What to train on.
        validation: What to choose by.
        test: What to report.
        level: What a token is.
        characters: The characters of `train` in their order: character i is token i. One more token
            stands for all that occur in the other parts only. Empty for bytes, which are their own
            tokens.
        unknown: How often each of those others occurs.
    """

    train: Windows
    validation: Windows
    test: Windows
    level: Level
    characters: str
    unknown: dict[str, int]

    @property
    def num_tokens(self) -> int:
        """V, how many tokens there are."""
        return 256 if self.level == "byte" else len(self.characters) + 1

    @property
    def context(self) -> int:
        """T, the length of a window."""
        return self.train.context

    @property
    def loss(self) -> Loss:
        return next_token_loss

    @property
    def token_loss(self) -> Loss:
        """The loss of every token, `[B, T]`."""
        return next_token_losses

    @property
    def has_classes(self) -> bool:
        return False

    @property
    def evaluation_batch(self) -> None:
        return None

    def decode(self, tokens: Tensor) -> str:
        """The text that `tokens`, `[L]`, stand for."""
        if self.level == "byte":
            return bytes(tokens.tolist()).decode(errors="replace")
        alphabet = self.characters + _REPLACEMENT
        return "".join(alphabet[token] for token in tokens.tolist())

    def description(self) -> dict[str, object]:
        """What the text came to, as JSON values."""
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        return {
            "level": self.level,
            "tokens": self.num_tokens,
            "windows": {name: len(part) for name, part in parts.items()},
            "unknown": self.unknown,
        }


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns every sample's mean cross-entropy per token, in nats.

    Args:
        logits: `[B, T, V]`.
        targets: The tokens that follow, `[B, T]`.

    Returns:
        `[B]`.

    Examples:
        >>> next_token_loss(torch.zeros(2, 3, 10), torch.zeros(2, 3, dtype=torch.int64)).exp()
        tensor([10., 10.])
    """
    return next_token_losses(logits, targets).mean(1)


def next_token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Returns the cross-entropy of every token, in nats.

    Args:
        logits: `[B, T, V]`.
        targets: The tokens that follow, `[B, T]`.

    Returns:
        `[B, T]`.

    Examples:
        >>> next_token_losses(torch.zeros(1, 3, 10), torch.zeros(1, 3, dtype=torch.int64)).exp()
        tensor([[10., 10., 10.]])
    """
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.reshape(targets.shape)


def load_text(
    path: Path | None = None,
    *,
    level: Level = "character",
    context: int = 64,
    device: torch.device | str = "cpu",
) -> Text:
    """Loads a text, cut into windows of tokens with their successors as targets.

    Args:
        path: The file; by default Python's own standard library, as far as
            `multitangent_lab._texts` takes it.
        level: Whether tokens are characters, of a file in UTF-8, or bytes, of any file.
        context: T, the tokens of a window.
        device: Where the tensors live.

    Raises:
        DataError: The file can not be read, is too short, is not UTF-8, or has too many characters
            towards its end that do not occur before.

    Examples:
        >>> text = load_text(context=24)  # no file is needed
        >>> inputs, targets = text.train[torch.tensor([0])]
        >>> inputs.shape, text.decode(inputs[0])
        (torch.Size([1, 24]), '\"\"\"Record of phased-in i')
    """
    content = read_text(path)
    tokens = _bytes(content) if level == "byte" else _code_points(content, path)
    ends = (len(tokens) * 9 // 10, len(tokens) * 19 // 20)
    train, validation, test = tokens.tensor_split(ends)
    _check_length(len(tokens), min(len(validation), len(test)), context, path)
    characters, unknown = "", Counter[str]()
    if level == "character":
        known = torch.unique(train)
        characters = "".join(map(chr, known.tolist()))
        for part in (validation, test):
            unknown += _unknown(part, known, path)
        train, validation, test = (_places(part, known) for part in (train, validation, test))
    return Text(
        train=Windows(train.to(device), context),
        validation=Windows(validation.to(device), context),
        test=Windows(test.to(device), context),
        level=level,
        characters=characters,
        unknown=dict(sorted(unknown.items())),
    )


def _bytes(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content or b"\0"), dtype=torch.uint8)[: len(content)].long()


def _code_points(content: bytes, path: Path | None) -> Tensor:
    try:
        wide = content.decode("utf-8").encode("utf-32-le")
    except UnicodeDecodeError as error:
        raise DataError(
            f"`data_file` should be text in UTF-8. Found byte {content[error.start]:#04x} at "
            f"position {error.start} of '{path}'. Try --level byte, which takes any file."
        ) from error
    return torch.frombuffer(bytearray(wide or bytes(4)), dtype=torch.int32)[: len(wide) // 4].long()


def _places(tokens: Tensor, known: Tensor) -> Tensor:
    """The place of every code point among the known ones, and behind them for others."""
    places = torch.searchsorted(known, tokens).clamp(max=len(known) - 1)
    return torch.where(known[places] == tokens, places, len(known))


def _unknown(tokens: Tensor, known: Tensor, path: Path | None) -> Counter[str]:
    """How often each character occurs that is not known."""
    found = tokens[~torch.isin(tokens, known)]
    counts = Counter(map(chr, found.tolist()))
    if len(found) > _MOST_UNKNOWN * len(tokens):
        raise DataError(
            "`data_file` should have the same characters throughout: its first 90 % are for "
            f"training, the rest is validated and tested. Found {len(found)} of {len(tokens)} "
            f"characters there that do not occur before, such as {counts.most_common(1)[0][0]!r}, "
            f"in '{path}'. Try --level byte, or a file whose parts are alike."
        )
    return counts


def _check_length(total: int, shortest: int, context: int, path: Path | None) -> None:
    if shortest <= context:
        raise DataError(
            f"`data_file` should have at least {20 * (context + 1)} tokens, so that its last "
            f"twentieth holds a window of {context} and its targets. Found {total} in '{path}'. "
            "Try a longer file, or a smaller context."
        )
