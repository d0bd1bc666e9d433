"""The table of methods that tune a language model, for one small enough for a test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from multitangent_lab.benchmarks._command import run_bench
from multitangent_lab.benchmarks._tuning import _make, _methods, _run, compare_tuning, peak_mib
from multitangent_lab.config import BenchConfig
from multitangent_lab.training import ConfigError

TINY = BenchConfig(measure="tuning", batch=2, repeats=1, device="cpu", language_model=(40, 6, 8, 3))


@pytest.mark.parametrize("trained", ["adapters", "all"])
def test_every_method_of_backpropagation_gives_the_same_gradient(trained: str) -> None:
    gradients = []
    for method in _methods(_with(trained)):
        if "backpropagation" in method.name:
            case = _make(_with(trained))
            case.step(method)()
            gradients.append([p.grad for p in case.model.parameters() if p.requires_grad])
    assert len(gradients) == 4  # plain and checkpointed, the batch at once and one by one
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0])


def test_a_row_for_every_method_with_ratios_of_equal_micro_batch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = iter(range(100, 200))
    monkeypatch.setattr(
        "multitangent_lab.benchmarks._tuning.peak_mib", lambda *_: float(next(sizes))
    )
    rows = compare_tuning(TINY)
    assert [row["peak_mib"] for row in rows] == [100.0 + i for i in range(len(rows))]
    forward = {
        (row["micro_batch"], row["num_tangents"]): row for row in rows if row["name"] == "forward"
    }
    assert set(forward) == {(b, k) for b in (2, 1) for k in (1, 4, 16)}
    inference = {row["micro_batch"]: row for row in rows if row["name"] == "inference"}
    for (size, _), row in forward.items():
        expected = row["peak_mib"] / inference[size]["peak_mib"]
        assert row["peak_to_inference"] == pytest.approx(expected, abs=1e-3)
    assert all((row["ms"] or 0) > 0 for row in rows if row["micro_batch"] == 2)


def test_the_peak_of_a_process_of_its_own(tmp_path: Path) -> None:
    method = next(m for m in _methods(TINY) if m.name == "inference")
    large = BenchConfig(batch=1, device="cpu", language_model=(20_000, 8, 256, 2))
    peak = peak_mib(_run, TINY, large, method)
    assert 25 < peak < 80  # the weights alone are 26 MiB


def test_the_command_stores_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("multitangent_lab.benchmarks._tuning.peak_mib", lambda *_: 1.0)
    run_bench(replace(TINY, out=tmp_path / "tuning.json"), json=True)
    stored = json.loads((tmp_path / "tuning.json").read_text())
    assert stored["trained"] == "adapters"
    assert "width" not in stored and stored["language_model"] == [40, 6, 8, 3]
    assert (tmp_path / "tuning.csv").read_text().count("\n") == len(stored["rows"]) + 1


@pytest.mark.parametrize(
    ("measure", "option"),
    [("tuning", {"width": 64}), ("tuning", {"num_tangents": 3}), ("step", {"trained": "all"})],
)
def test_options_that_would_be_ignored_are_refused(measure: str, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ConfigError, match=f"`{name}` should be left out for {measure}"):
        run_bench(BenchConfig(measure=measure, **option), json=True)  # type: ignore[arg-type]


def _with(trained: str) -> BenchConfig:
    return replace(TINY, trained=trained)  # type: ignore[arg-type]
