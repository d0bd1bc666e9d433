"""The benchmarks measure what they say, on networks small enough for a test."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from multitangent_lab.benchmarks._case import make_case, make_gradient
from multitangent_lab.benchmarks._command import run_bench
from multitangent_lab.benchmarks._curves import curve_of_cosines
from multitangent_lab.benchmarks._flops import count_flops
from multitangent_lab.benchmarks._guesses import _equal
from multitangent_lab.benchmarks._memory import measure_memory
from multitangent_lab.benchmarks._push import share_after_first_site
from multitangent_lab.benchmarks._statistics import compare_statistics
from multitangent_lab.config import BenchConfig
from multitangent_lab.training import ConfigError

SMALL = {"width": 8, "batch": 4, "num_tangents": 2, "repeats": 2, "device": "cpu"}


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        (
            "step",
            "forward_gradient_ms backpropagation_ms python_loop_ms vmap_jvp_ms "
            "ratio_to_backpropagation",
        ),
        ("push", "push_ms limit_ms vmap_jvp_ms forward_ms ratio_to_limit share"),
    ],
)
def test_figures(measure, expected, tmp_path, capsys):
    out = tmp_path / "new" / "result.json"
    result = run_bench(BenchConfig(measure=measure, out=out, **SMALL), json=False)
    assert set(expected.split()) <= set(result)
    assert all(result[name] > 0 for name in expected.split())
    assert json.loads(out.read_text()) == result
    assert result["provenance"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert all(name in printed for name in expected.split())


def test_the_share_of_the_fully_connected_network():
    config = BenchConfig(width=16, batch=4, device="cpu")
    case = make_case(config)
    share = share_after_first_site(case, make_gradient(config, case))
    assert share == pytest.approx((16 * 16 + 16 * 10) / (784 * 16 + 16 * 16 + 16 * 10))


def test_cosines_grow_with_the_number_of_tangents(tmp_path):
    config = BenchConfig(measure="cosine", counts=(1, 64), out=tmp_path / "c.json", **SMALL)
    run_bench(config, json=True)
    rows = list(csv.DictReader((tmp_path / "c.csv").read_text().splitlines()))
    assert [(row["share"], row["num_tangents"]) for row in rows] == [
        ("batch", "1"), ("batch", "64"), ("sample", "1"), ("sample", "64"),
    ]  # fmt: skip
    cosines = [float(row["squared_cosine"]) for row in rows]
    assert cosines[0] < cosines[1] == pytest.approx(1)  # 64 tangents span n = 26
    assert cosines[2] < cosines[3] == pytest.approx(1)
    assert (tmp_path / "c.png").stat().st_size > 10_000


def test_guesses_beside_random_tangents_of_equal_time(tmp_path):
    config = BenchConfig(measure="guesses", counts=(1, 4), out=tmp_path / "g.json", **SMALL)
    table = run_bench(config, json=True)["rows"]
    assert [row["gradient"] for row in table if row["is_default"]] == ["direct"]
    rows = {row["gradient"]: row for row in table if not row["is_default"]}
    assert (tmp_path / "g.csv").read_text().startswith("gradient,num_tangents,learn_every,flops,")
    assert rows["backpropagation"]["ratio_to_backpropagation"] == 1
    # Batch of 4, widths 784, 8, 8, 10: forward, and gradients of weights and of hidden values.
    products = 784 * 8 + 8 * 8 + 8 * 10
    flops = 2 * 4 * (2 * products + 8 * 8 + 8 * 10)
    assert rows["backpropagation"]["flops"] == flops
    assert (rows["feedback"]["num_tangents"], rows["feedback"]["learn_every"]) == (4, 32)
    # Three more rows of tangents through the two layers behind the first site, one matrix for all.
    assert rows["4 random"]["flops"] > rows["1 random"]["flops"] > flops / 2


def test_operations_of_attention_are_those_of_its_products():
    q, k, v = (torch.randn(2, 3, 5, 4, requires_grad=True) for _ in range(3))

    def attend():
        return torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def written_out():
        return (q @ k.mT).softmax(-1) @ v

    products = 2 * 2 * 3 * 5 * 5 * 4
    assert count_flops(written_out) == count_flops(attend) == 2 * products
    # Backwards the products are computed again, and two come of each.
    assert count_flops(lambda: attend().sum().backward()) == (2 + 5) * products


def test_the_tangents_that_take_as_long():
    known = [(1, 2.0), (4, 5.0), (8, 4.0), (16, 12.0)]
    assert [_equal(known, ratio) for ratio in (1.0, 3.5, 8.0, 20.0)] == [1.0, 2.5, 12.0, None]


def test_memory_counts_the_parameters():
    found = measure_memory(BenchConfig(**SMALL | {"width": 1024, "batch": 256}), ("inference",))
    assert 3 < found["inference_mib"] < 100  # its weights alone are 7.4 MiB


def test_statistics_are_compared_with_the_true_gradient(monkeypatch):
    monkeypatch.setattr("multitangent_lab.benchmarks._statistics.STEPS", (0,))
    found = compare_statistics(BenchConfig(model="resnet18", batch=4, device="cpu"))
    assert found["cosine_coupled"] == [1.0]
    assert 0.3 < found["cosine_frozen"][0] < 1.0


def test_cosines_of_one_network_do_not_depend_on_the_run():
    config = BenchConfig(counts=(2,), **SMALL)
    first, second = curve_of_cosines(config), curve_of_cosines(config)
    assert [row["squared_cosine"] for row in first] == [row["squared_cosine"] for row in second]


@pytest.mark.parametrize("options", [{"compile": True}, {"keep_memory": True}])
def test_refuses_what_is_not_measured(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"`{name}` should go with step or .*Found memory"):
        run_bench(BenchConfig(measure="memory", **options), json=True)
