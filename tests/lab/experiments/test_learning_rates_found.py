"""Studies in small: what they store, and that they go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from multitangent_lab.cli import main
from multitangent_lab.config import STUDIES, ReproduceConfig
from multitangent_lab.experiments._command import run_reproduce
from multitangent_lab.experiments._experiment import Context
from multitangent_lab.experiments._reference import Reference, reference_rates
from multitangent_lab.experiments._store import Store
from multitangent_lab.experiments._training import Training
from multitangent_lab.experiments._workers import experiment_of
from multitangent_lab.experiments.studies import (
    function_rates,
    guesses,
    network_rates,
    running_mean,
    samplers,
)
from multitangent_lab.experiments.studies.function_rates import Case, run
from multitangent_lab.experiments.studies.network_rates import Network
from multitangent_lab.functions import FUNCTIONS

ROOT = Path(__file__).parents[3]
QUICK = (Case("sphere", 8, 2, "mean"), Case("sphere", 8, 2, "projection"))


def small(monkeypatch, module, cells, name="EXPERIMENT", **changes):
    """The experiment of a module with other cells."""
    experiment = replace(
        getattr(module, name), cells=lambda quick, simulated: list(cells), **changes
    )
    monkeypatch.setattr(module, name, experiment)


def reproduce(study, folder):
    """Run a study and read its table."""
    config = ReproduceConfig(study, out=folder, workers=1, device="cpu")
    (summary,) = run_reproduce(config, json=True)["figures"]
    assert summary["cells"] == summary["cells_run"]
    return pd.read_csv(folder / study / f"{study}.csv")


def test_the_reference_of_the_sphere_is_its_inverse_curvature():
    lowest, fastest = reference_rates(FUNCTIONS["sphere"], 8)
    assert fastest == pytest.approx(0.5, rel=0.06)  # the grid's steps
    # (1 - 2r)^(2 * 1000) is a millionth
    assert lowest == pytest.approx(0.5 * (1 - 1e-6 ** (1 / 2000)), rel=0.13)


def stored(folder, lowest):
    store = Store(folder)
    store.obtain(Reference("sphere", 8), lambda cell: [{"lowest": lowest, "fastest": 0.5}])
    return store


def test_one_case(tmp_path):
    (row,) = run(QUICK[0], Context(stored(tmp_path, 0.25)))
    assert row["suggested_rate"] == pytest.approx(0.5 * 2 / 11)
    assert row["suggested_is_no_worse"]
    assert row["self_set_is_no_worse"]
    assert row["value_searched"] <= row["value_suggested"]


def test_cases_are_those_of_the_table():
    assert len(set(function_rates.cases())) == 3 * 4 * 4 * 2


@pytest.mark.parametrize(
    "study", ["function-rates", "network-rates", "guesses", "running-mean", "adapters"]
)
def test_stored_cells_are_those_of_the_study(study):
    folder = ROOT / "results" / "studies" / study
    cells = {cell.key for cell in experiment_of(study).cells(False, False)}
    lines = (folder / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    assert cells <= {json.loads(line)["key"] for line in lines}


def test_every_study_has_cells():
    assert all(len(experiment_of(study).cells(False, False)) > 5 for study in STUDIES)


def test_what_is_stored_is_not_run_again(tmp_path, monkeypatch):
    small(monkeypatch, function_rates, QUICK)
    context = Context(stored(tmp_path / "function-rates", 0.25))
    changed = [{**run(QUICK[0], context)[0], "reference_rate": 0.125}]
    context.store.obtain(QUICK[0], lambda cell: changed)
    table = reproduce("function-rates", tmp_path)
    assert list(table["aggregator"]) == ["mean", "projection"]
    assert list(table["reference_rate"]) == [0.125, 0.25]  # as they were stored
    assert (tmp_path / "function-rates" / "function-rates.png").stat().st_size > 10_000
    assert not (tmp_path / "function-rates" / "claims.md").exists()  # it is not the paper's


def test_rates_of_a_network(tmp_path, monkeypatch):
    small(monkeypatch, network_rates, [Network("digits", 8, 2, "mean", 4)])
    monkeypatch.setattr(network_rates, "_GRID", [0.01, 0.1, 1e6])
    monkeypatch.setattr(network_rates, "_AROUND", [0.5, 1.0, 1e9])
    (row,) = reproduce("network-rates", tmp_path).to_dict("records")
    assert row["reference_highest"] == 0.1  # a million diverges
    assert row["searched_rate"] <= row["suggested_rate"]
    assert row["loss_searched"] <= row["loss_suggested"] < 4
    assert (tmp_path / "network-rates" / "network-rates.png").stat().st_size > 10_000


def test_samplers(tmp_path, monkeypatch):
    small(monkeypatch, samplers, [samplers.Problem("sphere", 4, 1, "mean", 30)])
    monkeypatch.setattr(samplers, "BUDGETS", (2, 4))
    monkeypatch.setattr(samplers, "REPEATS", 2)
    monkeypatch.setattr(samplers, "SAMPLERS", {"random": samplers.SAMPLERS["random"]})
    table = reproduce("samplers", tmp_path)
    assert list(table["trials"]) == [2, 4]
    assert table["random"][1] <= table["random"][0]
    assert (table[["grid", "random"]] >= 0).all(axis=None)


def test_running_means(tmp_path, monkeypatch):
    cases = [cell for cell in running_mean.cells() if cell.function == "sphere"][:2]
    small(monkeypatch, running_mean, [replace(cell, dimension=4, steps=20) for cell in cases])
    assert len(reproduce("running-mean", tmp_path)) == 10  # of five seeds
    table = pd.read_csv(tmp_path / "running-mean" / "summary.csv")
    assert list(table["gradient"]) == ["projection", "previous"]
    assert (table["left"] < 1).all()


def test_the_best_rate_of_a_search_is_run_with_all_seeds(tmp_path, monkeypatch):
    options = {"width": 8, "epochs": 1, "batch_size": 256}
    rates = {("backpropagation", 1): (0.001, 0.1), ("feedback", 4): (0.1,)}
    study = guesses.Study("fc", "digits", rates, options)
    monkeypatch.setattr(guesses, "STUDIES", {"tiny": study})
    monkeypatch.setattr(guesses, "EXPERIMENT", guesses.experiment_on("tiny", ["tiny"]))
    assert len(reproduce("guesses", tmp_path)) == 3 + 2 * 2  # one epoch each
    folder = tmp_path / "guesses"
    assert len(pd.read_csv(folder / "tiny-searched.csv")) == 3
    table = pd.read_csv(folder / "tiny-chosen.csv")
    assert list(table["seed"]) == [0, 1, 2] * 2
    assert list(table["learning_rate"]) == [0.1] * 6
    assert all(isinstance(cell, Training) for cell in study.searched())


def test_a_study_has_no_small_version(capsys):
    assert main(["reproduce", "guesses", "--quick"]) == 2
    assert "`quick` should go with fig3" in capsys.readouterr().err
