"""The table of how long it took until a loss was reached."""

from __future__ import annotations

from pathlib import Path

import pytest

from multitangent_lab.cli import main


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--width", "16", "--epochs", "2", "--device", "cpu", "--run-dir", str(tmp_path)]
    gradients = ["--gradients", "backpropagation", "mean"]
    asked = ["--until-backpropagation", "--evaluate-every", "6"]
    assert main(["compare", *small, *gradients, *asked]) == 0
    output = capsys.readouterr().out
    table = output[output.index("loss to") :].splitlines()
    (first,) = (line.split() for line in table if "backpropagation" in line)
    assert [first[2], first[-1]] == ["5%", "1.00x"]
    (mean,) = (line.split() for line in table if line.strip().startswith("mean"))
    assert mean[1] == first[1]
    assert mean[-2:] == ["not", "reached"]
    assert "clock.png" in table[-1]


def test_losses_to_reach_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--until-backpropagation", "--until-loss", "0.5"]) == 2
    assert "Found both, and 0.5. Try one of them." in capsys.readouterr().err
