"""How long it takes until a validation loss is reached."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import pandas as pd
import pytest
from lightning.pytorch import Callback, Trainer

from multitangent_lab.training import (
    CompareConfig,
    ConfigError,
    GradientModule,
    TrainConfig,
    compare,
    reached,
    seconds_per_step,
    train,
)

# 18 steps an epoch
SMALL = TrainConfig(gradient="backpropagation", width=16, epochs=4, device="cpu")
LOSSES = ["epoch", "step", "validation_loss", "validation_error"]


class KilledError(Exception):
    pass


class Killer(Callback):
    """Ends a run before a step, as if it had been killed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise KilledError


class Steps(Callback):
    """Counts steps."""

    count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1


def losses(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "progress.csv")[LOSSES]


def test_validations_within_epochs(tmp_path: Path) -> None:
    result = train(replace(SMALL, evaluate_every=5, run_dir=tmp_path, epochs=2))
    found = result.progress()
    assert list(found["step"]) == [0, 5, 10, 15, 18, 20, 25, 30, 35, 36]
    assert list(found["epoch"]) == pytest.approx([step / 18 for step in found["step"]])
    assert found["seconds"].is_monotonic_increasing
    assert found["seconds"].iloc[0] == found["processor_seconds"].iloc[0] == 0
    assert found["processor_seconds"].is_monotonic_increasing
    at_ends = found[found["step"].isin([18, 36])]
    for column in ("validation_loss", "validation_error"):
        assert list(at_ends[column]) == list(result.metrics()[column])


@pytest.mark.parametrize("gradient", ["backpropagation", "informed"])
def test_a_run_is_not_changed_by_it(gradient: Any, tmp_path: Path) -> None:
    config = replace(SMALL, gradient=gradient, epochs=2)
    plain = train(replace(config, run_dir=tmp_path / "a"))
    often = train(replace(config, run_dir=tmp_path / "b", evaluate_every=1))
    columns = ["epoch", "step", "train_loss", "validation_loss", "validation_error"]
    pd.testing.assert_frame_equal(plain.metrics()[columns], often.metrics()[columns])
    assert plain.test_loss == often.test_loss


OWN = """
from torch import nn

def model(data):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 10)
    )
"""


def test_statistics_of_normalisation_are_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "normalised.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = replace(
        SMALL, model="normalised:model", width=256, epochs=2, optimizer="SGD", learning_rate=0.05
    )
    config = replace(config, recalibrate=True)
    plain = train(replace(config, run_dir=tmp_path / "a"))
    often = train(replace(config, run_dir=tmp_path / "b", evaluate_every=3))
    columns = ["epoch", "train_loss", "validation_loss"]
    pd.testing.assert_frame_equal(plain.metrics()[columns], often.metrics()[columns])
    lagging = train(replace(config, run_dir=tmp_path / "c", evaluate_every=3, recalibrate=False))
    one, other = (run.progress()["validation_loss"].iloc[1] for run in (often, lagging))
    assert one < other  # whose statistics are still near those of the start


def test_validations_cost_no_time_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate = GradientModule.validate

    def slow(self: GradientModule, batches: Any) -> dict[str, float]:
        sleep(0.5)
        return validate(self, batches)

    monkeypatch.setattr(GradientModule, "validate", slow)
    result = train(replace(SMALL, epochs=1, evaluate_every=4, run_dir=tmp_path))
    assert result.progress()["seconds"].iloc[-1] < 1.5  # five validations took 2.5
    assert result.seconds_per_epoch < 1.5


def test_a_run_stops_at_a_loss(tmp_path: Path) -> None:
    whole = train(replace(SMALL, evaluate_every=4, run_dir=tmp_path / "whole")).progress()
    wanted = float(whole["validation_loss"].iloc[8])
    first = whole[whole["validation_loss"] <= wanted].iloc[0]
    assert first["step"] % 18  # within an epoch
    config = replace(SMALL, evaluate_every=4, until_loss=wanted, run_dir=tmp_path / "stops")
    result = train(config)
    progress = result.progress()
    assert progress["step"].iloc[-1] == first["step"]
    assert progress["validation_loss"].iloc[-1] <= wanted
    pd.testing.assert_frame_equal(progress[LOSSES], whole[whole["step"] <= first["step"]][LOSSES])
    assert result.validation_loss == pytest.approx(progress["validation_loss"].iloc[-1])
    part = result.metrics()["seconds"].iloc[-1]
    assert (part < result.seconds_per_epoch) or result.epochs > 1


def test_without_steps_the_ends_of_epochs_count(tmp_path: Path) -> None:
    whole = train(replace(SMALL, run_dir=tmp_path / "whole"))
    wanted = whole.metrics()["validation_loss"].iloc[1]
    result = train(replace(SMALL, until_loss=float(wanted), run_dir=tmp_path / "stops"))
    assert result.epochs == 2
    assert list(result.progress()["step"]) == [0, 18, 36]
    assert list(whole.progress()["step"]) == [18, 36, 54, 72]  # of metrics.csv
    assert whole.progress()["seconds"].is_monotonic_increasing


@pytest.mark.parametrize("step", [3, 27, 50])
def test_a_killed_run_goes_on(step: int, tmp_path: Path) -> None:
    config = replace(SMALL, evaluate_every=5)
    train(replace(config, run_dir=tmp_path / "whole"))
    killed = replace(config, run_dir=tmp_path / "killed", resume=True)
    with pytest.raises(KilledError):
        train(killed, [Killer(step)])
    train(killed)
    pd.testing.assert_frame_equal(losses(tmp_path / "whole"), losses(tmp_path / "killed"))


def test_a_run_that_is_killed_after_it_stopped_does_not_train_on(tmp_path: Path) -> None:
    config = replace(SMALL, evaluate_every=4, until_loss=1.8, run_dir=tmp_path, resume=True)
    result = train(config)
    assert result.progress()["step"].iloc[-1] % 18
    before = losses(tmp_path)
    (tmp_path / "result.json").unlink()
    for epochs in (4, 5):
        steps = Steps()
        again = train(replace(config, epochs=epochs), [steps])
        assert steps.count == 0
        assert (again.test_loss, again.epochs) == (result.test_loss, result.epochs)
        pd.testing.assert_frame_equal(losses(tmp_path), before)


def test_stored_names_stay() -> None:
    always = TrainConfig(gradient="informed", learn_every=1)
    hashes = always.resolved().hash, replace(SMALL, width=64, epochs=200).resolved().hash
    assert hashes == HASHES
    comparison = CompareConfig(gradients=FIVE, learn_every=1)
    assert str(comparison.resolved().run_dir) == FOLDER
    for changed in ({"until_loss": 0.5}, {"evaluate_every": 3}):
        assert replace(always, **changed).resolved().hash != HASHES[0]
        assert str(replace(comparison, **changed).resolved().run_dir) != FOLDER
    until = replace(comparison, until_backpropagation=True).resolved().run_dir
    assert str(until) != FOLDER


HASHES = ("2f7ae1ab82c7", "22711fcfe3db")
FIVE = ("backpropagation", "single", "mean", "projection", "informed")
FOLDER = "runs/compare-digits-0ce6036027e2"


def test_until_backpropagation(tmp_path: Path) -> None:
    config = CompareConfig(
        gradients=("projection", "backpropagation", "informed"),
        width=16,
        epochs=3,
        evaluate_every=6,
        until_backpropagation=True,
        run_dir=tmp_path,
        device="cpu",
        estimates=1,
    )
    comparison = compare(config)
    names = [result.gradient for result in comparison.results]
    assert names == list(config.gradients)
    projection, backpropagation, informed = comparison.results
    least = backpropagation.progress()["validation_loss"].min()
    assert comparison.until_loss == least
    assert backpropagation.epochs == 3
    *near, exact = comparison.reached(backpropagation)
    assert exact.loss == least
    assert exact.steps is not None and all((found.steps or 0) <= exact.steps for found in near)
    for result in (projection, informed):
        reached_it = comparison.reached(result)[-1]
        progress = result.progress()
        assert (reached_it.steps is None) == (progress["validation_loss"].min() > least)
        if reached_it.steps is not None:
            assert progress["step"].iloc[-1] == reached_it.steps  # and then it stopped
    assert (tmp_path / "clock.png").stat().st_size > 1000
    stored = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert [found["above"] for found in stored[0]["reached"]] == [0.05, 0.02, 0]
    started: list[str] = []
    steps = Steps()
    again = compare(config, lambda run: started.append(run.label) or (steps,))
    assert again.results == comparison.results
    assert steps.count == 0


def test_until_a_loss_backpropagation_stops_too(tmp_path: Path) -> None:
    config = CompareConfig(
        gradients=("backpropagation", "mean"), width=16, epochs=3, until_loss=2.15, device="cpu",
        evaluate_every=2, run_dir=tmp_path, estimates=1,
    )  # fmt: skip
    comparison = compare(config)
    backpropagation, mean = comparison.results
    assert backpropagation.progress()["step"].iloc[-1] < 18
    assert comparison.reached(mean)[-1].seconds is None
    runs = json.loads((tmp_path / "comparison.json").read_text())["runs"]
    assert runs[1]["reached"][-1] == {
        "above": 0.0, "loss": 2.15, "seconds": None, "steps": None, "epochs": None,
    }  # fmt: skip


def test_without_a_loss_nothing_is_added(tmp_path: Path) -> None:
    config = CompareConfig(gradients=("backpropagation",), width=8, epochs=1, run_dir=tmp_path)
    comparison = compare(config)
    assert comparison.reached(comparison.results[0]) == ()
    assert not (tmp_path / "clock.png").exists()
    assert "reached" not in (tmp_path / "comparison.json").read_text()


def test_the_first_validation_counts() -> None:
    progress = pd.DataFrame(
        {
            "epoch": [0, 0.5, 1, 1.5],
            "step": [0, 9, 18, 27],
            "seconds": [0.0, 1.0, 2.0, 3.0],
            "validation_loss": [3.0, 1.05, 2.0, 1.0],
        }
    )
    five, two, exact = reached(progress, 1.0)
    assert (five.steps, five.epochs, five.seconds) == (9, 0.5, 1.0)
    assert (two.steps, exact.steps) == (27, 27)
    assert two.loss == pytest.approx(1.02)


def test_slow_steps_count_if_there_are_many_of_them() -> None:
    """One step in four takes 5, the others 1; validations are 8 steps apart."""
    durations = [5.0 if step % 4 == 0 else 1.0 for step in range(80)]
    durations[0] = durations[70] = 100.0  # a first step, and a busy machine
    steps = list(range(0, 81, 8))
    progress = pd.DataFrame({"step": steps, "seconds": [sum(durations[:step]) for step in steps]})
    assert seconds_per_step(progress) == 2
    assert seconds_per_step(progress.iloc[:1]) is None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"until_backpropagation": True, "until_loss": 0.5}, r"Found both, and 0\.5\. Try"),
        ({"until_backpropagation": True, "gradients": ("mean",)}, r"Found mean\. Try"),
        ({"until_loss": 0.0}, r"`until_loss` should be positive.*Found 0\.0"),
        ({"evaluate_every": 0}, r"`evaluate_every` should be at least 1\. Found 0"),
    ],
)
def test_what_does_not_fit(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        CompareConfig(**settings)
