"""The fuzz finds nothing wrong, and can find something."""

from __future__ import annotations

import json

import pytest
import torch

from multitangent import SimulatedGradient
from multitangent.dual import DualTensor
from multitangent.engine import ForwardMode
from multitangent.gradient import GradientEstimator
from multitangent_lab.cli import main
from multitangent_lab.config import ConfigError, FuzzConfig
from multitangent_lab.fuzz import KINDS, run_case, run_fuzz
from multitangent_lab.fuzz import _blocks as blocks
from multitangent_lab.fuzz import _modules as modules
from multitangent_lab.fuzz._draw import PENDING, Draw, table
from multitangent_lab.fuzz._functions import FUNCTIONS, Step, draw_input, works
from multitangent_lab.fuzz._states import EVENTS


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=list(KINDS))
def test_random_cases_agree_with_backpropagation(kind):
    found = [run_case(0, index) for index in range(kind, 1000, len(KINDS))]
    assert [r for r in found if r.verdict in ("wrong", "unclear")] == []
    assert sum(r.verdict == "refused" for r in found) < 0.1 * len(found)


def lost_writes(patch):
    """Writes in place change the primal alone."""
    patch.setattr(DualTensor, "write", lambda dual, tangents: None)


def inexact_derivatives(patch):
    push = ForwardMode.__call__

    def inexact(engine, run, tangents):
        losses, jvps, output = push(engine, run, tangents)
        return losses, jvps * 1.001, output

    patch.setattr(ForwardMode, "__call__", inexact)


def a_run_too_many(patch):
    """The model runs once more in every step."""
    step = GradientEstimator.__call__

    def twice(gradient, inputs, target):
        if not isinstance(gradient, SimulatedGradient):
            modules.call(gradient.model, inputs)
        return step(gradient, inputs, target)

    patch.setattr(GradientEstimator, "__call__", twice)


@pytest.mark.parametrize(
    ("kind", "break_it"), list(enumerate([lost_writes, inexact_derivatives, a_run_too_many]))
)
def test_what_is_broken_is_found(kind, break_it, monkeypatch):
    indices = range(kind, 120, len(KINDS))
    break_it(monkeypatch)
    wrong = [i for i in indices if run_case(0, i).verdict == "wrong"]
    assert wrong
    monkeypatch.undo()
    assert run_case(0, wrong[0]).verdict == "right"


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (TypeError("`x` should be small. Found 7. Try 3."), "refused"),
        (KeyError("Found 7. Try 3."), "unclear"),
        (RuntimeError("please file an issue"), "unclear"),
    ],
)
def test_errors(error, verdict, monkeypatch):
    def fail(engine, run, tangents):
        raise error

    monkeypatch.setattr(ForwardMode, "__call__", fail)
    assert run_case(0, 1).verdict == verdict


@pytest.mark.parametrize("kind", range(len(KINDS)), ids=list(KINDS))
def test_a_case_is_a_function_of_seed_and_index(kind):
    state = torch.get_rng_state()
    assert run_case(3, kind) == run_case(3, kind)
    assert run_case(3, kind).blocks != run_case(4, kind).blocks
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


TABLES = [
    FUNCTIONS, EVENTS, blocks.AGAIN, blocks.ANYWHERE, blocks.AROUND, blocks.FEATURES,
    blocks.VECTORS, blocks.SEQUENCES, blocks.IMAGES, blocks.STATEFUL, blocks.RANDOM,
    *modules.LOSSES.values(),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_every_function_can_be_drawn():
    """PyTorch accepts each for some tensors, else it would test nothing."""
    r = Draw(0)
    r.pending = True
    left = set(FUNCTIONS)
    for seed in range(500):
        inputs = [draw_input(r, i) for i in range(2)]
        steps = {name: Step(name, seed, 0, 1) for name in left}
        left -= {name for name, step in steps.items() if works([step], inputs, True)}
    assert left == set()


def test_every_block_keeps_the_shape_of_its_input():
    shapes = {"vectors": (3, 4), "sequences": (3, 2, 4), "images": (3, 2, 4, 4)}
    for family, shape in shapes.items():
        for name, block in [item for t in blocks.FAMILIES[family] for item in t.items()]:
            assert block(Draw(0))(torch.randn(shape)).shape == shape, name
    for name, block in [*blocks.STATEFUL.items(), *blocks.RANDOM.items()]:
        for family in ("vectors", "sequences"):
            x = torch.randn(shapes[family])
            assert block(Draw(0))(x).shape == x.shape, name


def test_what_is_pending_is_a_building_block():
    others = {"0-d", "no tangents", "input written into"}
    assert {name for t in TABLES for name in t} | others >= PENDING
    assert all(Draw(i).name(FUNCTIONS) not in PENDING for i in range(1000))


def test_a_table_of_expressions():
    assert list(table("a\nf({b c},\n  d)", "a", {})) == ["a", "f(b, d)", "f(c, d)"]


def test_the_command(tmp_path, capsys, monkeypatch):
    arguments = ["fuzz", "--cases", "9", "--out", str(tmp_path / "new")]
    assert main([*arguments, "--json"]) == 0
    stored = json.loads((tmp_path / "new" / "fuzz.json").read_text())
    assert json.loads(capsys.readouterr().out) == stored
    assert (stored["cases"], stored["seed"], stored["failed"]) == (9, 0, False)
    assert [sum(counts.values()) for counts in stored["kinds"].values()] == [3, 3, 3]
    assert stored["provenance"]["torch"] == torch.__version__
    inexact_derivatives(monkeypatch)
    assert main(["fuzz", "--case", "1"]) == 1
    assert "wrong 1: gradient of" in capsys.readouterr().out


def test_workers_change_nothing():
    results = [run_fuzz(FuzzConfig(cases=24, workers=w), json=True) for w in (1, 2)]
    assert results[0]["kinds"] == results[1]["kinds"]
    assert results[0]["found"] == results[1]["found"]


def test_a_seed_below_zero():
    with pytest.raises(ConfigError, match=r"`seed` should be at least 0. Found -1. Try 0."):
        FuzzConfig(seed=-1)
