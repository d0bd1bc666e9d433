"""Experiments in small: what they store, and that they go on."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from multitangent.experiments import function_rates, samplers
from multitangent.experiments.function_rates import Case, reference_rates, run
from multitangent.functions import FUNCTIONS

QUICK = (Case("sphere", 8, 2, "mean"), Case("sphere", 8, 2, "projection"))


def test_the_reference_of_the_sphere_is_its_inverse_curvature():
    lowest, fastest = reference_rates(FUNCTIONS["sphere"], 8)
    assert fastest == pytest.approx(0.5, rel=0.06)  # the grid's steps
    # (1 - 2r)^(2 * 1000) is a millionth
    assert lowest == pytest.approx(0.5 * (1 - 1e-6 ** (1 / 2000)), rel=0.13)


def test_one_case():
    row = run(QUICK[0], 0.25, 0.5)
    assert row["suggested_rate"] == pytest.approx(0.5 * 2 / 11)
    assert row["suggested_is_no_worse"]
    assert row["self_set_is_no_worse"]
    assert row["value_searched"] <= row["value_suggested"]


def test_cases_are_those_of_the_table():
    assert len(set(function_rates.cases())) == 3 * 4 * 4 * 2


def test_what_is_stored_is_not_run_again(tmp_path, monkeypatch):
    monkeypatch.setattr(function_rates, "cases", lambda: iter(QUICK))
    stored = tmp_path / "cases" / f"{QUICK[0].name}.json"
    stored.parent.mkdir()
    stored.write_text(json.dumps(run(QUICK[0], 0.25, 0.5)))
    function_rates.main(tmp_path)
    table = pd.read_csv(tmp_path / "functions.csv")
    assert list(table["aggregator"]) == ["mean", "projection"]
    assert table["reference_rate"][0] == 0.25  # as it was stored
    assert (tmp_path / "functions.png").stat().st_size > 10_000
    assert "torch" in json.loads((tmp_path / "functions.json").read_text())


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
