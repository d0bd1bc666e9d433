"""Searches of the learning rate: alone, by several workers, interrupted."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pandas as pd
import pytest

from multitangent_lab.config import SearchConfig
from multitangent_lab.search import _search
from multitangent_lab.search._objectives import function_values
from multitangent_lab.search._search import _study, grid, search
from multitangent_lab.training import ConfigError, TrainConfig

SPHERE = {"function": "sphere", "dimension": 8, "num_tangents": 2, "low": 1e-3, "steps": 40}
DIGITS = {"width": 8, "num_tangents": 2, "epochs": 3, "batch_size": 256, "device": "cpu"}


def config(folder: Path, **changes: object) -> SearchConfig:
    return SearchConfig(**{"run_dir": folder, "trials": 8} | changes)


def trials(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "trials.csv")


@pytest.mark.parametrize("sampler", ["tpe", "gp", "random", "grid"])
def test_a_function(tmp_path, sampler):
    seen: list[tuple[int, float, float]] = []
    found = search(config(tmp_path, sampler=sampler, **SPHERE), lambda *values: seen.append(values))
    table = trials(tmp_path)
    assert found.trials == len(table) == 8
    best = table.loc[table["value"].idxmin()]
    assert (found.learning_rate, found.value) == (best["learning_rate"], best["value"])
    assert table["learning_rate"].between(1e-3, 1.0).all()
    assert (tmp_path / "trials.png").stat().st_size > 10_000
    assert not (tmp_path / "preset.toml").exists()  # there is nothing to train
    if sampler != "grid":
        assert [ended for ended, _, _ in seen] == list(range(9))


def test_goes_on_and_repeats_itself(tmp_path):
    sphere = SPHERE
    search(config(tmp_path / "parts", **sphere))
    kept = trials(tmp_path / "parts")
    again = search(config(tmp_path / "parts", **sphere))
    assert again.trials == 8
    pd.testing.assert_frame_equal(trials(tmp_path / "parts"), kept)
    more = search(config(tmp_path / "parts", **sphere | {"trials": 15}))
    assert more.trials == 15
    whole = search(config(tmp_path / "whole", **sphere | {"trials": 15}))
    assert more.learning_rate == whole.learning_rate
    pd.testing.assert_series_equal(
        trials(tmp_path / "parts")["learning_rate"], trials(tmp_path / "whole")["learning_rate"]
    )


def test_the_vectorised_grid_is_the_search_one_by_one(tmp_path):
    found = search(config(tmp_path, sampler="grid", **SPHERE))
    table = trials(tmp_path)
    assert table["learning_rate"].tolist() == grid(1e-3, 1.0, 8)
    alone = [function_values(config(tmp_path, **SPHERE), [rate])[0] for rate in grid(1e-3, 1.0, 8)]
    assert table["value"].tolist() == pytest.approx(alone, rel=1e-4)
    assert found.value == table["value"].min()
    search(config(tmp_path, sampler="grid", **SPHERE | {"low": 3e-4, "high": 0.7}))
    again = search(config(tmp_path, sampler="grid", **SPHERE | {"low": 3e-4, "high": 0.7}))
    assert again.trials == 8
    assert search(config(tmp_path, sampler="grid", **SPHERE | {"trials": 12})).trials == 12


def test_training_writes_a_preset(tmp_path):
    found = search(config(tmp_path, trials=7, low=1e-3, **DIGITS))
    stored = tomllib.loads((tmp_path / "preset.toml").read_text())
    assert stored["learning_rate"] == found.learning_rate
    assert TrainConfig(**stored).width == 8
    table = trials(tmp_path)
    assert found.value == table["value"].min()
    assert found.pruned == (table["state"] == "pruned").sum()
    assert len(list((tmp_path / "trials").iterdir())) == 7


def test_a_grid_of_training_runs(tmp_path):
    options = {"trials": 3, "low": 1e-3, "sampler": "grid"} | DIGITS
    search(config(tmp_path, **options))
    assert trials(tmp_path)["learning_rate"].tolist() == grid(1e-3, 1.0, 3)


def test_tangents_of_a_function_are_those_asked_for(tmp_path):
    found = [
        function_values(config(tmp_path, tangents=name, **SPHERE), [0.1])[0]
        for name in ("normal", "rademacher", "orthogonal")
    ]
    assert len(set(found)) == 3


def test_diverging_runs_are_pruned(tmp_path):
    options = DIGITS | {"gradient": "backpropagation", "low": 1e-2, "high": 1e12}
    found = search(config(tmp_path, trials=6, sampler="grid", **options))
    assert found.pruned >= 1
    assert found.learning_rate < 1e6


WORKER = [
    *("lr-search", "--width", "8", "--num-tangents", "2", "--epochs", "15", "--batch-size", "64"),
    *("--trials", "6", "--low", "1e-3"),
]


HELD = """
import sys, time
from pathlib import Path
from multitangent_lab.cli import main
from multitangent_lab.search import _search

_search._BEAT, _search._GRACE = 1, 5
gate, build_objective = Path(sys.argv[1]), _search.build_objective

def held(config):
    objective = build_objective(config)
    def once_open(trial, rate):
        while not gate.exists():
            time.sleep(0.05)
        return objective(trial, rate)
    return once_open

_search.build_objective = held
raise SystemExit(main(sys.argv[2:]))
"""


def worker(folder: Path, *python: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, *(python or ("-m", "multitangent_lab.cli")), *WORKER, "--run-dir", folder],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )


@contextmanager
def killed_at_the_end(*processes: subprocess.Popen[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def states(folder: Path) -> list[str]:
    path = folder / "study.db"
    if not path.exists():
        return []
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            return [state for (state,) in database.execute("select state from trials")]
    except sqlite3.OperationalError:
        return []


def test_two_workers_begin_and_finish_together(tmp_path):
    workers = [worker(tmp_path), worker(tmp_path)]
    with killed_at_the_end(*workers):
        assert [process.wait(timeout=300) for process in workers] == [0, 0]
    assert 6 <= len(trials(tmp_path)) <= 7
    assert trials(tmp_path)["learning_rate"].is_unique
    assert set(states(tmp_path)) <= {"COMPLETE", "PRUNED"}


@pytest.mark.parametrize(
    "message", ["table studies already exists", "UNIQUE constraint failed: alembic_version"]
)
def test_tables_that_another_worker_makes_at_the_same_moment(tmp_path, monkeypatch, message):
    storage, failures = _search.optuna.storages.RDBStorage, [message] * 3
    make = storage.__init__

    def racing(*args, **options):
        if failures:
            raise RuntimeError(failures.pop())
        make(*args, **options)

    monkeypatch.setattr(storage, "__init__", racing)
    assert search(config(tmp_path, trials=1, **SPHERE)).trials == 1
    assert not failures


def test_two_workers_share_and_a_killed_one_loses_one_trial(tmp_path):
    gate = tmp_path / "open"  # no trial ends before it is there
    first, second = (worker(tmp_path, "-c", HELD, str(gate)) for _ in range(2))
    with killed_at_the_end(first, second):
        deadline = time.monotonic() + 120
        while states(tmp_path) != ["RUNNING"] * 2 and time.monotonic() < deadline:
            assert [first.poll(), second.poll()] == [None, None]
            time.sleep(0.05)
        assert states(tmp_path) == ["RUNNING"] * 2  # one each
        first.send_signal(signal.SIGKILL)
        first.wait()
        gate.touch()
        assert second.wait(timeout=300) == 0
    after = states(tmp_path)
    assert after.count("FAIL") == 1  # the one it was at
    assert after.count("COMPLETE") + after.count("PRUNED") == len(after) - 1 == 6


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed:UserWarning")
def test_a_worker_killed_before_its_first_sign_of_life(tmp_path, monkeypatch):
    monkeypatch.setattr(_search, "_GRACE", 1)
    one = config(tmp_path, trials=2, **SPHERE).resolved()
    _study(one, tmp_path).ask()  # and nothing ever comes of it
    assert search(one).trials == 2
    assert sorted(states(tmp_path)) == ["COMPLETE", "COMPLETE", "FAIL"]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("sqlite:////nowhere/at/all.db", "unable to open database file"),
        ("nonsense", "Could not parse"),
        ("unknown://host/name", "Can't load plugin"),
    ],
)
def test_a_storage_out_of_reach(tmp_path, url, reason):
    with pytest.raises(ConfigError, match=f"`storage` should be the URL .*{url}.*{reason}"):
        search(config(tmp_path, storage=url, **SPHERE))


@pytest.mark.parametrize("name", ["50%", "why?", "a%20b", "a#b", "{a}", "%(a)s", "a&b=c d"])
def test_a_folder_of_any_name(tmp_path, name):
    found = search(config(tmp_path / name, **SPHERE | {"trials": 3}))
    assert found.trials == 3
    assert (tmp_path / name / "study.db").exists()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert search(config(tmp_path / name, **SPHERE | {"trials": 3})).trials == 3


def test_never_finite(tmp_path):
    changes = SPHERE | {"low": 1e3, "high": 1e4, "trials": 3}
    with pytest.raises(
        ConfigError, match=r"`high` should allow .* Found no finite loss in 3 trials"
    ):
        search(config(tmp_path, **changes))
    assert (tmp_path / "study.db").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": 1.0, "high": 1.0}, r"`low` should be below `high`. Found 1.0 and 1.0"),
        ({"low": 0.0}, "`low` should be positive and finite"),
        ({"high": float("inf")}, "`high` should be positive and finite"),
        ({"trials": 0}, r"`trials` should be at least 1. Found 0"),
        ({"dimension": 0}, r"`dimension` should be at least 1. Found 0"),
        ({"function": "sphere", "gradient": "local"}, "`gradient` should be one without guesses"),
        ({"function": "sphere", "gradient": "mezo"}, "`gradient` should be one of derivatives"),
        ({"sampler": "cmaes"}, "`sampler` should be one of tpe, gp, random, grid"),
        ({"function": "square"}, "`function` should be one of sphere"),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        SearchConfig(**changes)


def test_the_same_search_has_the_same_name():
    one = SearchConfig(function="sphere", trials=3, sampler="gp", storage="sqlite:///x")
    other = SearchConfig(function="sphere", trials=9)
    assert one.hash == other.hash
    for change in ({"seed": 1}, {"high": 2.0}, {"dimension": 3}, {"gradient": "mean"}):
        assert SearchConfig(**{"function": "sphere"} | change).hash != one.hash
