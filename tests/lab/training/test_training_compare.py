from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from multitangent_lab.training import CompareConfig, compare, train
from multitangent_lab.training._curves import draw_curves

SMALL = CompareConfig(width=8, num_tangents=4, epochs=2, batch_size=256, device="cpu")


def test_compare(tmp_path: Path) -> None:
    comparison = compare(replace(SMALL, run_dir=tmp_path))
    assert [result.gradient for result in comparison.results] == [*SMALL.gradients[:-1], "informed"]
    assert [result.num_tangents for result in comparison.results] == [None, 1, 4, 4, 4]
    assert comparison.time_ratio(comparison.results[0]) == 1
    names = {"backpropagation", "single", "mean-4", "projection-4", "informed-4"}
    files = {"curves.png", "quality.png", "comparison.json"}
    assert {path.name for path in tmp_path.iterdir()} == names | files


def test_the_quality_of_every_epoch(tmp_path: Path) -> None:
    names = ("backpropagation", "projection", "informed")
    compare(replace(SMALL, run_dir=tmp_path, gradients=names))
    assert not (tmp_path / "backpropagation" / "quality.csv").exists()
    table = pd.read_csv(tmp_path / "informed-4" / "quality.csv")
    assert sorted(table["epoch"].unique()) == [1, 2]
    first = table[table["epoch"] == 1].set_index(["quantity", "place"])["value"]
    assert set(first["cosine"].index) == {"all", "1", "3", "5"}
    assert first["cosine", "5"] == pytest.approx(1)  # the loss's own derivative
    assert len(first["captured"]) == 5  # of random ones, feedback, local loss, value; of all
    assert (first["captured"] <= 1 + 1e-6).all()
    random = pd.read_csv(tmp_path / "projection-4" / "quality.csv")
    assert set(random["place"]) == {"all", "1", "3", "5", "Normal(num_tangents=4)"}


def test_assessing_changes_no_run(tmp_path: Path) -> None:
    config = replace(SMALL, gradients=("informed",))
    (assessed,) = compare(replace(config, run_dir=tmp_path / "a")).results
    alone = train(replace(config.runs()[0], run_dir=tmp_path / "b"))
    assert (alone.test_loss, alone.validation_loss) == (
        assessed.test_loss,
        assessed.validation_loss,
    )


def test_finished_runs_are_skipped(tmp_path: Path) -> None:
    started = []
    config = replace(SMALL, run_dir=tmp_path, gradients=("backpropagation", "mean"))
    first = compare(replace(config, gradients=("mean",)))
    assert first.time_ratio(first.results[0]) is None
    written = (tmp_path / "mean-4" / "metrics.csv").stat().st_mtime_ns
    again = compare(config, lambda run: started.append(run.gradient) or ())
    assert started == ["backpropagation", "mean"]
    assert again.results[1] == first.results[0]
    assert (tmp_path / "mean-4" / "metrics.csv").stat().st_mtime_ns == written


@pytest.mark.parametrize("errors", [[0.5, 0.25], [0.5, 0.0], [0.0, 0.0]])
def test_curves_of_perfect_runs(errors: list[float], tmp_path: Path) -> None:
    run = pd.DataFrame({"epoch": [1, 2], "train_loss": [1.0, 0.5], "validation_error": errors})
    draw_curves({"a": run, "b": run}, tmp_path / "curves.png", "title")
    assert (tmp_path / "curves.png").stat().st_size > 1000
