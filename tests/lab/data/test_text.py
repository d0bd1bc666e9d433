"""A text: its parts, tokens and windows."""

from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from multitangent_lab._texts import read_text, text_hash
from multitangent_lab.data import (
    Batches,
    DataError,
    Text,
    Windows,
    first_images,
    load_text,
    next_token_loss,
)

LETTERS = "etaoin shrdlu\nÄß→😀"


def written(folder: Path, count: int = 4000, letters: str = LETTERS) -> Path:
    """A file of random letters."""
    path = folder / "text.txt"
    path.write_bytes("".join(random.Random(0).choices(letters, k=count)).encode())
    return path


def all_windows(windows: Windows) -> tuple[torch.Tensor, torch.Tensor]:
    return windows[torch.arange(len(windows))]


@given(st.integers(1, 40), st.integers(1, 12))
@settings(deadline=None, max_examples=50)
def test_windows_follow_one_another_and_targets_are_successors(length: int, context: int) -> None:
    tokens = torch.arange(length + context)
    windows = Windows(tokens, context)
    inputs, targets = all_windows(windows)
    assert inputs.shape == targets.shape == (len(windows), context)
    assert inputs.flatten().tolist() == list(range(len(windows) * context))
    assert torch.equal(targets, inputs + 1)
    assert len(tokens) - inputs.numel() <= context  # no more than one window and a target is left


def test_the_first_windows() -> None:
    windows = Windows(torch.arange(100), 7)
    for part, whole in zip(all_windows(windows.first(3)), all_windows(windows), strict=True):
        assert torch.equal(part, whole[:3])
    assert len(windows.first(1000)) == len(windows)


@pytest.mark.parametrize("level", ["character", "byte"])
@pytest.mark.parametrize("context", [5, 32])
def test_the_parts_are_the_text(level: str, context: int, tmp_path: Path) -> None:
    path = written(tmp_path)
    text = load_text(path, level=level, context=context)  # type: ignore[arg-type]
    parts = (text.train, text.validation, text.test)
    tokens = torch.cat([part.tokens for part in parts])
    assert text.decode(tokens) == path.read_text(encoding="utf-8")
    shares = [len(part.tokens) / len(tokens) for part in parts]
    assert shares == pytest.approx([0.9, 0.05, 0.05], abs=1e-3)
    assert tokens.dtype == torch.int64
    assert tokens.min() >= 0 and tokens.max() < text.num_tokens


def test_a_newline_of_two_characters_stays(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"ab\r\n" * 200)
    text = load_text(path, context=4)
    assert text.characters == "\n\rab"
    assert text.decode(text.train.tokens[:8]) == "ab\r\nab\r\n"


def test_characters_are_those_of_the_training_part(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab" * 1000 + "abéabab", encoding="utf-8")
    text = load_text(path, context=4)
    assert (text.characters, text.num_tokens, text.unknown) == ("ab", 3, {"é": 1})
    assert (text.test.tokens == 2).sum() == 1
    assert "ab\N{REPLACEMENT CHARACTER}ab" in text.decode(text.test.tokens)
    assert text.description()["unknown"] == {"é": 1}
    assert load_text(path, level="byte", context=4).unknown == {}


def test_too_many_characters_that_training_lacks(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("ab" * 900 + "xyxx" * 50)
    with pytest.raises(DataError, match=r"Found 100 of 100 characters .* such as 'x'.* --level by"):
        load_text(path, context=4)
    assert load_text(path, level="byte", context=4).num_tokens == 256


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"abc" * 100 + b"\xff" + b"abc" * 100)
    with pytest.raises(DataError, match=r"UTF-8. Found byte 0xff at position 300 .*--level byte"):
        load_text(path, context=4)
    assert int(load_text(path, level="byte", context=4).train.tokens[300]) == 255


@pytest.mark.parametrize("level", ["character", "byte"])
def test_how_short_a_text_may_be(level: str, tmp_path: Path) -> None:
    for count in (0, 1, 20 * 8):
        path = written(tmp_path, count, "ab")
        with pytest.raises(DataError, match=rf"at least 180 tokens.* Found {count} in"):
            load_text(path, level=level, context=8)  # type: ignore[arg-type]
    text = load_text(written(tmp_path, 20 * 9, "ab"), level=level, context=8)  # type: ignore[arg-type]
    assert min(map(len, (text.train, text.validation, text.test))) == 1


@pytest.mark.parametrize("name", ["nowhere.txt", "."])
def test_a_file_that_can_not_be_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"`data_file` should be a file .* Found '.*Try another"):
        load_text(tmp_path / name)


def test_the_standard_library_is_text() -> None:
    content = read_text(None)
    assert content == read_text(None)
    assert 1_000_000 < len(content) <= 2_000_000
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    assert content.startswith((stdlib / "__future__.py").read_bytes())
    assert (stdlib / "argparse.py").read_bytes() in content
    assert b"_sysconfigdata" not in content[:100_000]
    text = load_text()
    assert len(text.train) > 10_000
    assert sum(text.unknown.values()) < 100


def test_the_checksum_is_that_of_the_content(tmp_path: Path) -> None:
    path = written(tmp_path)
    before = text_hash(path)
    (tmp_path / "moved.txt").write_bytes(path.read_bytes())
    assert text_hash(tmp_path / "moved.txt") == before
    path.write_bytes(path.read_bytes() + b".")
    assert text_hash(path) != before


def test_batches_are_a_function_of_seed_and_epoch(tmp_path: Path) -> None:
    text = load_text(written(tmp_path), context=8)

    def epoch(seed: int, number: int) -> list[list[int]]:
        batches = Batches(text.train, 16, shuffle=True, seed=seed)
        batches.set_epoch(number)
        return [row.tolist() for inputs, _ in batches for row in inputs]

    assert epoch(0, 1) == epoch(0, 1)
    assert epoch(0, 1) != epoch(0, 2)
    assert epoch(0, 1) != epoch(1, 1)
    assert sorted(epoch(0, 1)) == sorted(epoch(0, 2)) == sorted(all_windows(text.train)[0].tolist())


def test_fewer_windows(tmp_path: Path) -> None:
    text = load_text(written(tmp_path), context=8)
    fewer = first_images(text, 40)
    assert isinstance(fewer, Text)
    assert (len(fewer.train), len(fewer.validation)) == (40, 10)
    assert len(fewer.test) == len(text.test)


def test_the_loss_is_the_mean_over_the_tokens_of_a_window() -> None:
    logits = torch.randn(3, 5, 7, dtype=torch.float64)
    targets = torch.randint(7, (3, 5))
    losses = next_token_loss(logits, targets)
    for loss, rows, answers in zip(losses, logits, targets, strict=True):
        assert loss.item() == pytest.approx(nn.CrossEntropyLoss()(rows, answers).item())
    whole = nn.CrossEntropyLoss()(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(losses.mean(), whole)
