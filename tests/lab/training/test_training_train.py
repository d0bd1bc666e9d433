"""Runs on digits, of a few epochs."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from lightning.pytorch import Callback
from torch.nn.functional import cross_entropy

from multitangent_lab.config import GradientName
from multitangent_lab.data import load_dataset
from multitangent_lab.models import fully_connected
from multitangent_lab.training import (
    ConfigError,
    NonFiniteLoss,
    TrainConfig,
    TrainResult,
    evaluate_best,
    train,
)

GRADIENTS = get_args(GradientName)
SMALL = TrainConfig(width=8, num_tangents=4, epochs=4, batch_size=128, device="cpu")


class Killed(Exception):  # noqa: N818
    pass


class KillAfter(Callback):
    """Ends the run in the middle of the epoch after `epochs`."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, n: int
    ) -> None:
        if trainer.current_epoch == self.epochs and n == 3:
            raise Killed("in the middle")


def config(folder: Path, **changes: Any) -> TrainConfig:
    return replace(SMALL, run_dir=folder, **changes)


def metrics(result: TrainResult) -> list[dict[str, Any]]:
    return result.metrics().drop(columns="seconds").to_dict("records")


def weights(result: TrainResult, name: str = "last") -> dict[str, torch.Tensor]:
    return torch.load(result.run_dir / "checkpoints" / f"{name}.ckpt")["state_dict"]


def assert_same(found: TrainResult, expected: TrainResult) -> None:
    assert metrics(found) == metrics(expected)
    for name in ("last", "best"):
        torch.testing.assert_close(weights(found, name), weights(expected, name), rtol=0, atol=0)
    where = {"run_dir": Path(), "seconds_per_epoch": 0}
    assert replace(found, **where) == replace(expected, **where)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """An uninterrupted run."""
    return train(config(tmp_path_factory.mktemp("whole")))


def test_run_folder(whole: TrainResult) -> None:
    names = {"config.toml", "versions.json", "metrics.csv", "checkpoints", "curves.png"}
    assert {path.name for path in whole.run_dir.iterdir()} == names | {"result.json"}
    assert {p.name for p in (whole.run_dir / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert json.loads((whole.run_dir / "result.json").read_text()) == whole.as_json()
    assert json.loads((whole.run_dir / "versions.json").read_text())["torch"] == torch.__version__
    assert (whole.run_dir / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_metrics(whole: TrainResult) -> None:
    table = whole.metrics()
    columns = ["epoch", "step", "learning_rate", "train_loss", "validation_loss"]
    columns += ["validation_error", "seconds"]
    assert list(table) == columns
    assert table["epoch"].tolist() == [1, 2, 3, 4]
    assert table["step"].tolist() == [9, 18, 27, 36]
    assert (table["seconds"] > 0).all()


def test_result_is_that_of_the_best_epoch(whole: TrainResult) -> None:
    table = whole.metrics().set_index("epoch")
    assert whole.best_epoch == table["validation_loss"].idxmin()
    assert whole.validation_error == table["validation_error"][whole.best_epoch]
    assert 0 < whole.test_error < 1


def test_the_best_epoch_is_tested(tmp_path: Path) -> None:
    result = train(early(tmp_path))
    assert result.best_epoch < result.epochs
    digits = load_dataset("digits")
    model = fully_connected(digits.image_shape, digits.num_classes, SMALL.width)
    model.load_state_dict({k.removeprefix("model."): v for k, v in weights(result, "best").items()})
    for split, loss, error in (
        (digits.validation, result.validation_loss, result.validation_error),
        (digits.test, result.test_loss, result.test_error),
    ):
        logits = model(split.images)
        assert cross_entropy(logits, split.labels).item() == pytest.approx(loss, rel=1e-5)
        wrong = (logits.argmax(1) != split.labels).float().mean().item()
        assert wrong == pytest.approx(error)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_learns(gradient: str, tmp_path: Path) -> None:
    losses = train(config(tmp_path, gradient=gradient)).metrics()["train_loss"].tolist()
    assert losses[-1] < losses[0]


MEAN = {"gradient": "mean", "learning_rate": 0.05, "epochs": 1}


@pytest.fixture(scope="module")
def mean(tmp_path_factory: pytest.TempPathFactory) -> float:
    """The training loss of the first epoch with the mean, which depends on every setting."""
    result = train(config(tmp_path_factory.mktemp("mean"), **MEAN))
    return result.metrics()["train_loss"][0]


@pytest.mark.parametrize(
    "changes",
    [
        {"perturb": "weights"},
        {"share": "sample"},
        {"output": "exact"},
        {"simulated": True},
        {"differences": True},
        {"tangents": "rademacher"},
        {"tangents": "sphere"},
        {"tangents": "orthogonal"},
        {"optimizer": "AdamW"},
    ],
    ids=str,
)
def test_every_setting_reaches_the_run(
    changes: dict[str, Any], mean: float, tmp_path: Path
) -> None:
    result = train(config(tmp_path, **MEAN | changes))
    # The simulation and differences compute the same, up to rounding; nothing else does.
    same = result.metrics()["train_loss"][0] == pytest.approx(mean, rel=1e-5)
    assert same == bool({"simulated", "differences"} & changes.keys())


def test_tangents_of_low_rank_are_of_weights(mean: float, tmp_path: Path) -> None:
    losses = [
        train(config(tmp_path / name, **MEAN, perturb="weights", tangents=name)).metrics()[
            "train_loss"
        ][0]
        for name in ("normal", "low-rank")
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-5)


def test_same_seed_same_numbers(whole: TrainResult, tmp_path: Path) -> None:
    torch.manual_seed(1)  # must not matter
    assert_same(train(config(tmp_path / "same")), whole)
    other = train(config(tmp_path / "other", seed=1))
    assert metrics(other) != metrics(whole)


class Order(Callback):
    """Records the labels of the first batch of every epoch."""

    def __init__(self) -> None:
        self.labels: list[list[int]] = []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, n: int) -> None:
        if n == 0:
            self.labels.append(batch[1].tolist())


def test_every_epoch_has_its_own_order(tmp_path: Path) -> None:
    order, resumed = Order(), Order()
    train(config(tmp_path / "whole"), [order])
    assert len(set(map(tuple, order.labels))) == 4
    train(config(tmp_path / "parts", epochs=2))
    train(config(tmp_path / "parts", resume=True), [resumed])
    assert resumed.labels == order.labels[2:]


def test_leaves_global_state_alone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before, filters = torch.get_rng_state(), list(warnings.filters)
    train(config(tmp_path, epochs=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert warnings.filters == filters
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("gradient", ["backpropagation", "projection", "feedback", "local"])
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_resume_bit_for_bit(gradient: str, optimizer: str, tmp_path: Path) -> None:
    changes = {"gradient": gradient, "optimizer": optimizer}
    expected = train(config(tmp_path / "whole", **changes))
    with pytest.raises(Killed, match="in the middle"):
        train(config(tmp_path / "killed", **changes), [KillAfter(2)])
    with pytest.raises(ConfigError, match=r"begun before, in .*killed'. Try --resume"):
        train(config(tmp_path / "killed", **changes))
    assert_same(train(config(tmp_path / "killed", **changes, resume=True)), expected)


class Uphill(Callback):
    """Makes every epoch worse than those before."""

    def on_train_start(self, trainer: Any, module: Any) -> None:
        module.optimizer.param_groups[0]["lr"] = -0.1


def test_the_best_epoch_is_known_after_a_folder_was_moved(tmp_path: Path) -> None:
    part = train(config(tmp_path / "there", epochs=2))
    assert part.best_epoch == 2
    (tmp_path / "there").rename(tmp_path / "here")
    result = train(config(tmp_path / "here", epochs=4, resume=True), [Uphill()])
    assert (result.best_epoch, result.epochs) == (2, 4)
    assert result.test_loss == part.test_loss


def test_resume_before_the_first_checkpoint(whole: TrainResult, tmp_path: Path) -> None:
    with pytest.raises(Killed, match="in the middle"):
        train(config(tmp_path), [KillAfter(0)])
    assert_same(train(config(tmp_path, resume=True)), whole)


@pytest.mark.parametrize("name", ["last", "best"])
@pytest.mark.parametrize("length", [0, 1000])
def test_a_checkpoint_that_is_cut_off(tmp_path: Path, name: str, length: int) -> None:
    train(config(tmp_path, epochs=1))
    path = tmp_path / "checkpoints" / f"{name}.ckpt"
    path.write_bytes(path.read_bytes()[:length])
    for take in (train, evaluate_best) if name == "best" else (train,):
        with pytest.raises(ConfigError, match=rf"{name}.ckpt', which is cut off .*Try to delete"):
            take(config(tmp_path, epochs=2, resume=True))


def test_resume_with_more_epochs(whole: TrainResult, tmp_path: Path) -> None:
    train(config(tmp_path, epochs=2))
    with pytest.raises(ConfigError, match="Try --resume"):
        train(config(tmp_path))
    assert_same(train(config(tmp_path, resume=True)), whole)
    with pytest.raises(ConfigError, match=r"with epochs = 4 \(now 2\)"):
        train(config(tmp_path, epochs=2, resume=True))


def test_another_run_is_not_resumed(whole: TrainResult) -> None:
    with pytest.raises(ConfigError, match=r"with width = 8 \(now 9\).*another --run-dir"):
        train(config(whole.run_dir, width=9, resume=True))


@pytest.mark.parametrize("resume", [False, True])
def test_a_finished_run_is_not_run_again(whole: TrainResult, resume: bool) -> None:
    before = (whole.run_dir / "metrics.csv").stat().st_mtime_ns
    assert train(config(whole.run_dir, resume=resume)) == whole
    assert (whole.run_dir / "metrics.csv").stat().st_mtime_ns == before


def test_a_run_killed_before_its_test_is_only_tested(whole: TrainResult, tmp_path: Path) -> None:
    train(config(tmp_path))
    (tmp_path / "result.json").unlink()
    assert_same(train(config(tmp_path, resume=True), [KillAfter(4)]), whole)


def early(folder: Path, **changes: Any) -> TrainConfig:
    """With this learning rate the loss does not improve for long."""
    changes = {"learning_rate": 2.0, "gradient": "backpropagation", "epochs": 50} | changes
    return config(folder, patience=2, **changes)


def test_early_stopping(tmp_path: Path) -> None:
    result = train(early(tmp_path))
    assert result.epochs == result.best_epoch + 2 < 50
    assert len(result.metrics()) == result.epochs


def test_a_run_that_stopped_early_is_not_continued(tmp_path: Path) -> None:
    expected = train(early(tmp_path / "whole"))
    train(early(tmp_path / "killed"))
    (tmp_path / "killed" / "result.json").unlink()
    assert_same(train(early(tmp_path / "killed", resume=True)), expected)
    more = train(early(tmp_path / "killed", epochs=60, resume=True))
    assert_same(more, expected)


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_non_finite_loss(gradient: str, tmp_path: Path) -> None:
    message = r"\w+_loss` should be finite. Found .* in epoch 1, step \d+. .*--learning-rate"
    rate = 1e30 if gradient == "mezo" else 1e9  # whose units are all dead at once otherwise
    with pytest.raises(NonFiniteLoss, match=message):
        train(config(tmp_path, gradient=gradient, learning_rate=rate))


def test_derivatives_that_are_not_finite(tmp_path: Path) -> None:
    def overflow(gradient: Any) -> None:
        gradient.aggregator(torch.eye(1), torch.tensor([torch.inf]))

    class Overflow(Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            inner = module.gradient
            module.gradient = lambda *batch: overflow(inner)

    with pytest.raises(
        NonFiniteLoss, match=r"`derivatives of train_loss` should be finite.*step 1"
    ):
        train(config(tmp_path), [Overflow()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "SDG"}, "`optimizer` should be one of .* Try 'SGD'"),
        ({"tensorboard": True}, "`tensorboard` should be installed"),
        ({"device": "cuda"}, "Found no CUDA device"),
    ],
    ids=str,
)
def test_a_refused_run_leaves_nothing(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("lightning.pytorch.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    folder = tmp_path / "run"
    with pytest.raises(ConfigError, match=message):
        train(config(folder, **changes))
    assert not folder.exists()


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"`run_dir` should be a folder. Found the file"):
        train(config(tmp_path / "run"))
