"""Experiments in small: what they store, and that they go on."""

from __future__ import annotations

import pandas as pd
import pytest

from multitangent_lab.experiments._reference import Reference, reference_rates
from multitangent_lab.experiments._store import Store
from multitangent_lab.experiments.studies import function_rates, network_rates, samplers
from multitangent_lab.experiments.studies.function_rates import Case, run
from multitangent_lab.experiments.studies.network_rates import Network
from multitangent_lab.functions import FUNCTIONS

QUICK = (Case("sphere", 8, 2, "mean"), Case("sphere", 8, 2, "projection"))


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
    (row,) = run(QUICK[0], stored(tmp_path, 0.25))
    assert row["suggested_rate"] == pytest.approx(0.5 * 2 / 11)
    assert row["suggested_is_no_worse"]
    assert row["self_set_is_no_worse"]
    assert row["value_searched"] <= row["value_suggested"]


def test_cases_are_those_of_the_table():
    assert len(set(function_rates.cases())) == 3 * 4 * 4 * 2


def test_what_is_stored_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(function_rates, "cases", lambda: iter(QUICK))
    store = stored(tmp_path, 0.25)
    store.obtain(QUICK[0], lambda cell: [{**run(cell, store)[0], "reference_rate": 0.125}])
    function_rates.main(tmp_path)
    table = pd.read_csv(tmp_path / "functions.csv")
    assert list(table["aggregator"]) == ["mean", "projection"]
    assert list(table["reference_rate"]) == [0.125, 0.25]  # as they were stored
    assert (tmp_path / "functions.png").stat().st_size > 10_000


def test_rates_of_a_network(tmp_path, monkeypatch):
    case = Network("digits", 8, 2, "mean", 4)
    monkeypatch.setattr(network_rates, "cases", lambda: iter([case]))
    monkeypatch.setattr(network_rates, "_GRID", [0.01, 0.1, 1e6])
    monkeypatch.setattr(network_rates, "_AROUND", [0.5, 1.0, 1e9])
    network_rates.main(tmp_path, [], None)
    (row,) = pd.read_csv(tmp_path / "networks.csv").to_dict("records")
    assert row["reference_highest"] == 0.1  # a million diverges
    assert row["searched_rate"] <= row["suggested_rate"]
    assert row["loss_searched"] <= row["loss_suggested"] < 4
    assert (tmp_path / "networks.png").stat().st_size > 10_000


def test_samplers(tmp_path, monkeypatch):
    monkeypatch.setattr(samplers, "PROBLEMS", (("sphere", 4, 1, samplers.Mean(), 30),))
    monkeypatch.setattr(samplers, "BUDGETS", (2, 4))
    monkeypatch.setattr(samplers, "REPEATS", 2)
    monkeypatch.setattr(samplers, "SAMPLERS", {"random": samplers.SAMPLERS["random"]})
    samplers.main(tmp_path)
    table = pd.read_csv(tmp_path / "samplers.csv")
    assert list(table["trials"]) == [2, 4]
    assert table["random"][1] <= table["random"][0]
    assert (table[["grid", "random"]] >= 0).all(axis=None)
