"""The study of adapters, in small."""

from __future__ import annotations

import json
from dataclasses import replace
from math import inf

import pandas as pd
import pytest
import torch

from multitangent_lab.cli import main
from multitangent_lab.data import DataError
from multitangent_lab.experiments._experiment import Context
from multitangent_lab.experiments._store import Store
from multitangent_lab.experiments._tuning import (
    Tuning,
    gradient_of,
    passes_per_step,
    run,
    tuned_model,
)
from multitangent_lab.experiments.studies import adapters
from multitangent_lab.experiments.studies.adapters import Contender

TINY = Tuning(
    "mean", 4, False, "adam", 0.01, 0,
    budget=24, batch_size=2, rank=2, points=3, validation=4,
    width=8, blocks=2, context=8, base_steps=2,
)  # fmt: skip


@pytest.fixture
def data(tmp_path):
    """A folder with a text to train the base model on."""
    folder = tmp_path / "data" / "text"
    folder.mkdir(parents=True)
    (folder / "kjv.txt").write_text("In the beginning was the word. " * 40)
    return folder.parent


@pytest.fixture
def context(tmp_path, data):
    return Context(Store(tmp_path / "store"), data)


def test_the_whole_study(tmp_path, data, monkeypatch, capsys):
    contenders = [
        Contender("mezo", 1, False, "sgd", 0.001),
        Contender("projection", 4, True, "adam", 0.01),
    ]
    monkeypatch.setattr(adapters, "SETTING", TINY)
    monkeypatch.setattr(adapters, "CONTENDERS", contenders)
    command = ["reproduce", "adapters", "--out", str(tmp_path), "--workers", "1", "--json"]
    command += ["--data-dir", str(data)]
    assert main(command) == 0
    (found,) = json.loads(capsys.readouterr().out)["figures"]
    assert found["cells"] == found["cells_run"] >= 2 * (3 + 2)
    (claim,) = found["claims"]
    assert claim["agrees"] in (True, False) and "MeZO" in claim["evidence"]
    folder = tmp_path / "adapters"
    table = pd.read_csv(folder / "adapters.csv")
    ends = table[table["passes"] > 0].groupby("method")["passes"].max()
    assert dict(ends) == {"mezo": 24, "projection": 20}
    lines = (folder / "summary.md").read_text().splitlines()
    assert sum("| 3 |" in line for line in lines) == 2  # seeds
    assert "MeZO, SGD" in "".join(lines) and "Loss of the base model" in lines[2]
    assert (folder / "adapters.png").stat().st_size > 20_000
    main(command)
    (again,) = json.loads(capsys.readouterr().out)["figures"]
    assert again["cells_stored"] == found["cells_run"]


@pytest.mark.parametrize(
    ("method", "count", "passes"),
    [
        ("backpropagation", 1, 3),
        ("mezo", 1, 2),
        ("single", 1, 2),
        ("mean", 4, 5),
        ("projection", 16, 17),
    ],
)
def test_passes_per_step(method, count, passes):
    assert passes_per_step(method, count) == passes


def test_finite_differences_run_the_model_as_often_as_is_said(context):
    model = tuned_model(TINY, context)
    gradient = gradient_of(replace(TINY, method="mezo"), model)
    runs = []
    model.register_forward_hook(lambda *_: runs.append(1))
    tokens = torch.randint(256, (2, 8))
    gradient(tokens, tokens)  # the first batch of a kind is looked at more closely
    runs.clear()
    gradient(tokens, tokens)
    assert len(runs) == passes_per_step("mezo", 1)


def test_the_base_stays_and_the_adapters_begin_with_it(context):
    model, other = tuned_model(TINY, context), tuned_model(replace(TINY, seed=1), context)
    tokens = torch.randint(256, (2, 8))
    assert torch.equal(model(tokens), other(tokens))
    downs = [
        [value for name, value in of_seed.state_dict().items() if name.endswith(".down")]
        for of_seed in (model, other)
    ]
    assert not any(map(torch.equal, *downs))  # they are drawn by the seed
    before = {name: value.clone() for name, value in model.state_dict().items()}
    gradient = gradient_of(replace(TINY, guess=True), model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        gradient(tokens, tokens)
        optimizer.step()
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {name for name in before if name.endswith((".up", ".down"))}


def test_a_run_is_a_function_of_its_cell(context):
    first, second = (pd.DataFrame(run(TINY, context)).drop(columns="seconds") for _ in range(2))
    pd.testing.assert_frame_equal(first, second)
    assert list(first["step"]) == [0, 2, 3, 4]
    other = pd.DataFrame(run(replace(TINY, seed=1), context))
    assert other["validation_loss"][0] == first["validation_loss"][0]
    assert other["validation_loss"][3] != first["validation_loss"][3]


def test_the_base_is_trained_anew_where_only_its_results_are_stored(context):
    first = run(TINY, context)
    (weights,) = context.store.work_folder.glob("base-*.pt")
    weights.unlink()
    second = run(TINY, context)
    assert [row["validation_loss"] for row in first] == [row["validation_loss"] for row in second]


@pytest.mark.parametrize("method", ["backpropagation", "mezo", "mean"])
def test_a_run_that_diverges_ends(method, context):
    rows = run(replace(TINY, method=method, optimizer="sgd", learning_rate=1e30), context)
    assert rows[-1]["diverged"] and adapters.final_loss(rows) == inf
    assert rows[-1]["passes"] < 24


def searched(losses, contender):
    """Every cell of the search in the order in which it is run, of made-up losses by rate."""
    ran = []

    class Made:
        def rows(self, cells):
            (cell,) = cells
            loss = losses(cell.learning_rate)
            row = {"diverged": loss is None, "validation_loss": loss}
            return [row] if cell in ran else []

    ran += map(contender.at, contender.rates())
    for cell in adapters.further(Made()):
        ran.append(cell)
    return [(cell.learning_rate, cell.seed) for cell in ran]


def test_a_search_goes_on_where_the_best_is_at_an_edge(monkeypatch):
    contender = Contender("mean", 4, False, "adam", 0.9)
    monkeypatch.setattr(adapters, "CONTENDERS", [contender])
    three = [(0.3, 0), (0.9, 0), (2.7, 0)]
    assert searched(lambda rate: abs(rate - 0.8), contender) == [*three, (0.9, 1), (0.9, 2)]
    found = searched(lambda rate: None if rate > 0.2 else 1 - rate, contender)
    assert found == [*three, (0.1, 0), (0.0333, 0), (0.1, 1), (0.1, 2)]
    found = searched(lambda rate: -rate, contender)
    assert found[3:] == [(8.1, 0), (24.3, 0), (72.9, 0), (72.9, 1), (72.9, 2)]


def test_a_text_that_is_missing(tmp_path):
    with pytest.raises(DataError, match=r"kjv\.txt': No such file"):
        run(TINY, Context(Store(tmp_path / "store"), tmp_path))
