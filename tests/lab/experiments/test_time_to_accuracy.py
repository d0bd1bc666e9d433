"""The study of how long gradients take, on tiny settings and on rows that are made up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from multitangent_lab.config import ReproduceConfig, TrainConfig
from multitangent_lab.experiments import (
    Context,
    OutOfTimeError,
    Row,
    Store,
    experiment_of,
    run_reproduce,
)
from multitangent_lab.experiments._timed_training import TimedTraining, run
from multitangent_lab.experiments.studies import time_to_accuracy as study

TINY = TimedTraining(
    "tiny", "backpropagation", 1, 0.2, 0, 3, 6, "fc", "digits", width=8, batch_size=64
)
MEASURED = ["epoch", "step", "validation_loss", "diverged"]


def trained(cell: TimedTraining, folder: Path, late: Any = lambda: False) -> list[Row]:
    store = Store(folder)
    return store.obtain(cell, lambda c: run(c, Context(store, device="cpu", late=late)))


def test_every_gradient_tries_as_many_rates() -> None:
    for quick in (True, False):
        tried: dict[tuple[str, str], list[TimedTraining]] = {}
        for cell in study.cells(quick):
            tried.setdefault((cell.setting, cell.gradient), []).append(cell)
        for (setting, _), cells in tried.items():
            assert len(cells) == len(tried[setting, "backpropagation"])
            assert {cell.epochs for cell in cells} == {tried[setting, "backpropagation"][0].epochs}
            rates = [cell.learning_rate for cell in cells]
            ratios = [b / a for a, b in pairwise(rates)]
            assert ratios == pytest.approx([study.FACTOR] * (len(rates) - 1), rel=1e-3)
    names = {cell.setting for cell in study.cells(False)}
    assert names == {"gpt", "gpt-8-blocks", "vit", "resnet18", "fc"}


def test_every_cell_is_a_configuration() -> None:
    """None is refused, such as `feedback` for a text."""
    for cell in study.cells(False):
        values = asdict(cell)
        del values["setting"], values["text_file"]
        config = TrainConfig(**values).resolved()
        assert config.num_tangents == (16 if cell.gradient == "projection" else config.num_tangents)
        assert config.learning_rate == cell.learning_rate


def test_a_cell(tmp_path: Path) -> None:
    rows = trained(TINY, tmp_path)
    assert [row["step"] for row in rows] == [0, 6, 12, 18, 24, 30, 36, 42, 48, 54]
    assert [row["epoch"] for row in rows] == pytest.approx([r["step"] / 18 for r in rows], abs=1e-4)
    each = {round(row["seconds"] / row["step"], 5) for row in rows[1:]}
    assert max(each) - min(each) < 1e-4  # one time of a step, whatever the clock says
    walls = [row["wall_seconds"] for row in rows]
    assert walls == sorted(walls)
    assert rows[-1]["processor_seconds"] > rows[1]["processor_seconds"] > 0
    assert rows[-1]["validation_loss"] < rows[0]["validation_loss"]
    assert not rows[-1]["diverged"]


def test_a_cell_stops_at_its_loss(tmp_path: Path) -> None:
    whole = pd.DataFrame(trained(TINY, tmp_path))
    wanted = float(whole["validation_loss"].iloc[5])
    rows = trained(replace(TINY, until_loss=wanted, epochs=9), tmp_path)
    first = whole[whole["validation_loss"] <= wanted].iloc[0]
    assert rows[-1]["step"] == first["step"]
    assert rows[-1]["validation_loss"] == first["validation_loss"]


def test_an_interrupted_cell_goes_on(tmp_path: Path) -> None:
    whole = pd.DataFrame(trained(TINY, tmp_path / "whole"))
    asked: Iterator[bool] = iter([False, True])  # time is up before the second epoch
    with pytest.raises(OutOfTimeError):
        trained(TINY, tmp_path / "late", lambda: next(asked))
    assert Store(tmp_path / "late").rows([TINY]) == []
    again = pd.DataFrame(trained(TINY, tmp_path / "late"))
    pd.testing.assert_frame_equal(whole[MEASURED], again[MEASURED])


def test_a_run_that_diverges_says_so(tmp_path: Path) -> None:
    rows = trained(replace(TINY, learning_rate=1e20), tmp_path)
    assert rows[0]["step"] == 0
    assert all(row["diverged"] for row in rows)
    assert study.least_loss(rows) == float("inf")


SETTING = study.Setting(
    "made-up",
    2,
    {study.BACKPROPAGATION: 0.1, ("residual", 1): 0.1},
    {"evaluate_every": 10, "model": "fc", "dataset": "digits"},
    trials=3,
)


def made_up(cell: TimedTraining) -> list[Row]:
    """Backpropagation goes down to 1 + seed at the middle rate, `residual` in twice its steps."""
    slow = 2 if cell.gradient == "residual" else 1
    distance = abs(cell.learning_rate - 0.1) * 10
    losses = [3 + cell.seed, 2 + cell.seed, 1 + cell.seed + distance]
    if cell.gradient == "residual" and cell.learning_rate == 0.2:
        losses = [0.1]  # the best at first, but it diverges
    return [
        asdict(cell)
        | {"epoch": i, "step": 10 * i * slow, "seconds": 1.0 * i * slow, "wall_seconds": 2.0 * i}
        | {"processor_seconds": 0.5 * i * slow}
        | {"validation_loss": loss, "diverged": losses == [0.1]}
        for i, loss in enumerate(losses)
    ]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setattr(study, "SETTINGS", (SETTING,))
    monkeypatch.setattr(study, "QUICK", ())
    return Store(tmp_path)


def test_the_best_rate_is_run_until_backpropagations_loss(store: Store) -> None:
    assert list(study.further(store)) == []
    cells = study.cells(False)
    store.work(cells[:-1], made_up)
    assert {cell.gradient for cell in study.further(store)} == {"backpropagation"}
    store.work(cells, made_up)
    store.work(study.further(store), made_up)
    ended = list(study.further(store))
    found = [(c.gradient, c.learning_rate, c.seed, c.epochs, c.until_loss) for c in ended]
    assert found == [
        *(("backpropagation", 0.1, seed, 2, None) for seed in range(3)),
        *(("residual", 0.1, seed, 6, 1.0 + seed) for seed in range(3)),
    ]
    assert len(store.records()) == 6 + 2 + 3  # the first seed of backpropagation ran in the search


def test_tables_and_pictures(store: Store, tmp_path: Path) -> None:
    store.work(study.cells(False), made_up)
    store.work(study.further(store), made_up)
    experiment = experiment_of("time-to-accuracy")
    experiment.draw([], tmp_path)
    table = pd.read_csv(tmp_path / "reached.csv").set_index(["gradient", "seed", "above"])
    assert table.loc[("residual", 1, 0.0), "steps"] == 40
    assert table.loc[("residual", 1, 0.0), "wall_seconds"] == 4
    assert table.loc[("residual", 1, 0.0), "processor_seconds"] == 2
    assert table.loc[("backpropagation", 2, 0.0), "loss"] == 3
    summary = (tmp_path / "summary.md").read_text()
    assert (
        "| residual | 0.1 | 100 | 50 | 40, 4 (2.00) | 40, 4 (2.00) | 40, 4 (2.00) | 3 |" in summary
    )
    assert (tmp_path / "made-up.png").stat().st_size > 1000


def test_what_most_seeds_do_not_reach_is_not_reached(store: Store, tmp_path: Path) -> None:
    def fails(cell: TimedTraining) -> list[Row]:
        rows = made_up(cell)
        if cell.gradient == "residual" and cell.until_loss is not None and cell.seed > 0:
            rows[-1]["validation_loss"] *= 1.03
        return rows

    store.work(study.cells(False), fails)
    store.work(study.further(store), fails)
    study.EXPERIMENT.draw([], tmp_path)
    (line,) = (x for x in (tmp_path / "summary.md").read_text().splitlines() if "residual" in x)
    assert line.split(" | ")[4:7] == ["40, 4 (2.00)", "not reached", "not reached"]


def test_a_best_rate_at_the_edge_is_marked(store: Store, tmp_path: Path) -> None:
    def rising(cell: TimedTraining) -> list[Row]:
        rows = made_up(replace(cell, gradient="backpropagation"))
        rows[-1]["validation_loss"] = 0.1 / cell.learning_rate
        return rows

    store.work(study.cells(False), rising)
    store.work(study.further(store), rising)
    study.EXPERIMENT.draw([], tmp_path)
    assert "| 0.2* |" in (tmp_path / "summary.md").read_text()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = replace(
        SETTING,
        name="tiny",
        rates={study.BACKPROPAGATION: 0.4},
        options={"evaluate_every": 9, "model": "fc", "dataset": "digits", "width": 8},
        trials=1,
    )
    monkeypatch.setattr(study, "QUICK", (tiny,))
    config = ReproduceConfig("time-to-accuracy", quick=True, out=tmp_path, device="cpu")
    (late,) = run_reproduce(replace(config, budget_minutes=1e-9), json=True)["figures"]
    assert late["cells_run"] == 0
    (found,) = run_reproduce(config, json=True)["figures"]
    assert (found["cells"], found["cells_run"], found["claims"]) == (3, 3, [])
    folder = tmp_path / "time-to-accuracy-quick"
    assert {"summary.md", "reached.csv", "tiny.png"} <= {path.name for path in folder.iterdir()}
    (again,) = run_reproduce(config, json=True)["figures"]
    assert again["cells_stored"] == 3
