"""Language models and a user's own models on the command line: the commands of the documentation.

They run as processes, in a folder of their own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from multitangent_lab.cli import main

PAGE = (Path(__file__).parents[3] / "docs" / "own-models.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    multitangent (.+)$", PAGE, flags=re.MULTILINE)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the files that the page shows."""
    (tmp_path / "mine.py").write_text("\n\n".join(blocks("python")))
    small, tokens = blocks("toml")
    (tmp_path / "small.toml").write_text(small)
    (tmp_path / "tokens.toml").write_text(tokens)
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The installed command does not look for modules in the working directory by itself."""
    code = "import sys; from multitangent_lab.cli import main; sys.exit(main())"
    paths = [str(Path(path).resolve()) for path in sys.path if path]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        capture_output=True, text=True, env=environment, cwd=folder,
    )  # fmt: skip


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) == 4


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_of_the_page(command: str, folder: Path) -> None:
    found = run(folder, *command.split())
    assert found.returncode == 0, found.stderr
    unit = " nats per character" if "--dataset text" in command else ""
    sentence = rf"test loss \d\.\d{{4}}, validation loss \d\.\d{{4}}{unit} \(epoch \d of \d\), .*\n"
    assert re.fullmatch(sentence, found.stdout), found.stdout
    assert "arning" not in found.stderr
    assert re.search(r"loss \d\.\d{3}  validation \d\.\d{3}", found.stderr)
    (made,) = (folder / "runs").iterdir()
    name = "text-" if "--dataset text" in command else "mine.data-"
    assert made.name.startswith(name)
    assert json.loads((made / "result.json").read_text())["test_error"] is None


def test_a_text_of_ones_own(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    words = "train --model gpt --dataset text --config small.toml --data-file text.txt --json"
    own = ["--gradient", "projection", "--level", "byte", "--epochs"]
    assert main([*words.split(), *own, "1"]) == 0
    assert main([*words.split(), *own, "2", "--resume"]) == 0
    first, second = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert second["epochs"] == 2
    assert second["validation_loss"] < first["validation_loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model gtp", "`model` should be one of fc, .* Found 'gtp'. Try 'gpt'."),
        ("--model gpt", "`dataset` should be text for gpt. Found 'digits'."),
        ("--model gpt --dataset text --data-file no.txt", "`data_file` should be a file that can"),
        ("--model nowhere:model --data mine:data", "`model` should name a module that can be"),
        ("--model mine:nothing --data mine:data", "`model` should name a function.* Try one of "),
        ("--model mine:model --data mine:model", "`data` should return train, validation, test"),
        ("--data mine:data", "`model` should be one of your own with data of your own"),
    ],
)
def test_bad_input_is_one_line(
    arguments: str,
    message: str,
    folder: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    assert main(["train", *arguments.split()]) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(rf"multitangent: {message}.*\n", err), err
    assert not (folder / "runs").exists()


def test_compare_has_losses_in_its_table(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "two.toml").write_text(
        (folder / "small.toml").read_text() + "gradients = ['backpropagation', 'informed']\n"
    )
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 300)
    words = "compare --model gpt --dataset text --data-file text.txt --epochs 1 --config two.toml"
    assert main(words.split()) == 0
    out = capfd.readouterr().out
    assert "losses in nats per character" in out
    assert "%" not in out
