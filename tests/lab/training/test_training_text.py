"""Language models and models of the user's own, from a configuration to a result."""

import importlib
import json
import math
import random
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from multitangent_lab.config import SearchConfig
from multitangent_lab.data import DataError, load_text
from multitangent_lab.training import CompareConfig, ConfigError, TrainConfig, compare, train
from multitangent_lab.training._named_gradients import guessing

SMALL = TrainConfig(
    dataset="text", model="gpt", context=8, embedding=16, blocks=2, heads=2, batch_size=16,
    images=160, epochs=3, learning_rate=0.01, device="cpu",
)  # fmt: skip
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return written(tmp_path)


def written(folder: Path, seed: int = 0) -> Path:
    path = folder / f"words{seed}.txt"
    path.write_text(" ".join(random.Random(seed).choices(WORDS, k=1500)))
    return path


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Killed(Exception):  # noqa: N818
    pass


class KillInEpoch(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, n: int
    ) -> None:
        if trainer.current_epoch == self.epoch and n == 3:
            raise Killed("in the middle")


def config(folder: Path, text: Path, **changes: Any) -> TrainConfig:
    return replace(SMALL, run_dir=folder, data_file=text, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient": "backpropagation"},
        {"gradient": "projection"},
        {"gradient": "mean", "perturb": "weights", "optimizer": "Adam"},
        {"gradient": "informed"},
        {"gradient": "previous"},
        {"gradient": "projection", "level": "byte"},
        {"gradient": "projection", "learning_rate": "auto", "optimizer": "SGD"},
    ],
    ids=str,
)
def test_the_loss_falls(changes: dict[str, Any], text: Path, tmp_path: Path) -> None:
    result = train(config(tmp_path / "run", text, **changes))
    losses = result.metrics()["train_loss"].tolist()
    assert losses[2] < losses[1] < losses[0]
    uniform = math.log(load_text(text, level=changes.get("level", "character")).num_tokens)
    assert 0 < result.validation_loss < uniform
    assert result.validation_error is None and result.test_error is None
    assert result.metrics()["validation_error"].isna().all()


def test_the_reported_loss_is_that_of_all_tokens(text: Path, tmp_path: Path) -> None:
    result = train(config(tmp_path / "run", text, gradient="backpropagation", epochs=1))
    state = torch.load(result.run_dir / "checkpoints" / "best.ckpt")["state_dict"]
    from multitangent_lab.models import gpt

    data = load_text(text, context=8)
    model = gpt(data.num_tokens, 8, embedding=16, blocks=2, heads=2)
    model.load_state_dict({name.removeprefix("model."): v for name, v in state.items()})
    inputs, targets = data.test[torch.arange(len(data.test))]
    loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert result.test_loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("gradient", ["backpropagation", "informed", "projection"])
def test_resume_bit_for_bit(gradient: str, text: Path, tmp_path: Path) -> None:
    def numbers(folder: str) -> dict[str, Any]:
        table = (tmp_path / folder / "metrics.csv").read_text().splitlines()
        rows = [line.rpartition(",")[0] for line in table]  # without the seconds
        state = torch.load(tmp_path / folder / "checkpoints" / "last.ckpt")["state_dict"]
        return {"rows": rows, "sum": sum(v.double().sum().item() for v in state.values())}

    whole = train(config(tmp_path / "whole", text, gradient=gradient))
    with pytest.raises(Killed, match="in the middle"):
        train(config(tmp_path / "parts", text, gradient=gradient), [KillInEpoch(1)])
    parts = train(config(tmp_path / "parts", text, gradient=gradient, resume=True))
    assert numbers("parts") == numbers("whole")
    assert parts.test_loss == whole.test_loss


def test_the_folder_says_what_the_text_was(text: Path, tmp_path: Path) -> None:
    result = train(config(tmp_path / "run", text, gradient="backpropagation", epochs=1))
    stored = tomllib.loads((result.run_dir / "config.toml").read_text())
    assert stored["text_hash"] == config(tmp_path, text).resolved().text_hash
    described = json.loads((result.run_dir / "data.json").read_text())
    assert described["windows"]["train"] == 160
    assert described["tokens"] == load_text(text).num_tokens


def test_another_text_is_another_run(text: Path, tmp_path: Path) -> None:
    one = replace(SMALL, data_file=text).resolved()
    moved = tmp_path / "moved.txt"
    moved.write_bytes(text.read_bytes())
    assert replace(SMALL, data_file=moved).resolved().run_dir == one.run_dir
    other = replace(SMALL, data_file=written(tmp_path, seed=1)).resolved()
    assert other.run_dir != one.run_dir
    folder = tmp_path / "run"
    train(config(folder, text, gradient="backpropagation", epochs=1))
    text.write_text(text.read_text() + ".")
    with pytest.raises(ConfigError, match=r"with text_hash = '\w+' \(now '\w+'\)"):
        train(config(folder, text, gradient="backpropagation", epochs=1, resume=True))
    stored = tomllib.loads((folder / "config.toml").read_text())
    again = TrainConfig(**stored | {"run_dir": str(tmp_path / "again")})
    with pytest.raises(ConfigError, match=r"`data_file` should hold the same text .* Found '\w+'"):
        train(again)


def test_compare_judges_by_losses(text: Path, tmp_path: Path) -> None:
    shared = {
        name: getattr(SMALL, name)
        for name in ("dataset", "model", "context", "embedding", "blocks", "heads", "images")
    }
    comparison = compare(
        CompareConfig(
            **shared, data_file=text, epochs=1, num_tangents=4, run_dir=tmp_path / "all",
            gradients=("backpropagation", "informed"),
        )
    )  # fmt: skip
    assert all(result.test_error is None for result in comparison.results)
    assert (tmp_path / "all" / "curves.png").exists()
    assert (tmp_path / "all" / "quality.png").exists()


BAD = {
    "a model that is close": ({"model": "gtp"}, "`model` should be one of fc.* Try 'gpt'"),
    "images": ({"model": "gpt"}, "`dataset` should be text for gpt. Found 'digits'"),
    "no tokens": ({"dataset": "text"}, "`model` should be one for tokens .* Found 'fc'"),
    "width": ({"dataset": "text", "model": "gpt", "width": 8}, "`width` .* Try `embedding`"),
    "blocks": ({"blocks": 3}, "`blocks` should be set for the model gpt only"),
    "one block": ({"dataset": "text", "blocks": 1}, "`blocks` should be at least 2. Found 1"),
    "level": ({"level": "byte"}, "`level` should be set for --dataset text only. Found byte"),
    "file": ({"data_file": "x"}, "`data_file` should be set for --dataset text only. Found x"),
    "heads": ({"dataset": "text", "model": "gpt", "heads": 3}, "`heads` should divide"),
    "no file": (
        {"dataset": "text", "model": "gpt", "data_file": "nowhere"},
        "`data_file` should be a file that can be read. Found 'nowhere'",
    ),
    "rate": (
        {"dataset": "text", "model": "gpt", "optimizer": "SGD"},
        "`learning_rate` should be given for SGD and the model gpt",
    ),
    "feedback": (
        {"dataset": "text", "model": "gpt", "gradient": "feedback"},
        "`gradient` should not be feedback for a text",
    ),
    "data": ({"data": "x"}, "`data` should be package.module:factory. Found 'x'"),
    "both": (
        {"data": "a:b", "model": "a:c", "dataset": "mnist"},
        "`dataset` should be left out with --data. Found both, mnist and a:b",
    ),
    "ours on theirs": ({"data": "a:b"}, "`model` should be one of your own with data of your own"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_settings_that_do_not_fit(name: str) -> None:
    changes, message = BAD[name]
    with pytest.raises((ConfigError, DataError), match=message):
        TrainConfig(**changes).resolved()


def test_hashes_of_before_are_kept() -> None:
    """Stored runs and searches are found again."""
    informed = TrainConfig(gradient="informed", learn_every=1)
    assert informed.resolved().hash == "2f7ae1ab82c7"
    five = ("backpropagation", "single", "mean", "projection", "informed")
    comparison = CompareConfig(gradients=five, learn_every=1).resolved()
    assert str(comparison.run_dir) == "runs/compare-digits-0ce6036027e2"
    assert SearchConfig().hash == "047db84fc92e"
    search = SearchConfig(model="vit", dataset="cifar10", gradient="mean", sampler="grid")
    assert search.hash == "78292d3baeef"


def test_settings_of_a_language_model_tell_runs_apart(text: Path) -> None:
    known = {replace(SMALL, data_file=text).resolved().hash}
    for change in (
        {"context": 4}, {"embedding": 8}, {"blocks": 3}, {"heads": 4}, {"level": "byte"},
    ):  # fmt: skip
        found = replace(SMALL, data_file=text, **change).resolved().hash
        assert found not in known
        known.add(found)
    searches = {SearchConfig(dataset="text", model="gpt", data_file=f).hash for f in (text, None)}
    assert len(searches) == 2


def test_optimizer_and_rate_of_a_language_model() -> None:
    found = TrainConfig(dataset="text", model="gpt").resolved()
    assert (found.optimizer, found.learning_rate) == ("AdamW", 0.0015)
    assert TrainConfig().resolved().optimizer == "SGD"


def test_guesses_for_many_outputs() -> None:
    found = guessing("informed", 8, 3, few_outputs=False)
    assert str(found) == "RunningMean(num_tangents=1, decay=0.9) + OwnValue(num_tangents=1)"


MODULE = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

def classifier():
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))

def bigrams(text):
    return nn.Sequential(nn.Embedding(text.num_tokens, 8), nn.Linear(8, text.num_tokens))

def part(count):
    x = torch.randn(count, 4)
    return x, x[:, :1] * x[:, 1:2]

def regression():
    torch.manual_seed(0)
    return part(128), part(32), part(32), nn.MSELoss()

def classes():
    torch.manual_seed(0)
    parts = [torch.randn(n, 4) for n in (128, 32, 32)]
    return *((x, x[:, :3].argmax(1)) for x in parts), nn.CrossEntropyLoss()

def scalar():
    return *regression()[:3], nn.functional.mse_loss

def fails():
    raise ValueError("no such luck")

def takes(one, two):
    return model()

constant = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the user's own, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    package = tmp_path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "things.py").write_text(MODULE)
    importlib.invalidate_caches()
    yield "own_package.things"
    for name in [name for name in sys.modules if name.startswith("own_package")]:
        del sys.modules[name]


OWN: dict[str, Any] = {"epochs": 3, "batch_size": 16, "learning_rate": 0.01, "device": "cpu"}


@pytest.mark.parametrize("gradient", ["backpropagation", "projection", "informed"])
@pytest.mark.parametrize(
    ("model", "data", "has_error"),
    [("model", "regression", False), ("classifier", "classes", True)],
)
def test_own_model_and_data(
    model: str, data: str, has_error: bool, gradient: str, module: str, tmp_path: Path
) -> None:
    result = train(
        TrainConfig(
            **OWN, gradient=gradient, model=f"{module}:{model}", data=f"{module}:{data}",
            run_dir=tmp_path / "run",
        )  # type: ignore[arg-type]
    )  # fmt: skip
    losses = result.metrics()["train_loss"].tolist()
    assert losses[2] < losses[0]
    assert (result.test_error is not None) == has_error


def test_own_model_of_a_text(module: str, text: Path, tmp_path: Path) -> None:
    own = {"dataset": "text", "data_file": text, "context": 8, "images": 160}
    model = f"{module}:bigrams"
    result = train(
        TrainConfig(**OWN, **own, model=model, gradient="projection", run_dir=tmp_path / "run")
    )
    losses = result.metrics()["train_loss"].tolist()
    assert losses[2] < losses[0]


def test_own_code_that_changed_is_another_run(module: str, tmp_path: Path) -> None:
    own = {"model": f"{module}:model", "data": f"{module}:regression", "epochs": 1}
    one = TrainConfig(**OWN | own, gradient="backpropagation", run_dir=tmp_path / "run")
    train(one)
    assert train(one).epochs == 1  # stored
    file = tmp_path / "own_package" / "things.py"
    file.write_text(file.read_text() + "# changed\n")
    with pytest.raises(ConfigError, match=r"with code_hash = '\w+' \(now '\w+'\)"):
        train(one)
    stored = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    with pytest.raises(ConfigError, match="your own model and data should be in the same files"):
        train(TrainConfig(**stored | {"run_dir": "again"}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "nowhere:model"}, "`model` should name a module that can be found. Found 'nowh"),
        ({"model": "own_package.nowhere:model"}, "no module 'own_package.nowhere' in"),
        ({"data": "nowhere.at.all:data"}, "`data` should name a module that can be found"),
        (
            {"model": "{}:mode"},
            "`model` should name a function. .* has no such name. Try one of ",
        ),
        ({"data": "{}:constant"}, "`data` should name a function. .* has int there"),
        (
            {"model": "{}:fails"},
            "'own_package.things:fails' raises ValueError: no such luck. ",
        ),
        ({"model": "{}:takes"}, "`model` should name a function that takes OwnData. .*TypeError"),
        ({"model": "{}:part"}, "`model` should name a function that takes OwnData"),
        ({"model": "{}:regression"}, "returns a torch.nn.Module. Found .* returns tuple"),
        ({"data": "{}:model"}, "`data` should return train, validation, test, loss"),
        ({"model": "broken:model"}, "whose import raises NameError: name 'nothing' is not defined"),
        ({"model": "own_package things:model"}, "`model` should be one of .* own. Found 'own_pack"),
    ],
    ids=str,
)
def test_bad_factories(changes: dict[str, str], message: str, module: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("nothing\n")
    own = {"model": "{}:model", "data": "{}:regression"} | changes
    folder = tmp_path / "run"
    with pytest.raises((ConfigError, DataError), match=message):
        train(TrainConfig(**OWN, **{n: v.format(module) for n, v in own.items()}, run_dir=folder))
    assert not folder.exists()


def test_a_loss_that_is_one_number_is_refused_by_forward_gradients(
    module: str, tmp_path: Path
) -> None:
    own = {"model": f"{module}:model", "data": f"{module}:scalar"}
    with pytest.raises(ValueError, match="`loss` should return one number per sample"):
        train(TrainConfig(**OWN, **own, gradient="projection", run_dir=tmp_path / "run"))
