"""The command line, as a process where that matters and in this one where it does not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import torch

from multitangent_lab.cli import commands, main, parse
from multitangent_lab.training import TrainConfig, train

SMALL = ["--width", "8", "--num-tangents", "4", "--batch-size", "128", "--device", "cpu"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """For small tensors, threads cost more than they bring, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "multitangent_lab.cli", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment)


def test_parsing_loads_neither_torch_nor_lightning() -> None:
    code = (
        "import sys; from multitangent_lab.cli import parse; parse(['train', '--preset', 'paper']);"
        "print({'torch', 'lightning', 'pandas', 'matplotlib', 'sklearn'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "set()\n"


def test_help() -> None:
    found = run("--help")
    assert found.returncode == 0
    assert {"train", "compare"} <= set(found.stdout.split())


@pytest.mark.parametrize("name", commands())
def test_help_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    options = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out)) - {"--help"}
    assert {"--json", "--config", "--preset"} <= options
    assert len(options) < 24


def test_train_as_a_process(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    found = run("train", *SMALL, "--epochs", "2", "--run-dir", str(folder), "--json")
    assert found.returncode == 0, found.stderr
    value = json.loads(found.stdout)
    assert found.stdout.count("\n") == 1
    assert value == json.loads((folder / "result.json").read_text())
    assert (value["gradient"], value["num_tangents"], value["epochs"]) == ("informed", 4, 2)
    assert "informed-4" in found.stderr
    assert "epoch 2/2" in found.stderr
    assert "arning" not in found.stderr


def test_kill_and_resume(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    arguments = ["train", *SMALL, "--epochs", "40", "--json", "--run-dir"]
    process = subprocess.Popen(
        command(*arguments, str(killed)), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        while not (killed / "checkpoints" / "last.ckpt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not (killed / "result.json").exists()
    assert main([*arguments, str(killed), "--resume"]) == 0
    assert main([*arguments, str(whole)]) == 0
    found, expected = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    different = {name for name in expected if found[name] != expected[name]}
    assert different == {"run_dir", "seconds_per_epoch"}
    tables = [
        pd.read_csv(folder / "metrics.csv").drop(columns="seconds") for folder in (killed, whole)
    ]
    pd.testing.assert_frame_equal(*tables, check_exact=True)


def test_compare(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", *SMALL, "--epochs", "2", "--run-dir", str(tmp_path)]
    assert main(arguments) == 0
    printed = capfd.readouterr()
    for name in ("backpropagation", "single", "mean", "projection", "1.00x", "curves.png"):
        assert name in printed.out
    assert printed.err.count("epoch 2/2") == 5
    assert main([*arguments, "--json"]) == 0
    printed = capfd.readouterr()
    runs = json.loads(printed.out)["runs"]
    assert [value["epochs"] for value in runs] == [2, 2, 2, 2, 2]
    assert runs[0]["ratio_to_backpropagation"] == 1
    assert printed.err == ""  # nothing was left to do


def test_non_finite_loss(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rate = ["--learning-rate", "1e9", "--gradient", "backpropagation"]
    assert main(["train", *SMALL, *rate, "--run-dir", str(tmp_path)]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(
        r"multitangent: `train_loss` should be finite. Found nan in epoch 1, step \d. "
        "Try a lower --learning-rate.",
        err.splitlines()[-1],
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "Adma"], "`optimizer` should be one of .* Found 'Adma'."),
        (["--epochs", "0"], "`epochs` should be at least 1. Found 0."),
        (["--preset", "papier"], "`preset` should be one of demo, paper. .* Try 'paper'."),
        (["--preset", "a"], "`preset` should be one of demo, paper. Found 'a'. Try 'demo'."),
        (["--config", "nowhere.toml"], "`--config` should be a TOML file. Found 'nowhere.toml'"),
        (["--dataset", "mnist", "--data-dir", "nowhere"], "`data_dir` should be a folder."),
    ],
    ids=str,
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(rf"multitangent: {message}.*\n", err)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--dataset", "mnits"], "invalid choice 'mnits' for argument '--dataset'"),
        (["train", "--widht", "3"], "Unrecognized options: --widht"),
        (["trian"], "Available subcommands: train, compare"),
        ([], "Expected one of {train, compare"),
    ],
)
def test_unknown_option(arguments: list[str], message: str) -> None:
    found = run(*arguments)
    assert found.returncode == 2
    assert found.stdout == ""
    assert message in found.stderr


def settings(*arguments: str) -> TrainConfig:
    return parse(["train", *arguments])[1].settings


def test_defaults_then_preset_then_file_then_flags(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("width = 11\nbatch_size = 12\npatience = 13\nshare = 'sample'\n")
    found = settings("--batch-size", "14", "--config", str(file), "--preset", "paper")
    assert found.seed == TrainConfig().seed
    assert found.dataset == "mnist"  # of the preset
    assert (found.width, found.patience, found.share) == (11, 13, "sample")  # of the file
    assert found.batch_size == 14
    assert settings() == TrainConfig()
    assert settings(f"--config={file}").width == 11


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("widht = 3", "'widht'. Try 'width'."),
        ("width = 'x'", "`width` should be a whole number. Found 'x'."),
        ("width = ", "`--config` should be a TOML file."),
    ],
)
def test_bad_file(
    text: str, message: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(text)
    assert main(["train", "--config", str(tmp_path / "run.toml")]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert message in err


def test_the_stored_configuration_finds_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    result = train(TrainConfig(width=8, epochs=1, gradient="backpropagation", run_dir=tmp_path))
    assert main(["train", "--config", str(tmp_path / "config.toml"), "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == result.as_json()


def test_traceback_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULTITANGENT_TRACEBACK", "1")
    with pytest.raises(RuntimeError, match="`epochs` should be at least 1"):
        main(["train", "--epochs", "0"])


def test_lr_suggest(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--reference-rate", "0.5", "--num-tangents", "16", "--dimension", "64"]
    assert main(["lr-suggest", *arguments, "--aggregator", "mean", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["learning_rate"] == pytest.approx(8 / 81)
    assert main(["lr-suggest", *arguments, "--headroom", "inf"]) == 0
    assert capsys.readouterr().out == "learning rate 2\n"
    assert main(["lr-suggest", "--reference-rate", "-1"]) == 2
    assert "`reference_rate` should be positive and finite. Found -1.0" in capsys.readouterr().err


def test_lr_search_and_its_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, trained = tmp_path / "found", tmp_path / "trained"
    few = ["--epochs", "1", "--trials", "2", "--run-dir", str(found)]
    shorter = SMALL[:-2]  # the device is no option of a search
    assert main(["lr-search", *shorter, *few, "--json"]) == 0
    rate = json.loads(capsys.readouterr().out)["learning_rate"]
    preset = ["--preset", str(found / "preset.toml")]
    assert main(["train", *preset, "--run-dir", str(trained), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["learning_rate"] == rate
    assert main(["train", "--preset", "nowhere.toml"]) == 2
    assert "should be a TOML file. Found 'nowhere.toml'" in capsys.readouterr().err


def test_a_learning_rate_that_sets_itself(tmp_path: Path) -> None:
    folder = tmp_path / "auto"
    arguments = ["train", *SMALL, "--batch-size", "16", "--learning-rate", "auto", "--epochs"]
    assert main([*arguments, "3", "--run-dir", str(folder)]) == 0
    rates = pd.read_csv(folder / "metrics.csv")["learning_rate"]
    assert rates.nunique() == 3
    parts = tmp_path / "parts"
    assert main([*arguments, "2", "--run-dir", str(parts)]) == 0
    assert main([*arguments, "3", "--run-dir", str(parts), "--resume"]) == 0
    resumed = pd.read_csv(parts / "metrics.csv").drop(columns="seconds")
    pd.testing.assert_frame_equal(
        resumed, pd.read_csv(folder / "metrics.csv").drop(columns="seconds")
    )


def test_backpropagation_has_no_rate_that_sets_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--gradient", "backpropagation", "--learning-rate", "auto"]) == 2
    assert "`learning_rate` should be a number for backpropagation" in capsys.readouterr().err
