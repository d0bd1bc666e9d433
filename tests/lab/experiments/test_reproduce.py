"""The paper's experiments in small: stored once, continued, drawn, compared."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from math import pi, sqrt

import pandas as pd
import pytest
import torch

from multitangent_lab._looks import GRADIENTS
from multitangent_lab.cli import main
from multitangent_lab.config import ReproduceConfig
from multitangent_lab.experiments._command import finish, run_reproduce
from multitangent_lab.experiments._descents import Descent
from multitangent_lab.experiments._experiment import Context
from multitangent_lab.experiments._published_rates import published_rate
from multitangent_lab.experiments._store import Store
from multitangent_lab.experiments._training import mean_test_errors, results, run, training
from multitangent_lab.experiments._workers import cells_of
from multitangent_lab.experiments.paper import fig3, fig4, fig5, fig6, table1
from multitangent_lab.training import ConfigError

TINY = [
    training("fc", "digits", gradient, count, 0, width=8, batch_size=256, epochs=3)
    for gradient, count in (("backpropagation", 1), ("projection", 4))
]


@pytest.fixture
def tiny(monkeypatch):
    """Figure 6 with networks that train in a moment."""

    def cells(quick, simulated):
        exact, estimate = TINY
        return [exact, replace(estimate, simulated=simulated)]

    monkeypatch.setattr(fig6, "EXPERIMENT", replace(fig6.EXPERIMENT, cells=cells))


def reproduce(figure, folder, **changes):
    options = {"out": folder, "workers": 1, "device": "cpu"} | changes
    (found,) = run_reproduce(ReproduceConfig(figure, **options), json=True)["figures"]
    return found


@pytest.mark.parametrize("figure", ["fig3", "fig4", "fig5"])
def test_quick_figures(figure, tmp_path, capsys):
    assert main(["reproduce", figure, "--quick", "--out", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["figures"]
    assert found["cells"] == found["cells_run"] > 10
    folder = tmp_path / f"{figure}-quick"
    assert len(pd.read_csv(folder / f"{figure}.csv")) >= found["cells"]
    assert (folder / f"{figure}.png").stat().st_size > 50_000
    assert all(claim["agrees"] is None and claim["evidence"] for claim in found["claims"])
    assert (folder / "claims.md").read_text().count("| open |") == len(found["claims"])
    stored = json.loads((folder / "provenance.json").read_text())
    assert stored["ran_on"]["torch"] == [torch.__version__]
    assert str(tmp_path) not in json.dumps(stored)
    before = (folder / "cells.jsonl").read_bytes()
    reproduce(figure, tmp_path, quick=True)
    assert (folder / "cells.jsonl").read_bytes() == before  # nothing is run again


def test_closed_forms_of_figure_3():
    # The angle between two random lines in the plane is uniform.
    assert fig3.expected("projection", 1, 2)["expected_cosine"] == pytest.approx(2 / pi)
    # One tangent in one dimension: g = v^2 for a normal number v.
    one = fig3.expected("mean V", 1, 1)
    assert list(one.values()) == pytest.approx([1.0, 1.0, 3.0])
    # K orthogonal directions of K.
    assert list(fig3.expected("projection", 5, 5).values()) == [1.0, 1.0, 1.0]
    # Two unit vectors at a uniform angle t in the plane, u being the first axis:
    # |a w + b w'|^2 with a = w.u, b = w'.u has the mean 2/2 + 2/4.
    assert fig3.expected("sum W", 2, 2)["expected_squared_norm"] == pytest.approx(1.5)
    assert fig3.expected("mean W", 2, 2)["expected_squared_norm"] == pytest.approx(1.5 / 4)


@pytest.mark.parametrize(("num_tangents", "dimension"), [(1, 7), (4, 7), (7, 7), (12, 7)])
def test_measured_means_are_the_closed_forms(num_tangents, dimension):
    cell = fig3.Approximation(dimension, num_tangents, 4000)
    table = pd.DataFrame(fig3.run(cell, None))
    assert set(table["gradient"]) == {"sum V", "mean V", "sum W", "mean W", "projection"}
    assert fig3.deviations(table)["standard_errors"].max() < 4.5
    mean = table.set_index("gradient").loc["mean V"]
    assert mean["squared_norm_error"] * sqrt(4000) < 2 * mean["squared_norm"]


def test_a_rerun_of_a_cell_gives_the_same_table(tmp_path):
    cell = Descent("styblinski-tang", 4, "projection", 2, None, 2, 2, 100)
    first, second = (
        fig4.run(cell, Context(Store(tmp_path / name))) for name in ("first", "second")
    )
    assert first == second
    assert {row["rate"] for row in first} == {"searched", "suggested", "published"}


def test_the_searched_rate_is_chosen_by_seeds_that_are_not_reported(monkeypatch):
    chosen = fig4.descents(Descent("sphere", 4, "mean", 2, None, 2, 2, 30), {})
    assert [row["seed"] for row in chosen] == [0, 1]

    def reached(cell, rates, seeds):  # the reported seeds would choose the last rate
        values = torch.zeros(len(rates), seeds)
        values[0, seeds // 2 :] = -1
        values[-1, : seeds // 2] = -1
        return values, torch.zeros(len(rates), seeds)

    monkeypatch.setattr("multitangent_lab.experiments._descents._reached", reached)
    rows = fig4.descents(Descent("sphere", 4, "mean", 2, None, 2, 2, 30), {})
    assert {row["learning_rate"] for row in rows} == {1e-6}


def test_published_rates_are_those_of_the_paper():
    assert published_rate("sphere", 1, "backpropagation", 1) == 0.184
    assert published_rate("rosenbrock", 1024, "single", 1) == 5.13e-06
    assert published_rate("styblinski-tang", 64, "projection", 3) is None
    assert published_rate("sphere", 2048, "projection", 16) is None


def test_cells_of_the_paper():
    assert len(fig4.cells(False, False)) == 3 * 11 * 8
    assert len(fig5.cells(False, False)) == 2 * (7 * 3 * 2) + 3
    assert len(set(fig6.cells(False, False))) == 3 * 8 * 3
    assert len(set(table1.cells(False, False))) == 4 * 8 * 3
    assert {cell.width for cell in fig6.cells(False, False)[:24]} == {256}
    assert {(cell.gradient, cell.seed) for cell in table1.cells(False, False)[:12]} == {
        ("backpropagation", 0), ("projection", 0), ("mean", 0)
    }  # fmt: skip
    assert {
        cell.batch_size for cell in table1.cells(False, False) if cell.dataset == "cifar10"
    } == {128}


def test_networks(tiny, tmp_path):
    found = reproduce("fig6", tmp_path)
    table = pd.read_csv(tmp_path / "fig6" / "fig6.csv")
    assert list(table["epoch"]) == [1, 2, 3] * 2
    assert "seconds" not in table and not table["simulated"].any()
    results = pd.read_csv(tmp_path / "fig6" / "results.csv")
    assert list(results["gradient"]) == ["backpropagation", "projection"]
    assert results["test_error"].between(0, 1).all()
    assert (tmp_path / "fig6" / "fig6.png").stat().st_size > 50_000
    assert not list((tmp_path / "fig6" / ".work").glob("**/*.ckpt"))
    assert found["cells_run"] == 2


def test_an_interrupted_run_goes_on_as_if_never_interrupted(tiny, tmp_path, monkeypatch):
    reproduce("fig6", tmp_path / "whole")
    folder = tmp_path / "parts" / "fig6"
    clock = iter([0.0] * 8)  # then it is late
    with monkeypatch.context() as patch:
        module = "multitangent_lab.experiments._workers.monotonic"
        patch.setattr(module, lambda: next(clock, float("inf")))
        found = reproduce("fig6", tmp_path / "parts", budget_minutes=1e6)
    assert found["cells_run"] == 1
    (begun,) = (folder / ".work").glob("*/run/metrics.csv")
    assert len(pd.read_csv(begun)) < 3
    found = reproduce("fig6", tmp_path / "parts")
    assert found["cells_run"] == 2
    for name in ("fig6.csv", "results.csv", "claims.md"):
        whole = (tmp_path / "whole" / "fig6" / name).read_text()
        assert (folder / name).read_text() == whole


def test_what_diverges_at_once_says_so(tmp_path):
    rows = run(replace(TINY[1], learning_rate=1e30), Context(Store(tmp_path), device="cpu"))
    (result,) = results(rows)
    assert result["diverged"] and result["test_error"] is None and result["epochs"] == 0
    assert mean_test_errors(rows) == {("projection", 4): 90.0}


def test_what_diverges_later_is_tested_as_it_was_before(tmp_path, monkeypatch):
    whole = run(replace(TINY[1], epochs=2), Context(Store(tmp_path / "whole"), device="cpu"))

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 2:
            module.optimizer.param_groups[0]["lr"] = 1e30

    monkeypatch.setattr(
        "multitangent_lab.experiments._training.Deadline.on_train_epoch_start",
        on_train_epoch_start,
    )
    rows = run(TINY[1], Context(Store(tmp_path / "diverges"), device="cpu"))
    assert [row["epoch"] for row in rows] == [1, 2]
    assert all(row["diverged"] for row in rows)
    assert [row["test_error"] for row in rows] == [row["test_error"] for row in whole]


def test_simulated_runs_are_labelled_and_apart(tiny, tmp_path):
    reproduce("fig6", tmp_path)
    found = reproduce("fig6", tmp_path, simulated=True)
    assert found["folder"].endswith("fig6-simulated") and found["cells_run"] == 2
    tables = [pd.read_csv(tmp_path / name / "fig6.csv") for name in ("fig6", "fig6-simulated")]
    assert list(tables[1]["simulated"]) == [False] * 3 + [True] * 3
    columns = ["train_loss", "validation_error"]
    # The same estimate, to rounding, from backpropagation.
    pd.testing.assert_frame_equal(*(table[columns] for table in tables), rtol=1e-2)


def network_rows(errors, **settings):
    """One epoch and seed for each gradient, with those test errors in per cent."""
    rows = []
    for (gradient, count), error in zip(GRADIENTS, errors, strict=False):
        cell = training("vit", "mnist", gradient, count, 0)
        measured = {"train_loss": 1.0, "validation_loss": 1.0, "validation_error": 0.5}
        tested = {"test_loss": 1.0, "test_error": error / 100, "diverged": False, "epoch": 1}
        rows.append(vars(cell) | measured | tested | settings)
    return rows


def test_table_1_says_what_was_not_run(tmp_path, monkeypatch):
    cells = [training("vit", "mnist", "backpropagation", 1, seed) for seed in (0, 1, 2)]
    monkeypatch.setattr(
        table1, "EXPERIMENT", replace(table1.EXPERIMENT, cells=lambda quick, simulated: cells)
    )
    store = Store(tmp_path / "table1")
    for error, cell in zip((24, 26), cells, strict=False):
        store.obtain(cell, lambda cell, e=error: network_rows([e], seed=cell.seed, diverged=e > 25))
    found = finish(ReproduceConfig("table1", out=tmp_path), "table1")
    table = (tmp_path / "table1" / "table1.md").read_text().splitlines()
    assert "after at most 200 epochs" in table[0]
    assert table[6].split("|")[4].strip() == "25.00 (2, 1 diverged), 2.39"
    assert sum(line.count("not run") for line in table) == 4 * 8 - 1
    assert found["claims"] and all(claim["agrees"] is None for claim in found["claims"])


def test_a_budget_of_epochs_makes_a_table_of_its_own(tmp_path):
    config = ReproduceConfig("table1", epochs=2, out=tmp_path)
    cells = cells_of(config, "table1")
    assert len(cells) == 4 * 8
    assert {(cell.seed, cell.epochs) for cell in cells} == {(0, 2)}
    store = Store(tmp_path / "table1-after-2-epochs")
    store.obtain(cells[0], lambda cell: network_rows([24], epochs=2))
    found = finish(config, "table1")
    assert (found["cells"], found["cells_run"]) == (32, 1)
    assert (
        "after at most 2 epochs" in (tmp_path / "table1-after-2-epochs" / "table1.md").read_text()
    )
    assert (
        "trained for at most 2 epochs"
        in (tmp_path / "table1-after-2-epochs" / "claims.md").read_text()
    )


def verdicts(claims):
    return [claim.agrees for claim in claims]


def test_verdicts_on_table_1():
    def of(*errors):
        judged = [c for c in table1.claims(network_rows(errors)) if "vit on mnist" in c.statement]
        return verdicts(judged)

    assert of(2.39, 60.53, 50.73, 44.57, 36.06, 49.11, 44.08, 42.60) == [True, True, True]
    assert of(2.39, 60.53, 50.73, 44.57, 36.06, 61.00, 44.08, 42.60) == [False, True, True]
    assert of(2.39, 60.53, 50.73, 30.00, 36.06, 49.11, 44.08, 42.60) == [False, False, True]
    assert of(2.39, 60.53, 50.73, 44.57, 3.06, 49.11, 44.08, 42.60) == [True, True, False]
    assert of(2.39, 60.53) == [None, None, None]


def test_verdicts_on_figure_6():
    def of(width, best_epoch, *errors):
        rows = network_rows(errors, model="fc", width=width)
        return [
            row | {"epoch": 10 if row["gradient"] == "backpropagation" else best_epoch}
            for row in rows
        ]

    good = (2.0, 8.0, 5.0, 4.0, 2.5, 5.0, 4.0, 2.6)
    assert verdicts(fig6.claims(of(256, 90, *good))) == [True] * 4 + [None] * 2
    poor = (2.0, 8.0, 5.0, 4.0, 4.1, 9.0, 4.0, 3.6)
    assert verdicts(fig6.claims(of(256, 12, *poor))) == [False] * 4 + [None] * 2
    assert verdicts(fig6.claims(of(256, 90, *good[:5]))) == [None] * 6
    both = of(256, 90, *good) + of(4096, 90, *(1.8, 9.0, *good[2:]))
    assert verdicts(fig6.claims(both))[-2:] == [True, True]
    three = both + of(1024, 90, *(1.9, 7.0, *good[2:7]))
    assert fig6.claims(three)[-1].evidence.startswith("points from width 256 to 4096: single 1: +1")
    two = of(256, 90, *good) + of(1024, 90, *(2.1, *[error - 0.5 for error in good[1:]]))
    assert verdicts(fig6.claims(two))[-2:] == [False, False]
    both = of(256, 90, *good) + of(4096, 90, *(2.1, *[1.0] * 7))
    assert verdicts(fig6.claims(both))[-2:] == [False, False]


def test_verdicts_on_figure_5():
    def of(mean, projection):
        rows = []
        for measure, least in (("cosine", 0.1), ("styblinski-tang", -36.0)):
            for angle in (None, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0):
                means = {"mean": mean[measure, angle], "projection": projection[measure, angle]}
                for gradient, value in means.items():
                    rows.append((measure, gradient, 16, angle, value))
            rows.append((measure, "single", 1, None, least))
        names = ("measure", "gradient", "num_tangents", "angle", "mean")
        return verdicts(fig5.claims([dict(zip(names, row, strict=True)) for row in rows]))

    angles = (None, 15.0, 30.0, 45.0, 60.0, 75.0, 90.0)
    cosines = dict(zip(angles, (0.5, 0.15, 0.2, 0.3, 0.4, 0.45, 0.5), strict=True))
    values = dict(zip(angles, (-39.1, -36, -37, -38, -39, -39.1, -39.1), strict=True))
    mean = {("cosine", a): v for a, v in cosines.items()}
    mean |= {("styblinski-tang", a): v for a, v in values.items()}
    same = {key: 0.5 if key[0] == "cosine" else -39.1 for key in mean}
    assert of(mean, same) == [True] * 5
    assert of(same, mean) == [False] * 4 + [True]
    assert of(mean | {("styblinski-tang", 90.0): -30.0}, same) == [True, True, True, False, False]


def test_verdicts_on_figure_4():
    def of(rosenbrock):
        rows = []
        for function in ("sphere", "styblinski-tang", "rosenbrock"):
            for n in (1, 16, 1024):
                for gradient, count in GRADIENTS:
                    left = 0.0 if gradient == "backpropagation" else n / 4096 / count
                    left = left if function != "styblinski-tang" or n > 16 else 0.0
                    if function == "rosenbrock":
                        left = rosenbrock(n, gradient, count)
                    for seed in range(5):
                        rows.append(
                            (
                                function,
                                n,
                                gradient,
                                count,
                                "searched",
                                seed,
                                left * (1 + seed / 100),
                            )
                        )
                        rows.append((function, n, gradient, count, "suggested", seed, left * 1.2))
        names = ("function", "dimension", "gradient", "num_tangents", "rate", "seed", "value")
        ends = {"initial": 1.0, "minimum": 0.0}
        return verdicts(fig4.claims([dict(zip(names, row, strict=True)) | ends for row in rows]))

    def as_said(n, gradient, count):
        if n == 16 and count == 2:
            return 0.9
        return 0.5 / count * (0.3 if gradient == "projection" else 1)

    assert of(as_said) == [True] * 9
    plain = of(lambda n, gradient, count: 0.5 / count)
    assert plain == [True] * 4 + [None, True, True, False, True]


def test_verdicts_on_figure_3():
    rows = [row for k in (1, 4, 16) for row in fig3.run(fig3.Approximation(4, k, 2000), None)]
    found = verdicts(fig3.claims(rows))
    assert found[0] is found[3] is found[4] is True and found[2] is False
    for row in rows:
        row["cosine"] = 0.5 if row["gradient"] == "projection" else 0.9
    assert verdicts(fig3.claims(rows))[3:5] == [False, False]
    assert verdicts(fig3.claims(rows))[-1] is False  # far from the closed forms


@pytest.mark.parametrize("figure", ["fig3", "fig4", "fig5"])
def test_a_figure_that_is_not_complete_is_drawn_and_not_judged(figure, tmp_path):
    module = import_module(f"multitangent_lab.experiments.paper.{figure}")
    config = ReproduceConfig(figure, quick=True, out=tmp_path)
    store = Store(config.folder(figure))
    store.work(module.cells(True, False)[:1], lambda cell: module.run(cell, Context(store)))
    found = finish(config, figure)
    assert found["cells_run"] == 1 and found["claims"] == []
    assert (tmp_path / f"{figure}-quick" / f"{figure}.png").exists()


def test_stored_results_are_said_to_be_stored(tmp_path, capsys):
    config = ReproduceConfig("fig3", quick=True, out=tmp_path, workers=1)
    (found,) = run_reproduce(config, json=False)["figures"]
    assert found["cells_stored"] == 0
    assert "stored results" not in capsys.readouterr().out
    (found,) = run_reproduce(config, json=False)["figures"]
    assert found["cells_stored"] == found["cells_run"] > 10
    assert f"{found['cells_run']} of them are stored results" in capsys.readouterr().out


def test_two_processes_share_a_figure(tmp_path):
    command = [sys.executable, "-m", "multitangent_lab.cli", "reproduce", "fig3", "--quick"]
    done = subprocess.run(
        [*command, "--out", tmp_path, "--workers", "2", "--json"], capture_output=True, check=True
    )
    assert json.loads(done.stdout)["figures"][0]["cells_run"] == 12
    lines = (tmp_path / "fig3-quick" / "cells.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert json.loads(lines[0])["command"].startswith("multitangent reproduce fig3 --quick")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"figure": "fig7"}, "`figure` should be one of .* Found 'fig7'"),
        ({"figure": "fig3", "simulated": True}, "`simulated` should go with fig6 or table1"),
        ({"figure": "fig6", "epochs": 1}, "`epochs` should go with table1 in full. Found fig6"),
        ({"figure": "table1", "epochs": 0}, "`epochs` should be at least 1. Found 0"),
        ({"figure": "table1", "epochs": 1, "quick": True}, "Found table1 and quick"),
        ({"workers": 0}, "`workers` should be at least 1. Found 0. Try 1"),
        ({"budget_minutes": -1.0}, "`budget_minutes` should be positive"),
    ],
    ids=str,
)
def test_errors(arguments, message):
    with pytest.raises(ConfigError, match=message):
        ReproduceConfig(**arguments)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"`out` should be a folder .*Not a directory"):
        reproduce("fig3", tmp_path / "file")
