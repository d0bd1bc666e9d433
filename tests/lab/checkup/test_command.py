"""The command `multitangent doctor`, as a process where its exit code matters."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from multitangent_lab.cli import main
from multitangent_lab.config import DOCTOR_PRESETS, TRAIN_PRESETS

MINE = """
import warnings

import torch
from torch import nn


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.rfft(x).abs()


def layers(middle):
    return nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 2))


def batch():
    return torch.randn(6, 4), torch.randint(2, (6,))


class Chain(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


def bad():
    model = Chain(nn.Linear(4, 8), Spectrum(), nn.Linear(5, 2))
    return model, batch(), nn.CrossEntropyLoss()


def normed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        layer = nn.utils.weight_norm(nn.Linear(8, 8))
    return layers(layer), batch(), nn.CrossEntropyLoss()


def alone():
    return layers(nn.Tanh())


def broken():
    return nn.Linear(3, 2), batch(), nn.CrossEntropyLoss()


def turned():
    return nn.Linear(4, 2), nn.CrossEntropyLoss(), batch()


def data():
    parts = [(torch.randn(9, 4), torch.randint(2, (9,))) for _ in range(3)]
    return *parts, nn.CrossEntropyLoss()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "theirs.py").write_text(MINE)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from multitangent_lab.cli import main; sys.exit(main())"
    paths = [str(Path(path).resolve()) for path in sys.path if path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-P", "-c", code, "doctor", *arguments],
        capture_output=True, text=True, env=environment, cwd=folder,
    )  # fmt: skip


def test_a_model_with_an_unsupported_part_exits_with_1(folder: Path) -> None:
    found = run(folder, "theirs:bad")
    assert found.returncode == 1, found.stderr
    assert re.search(r"not supported:\n    fft_rfft in 1\n .*complex", found.stdout)
    assert found.stderr == ""


def test_a_model_that_is_repaired_exits_with_0(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(["doctor", "theirs:normed", "--fix", "--json", "--perturb", "weights"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["failed"] is False and value["fault"] == ""
    assert value["repairs"][0].startswith("1: torch.nn.utils.weight_norm of 'weight'")
    assert value["dimension"] == sum(value["sites"].values()) > 100
    assert value["expected"]["num_tangents"] == 16


def test_a_model_with_data_of_ones_own(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert main(["doctor", "theirs:alone", "--data", "theirs:data"]) == 0
    out = capsys.readouterr().out
    assert "n = 10 (0 8, 2 2)" in out and "4 samples at once" in out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["theirs:alone"], 2, "returns a model alone. Try"),
        (["theirs:broken"], 1, "Model and loss should run on the batch"),
        (["theirs:turned"], 2, "a tuple of Linear, CrossEntropyLoss, tuple. Try"),
        (["resnet"], 2, "Try 'resnet18'"),
        (["fc", "--data", "theirs:data"], 2, "Try it without --data"),
        (["fc", "--batch-size", "0"], 2, "should be at least 1"),
        (["."], 2, "checkpoint of transformers. Found"),
    ],
)
def test_bad_input(
    arguments: list[str], code: int, message: str, folder: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(folder)
    assert main(["doctor", *arguments]) == code
    assert message in capsys.readouterr().err


def test_the_presets_are_those_of_train() -> None:
    assert {name: p.width for name, p in DOCTOR_PRESETS.items()} == {
        name: p.width for name, p in TRAIN_PRESETS.items()
    }
    assert {p.model for p in DOCTOR_PRESETS.values()} == {p.model for p in TRAIN_PRESETS.values()}


@pytest.mark.parametrize("name", DOCTOR_PRESETS)
def test_a_preset_exits_with_0(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--preset", name, "--device", "cpu"]) == 0
    assert "self-test passed" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["fc", "resnet18", "vit", "gpt"])
def test_models_of_the_laboratory(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", model, "--batch-size", "3", "--context", "8", "--device", "cpu"]) == 0
    assert "self-test passed" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["GPT2", "T5", "ViT"])
def test_a_checkpoint_of_transformers(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tf = pytest.importorskip("transformers")
    small = {
        "GPT2": ("LMHeadModel", {"vocab_size": 11, "n_positions": 8, "n_embd": 4, "n_layer": 2,
                                 "n_head": 2}),
        "T5": ("ForConditionalGeneration", {"vocab_size": 11, "d_model": 4, "d_kv": 2, "d_ff": 6,
                                            "num_layers": 1, "num_heads": 2}),
        "ViT": ("ForImageClassification", {"image_size": 4, "patch_size": 2, "hidden_size": 4,
                                           "num_hidden_layers": 1, "num_attention_heads": 2,
                                           "intermediate_size": 6, "num_labels": 3}),
    }  # fmt: skip
    head, options = small[kind]
    torch.manual_seed(0)
    model = getattr(tf, kind + head)(getattr(tf, f"{kind}Config")(**options))
    model.save_pretrained(tmp_path / "whole")
    model.config.architectures = [kind + head]
    model.config.save_pretrained(tmp_path / "config")
    for name in ("whole", "config"):
        assert main(["doctor", str(tmp_path / name), "--device", "cpu"]) == 0
    assert capsys.readouterr().out.count("self-test passed") == 2


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("LMHeadModel", "Found '.*'"),
        ("ForSequenceClassification", "raises ValueError: Cannot"),
        (None, "no class .* such as"),
    ],
)
def test_a_checkpoint_that_does_not_run(
    head: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tf = pytest.importorskip("transformers")
    config = tf.GPT2Config(n_embd=4, n_head=2, n_layer=1, vocab_size=11)
    config.architectures = head and [f"GPT2{head}"]
    config.save_pretrained(tmp_path)
    if head == "LMHeadModel":
        (tmp_path / "model.safetensors").write_bytes(b"half of a file")
    assert main(["doctor", str(tmp_path), "--device", "cpu"]) == 2
    assert re.search(message, capsys.readouterr().err)
