"""What the doctor reports, and what it repairs."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from multitangent import Normal
from multitangent.diagnosis import Report, _cost, doctor, measure_cost, repair
from multitangent.diagnosis._cost import peak_bytes

LOSS = nn.CrossEntropyLoss()


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.rfft(x).abs()


class Chain(nn.Sequential):
    """Layers one after another, of which only those with parameters are sites."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class Determinant(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        square = x.unflatten(1, (2, 2)) + 3 * torch.eye(2)
        return x * torch.linalg.slogdet(square)[1][:, None]


class LastState(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return x[0][:, -1]


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-1e-3, 1e-3)


class Clip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Clipped.apply(x)


def batch(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, *shape, generator=generator)
    return x, torch.randint(2, (6,), generator=generator)


def paths(report: Report, support: str) -> dict[str, tuple[str, ...]]:
    return {f.function: f.paths for f in report.functions if f.support == support}


def test_a_model_that_fits():
    model = Chain(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    report = doctor(model, batch(4), LOSS, tangents=Normal(3))
    assert report.is_healthy and report.fault == ""
    assert report.sites == {"0": 3, "2": 2} and report.dimension == 5
    rules = paths(report, "rule")
    assert rules["torch.nn.functional.linear"] == ("2",) and rules["torch.nn.functional.relu"] == (
        "1",
    )
    assert rules["torch.nn.functional.cross_entropy"] == ("(loss)",)
    assert report.cost is not None and sorted(report.cost.steps) == [1, 8]
    assert "K = 3, 6 samples" in str(report) and "self-test passed" in str(report)
    weights = doctor(model, batch(4), LOSS, perturb="weights")
    assert weights.dimension == 23 and weights.num_tangents == 16


def test_all_unsupported_functions_are_found_in_one_run():
    first = Chain(nn.Linear(4, 8), Spectrum())
    model = Chain(first, nn.Linear(5, 8), Spectrum(), nn.Linear(5, 2))
    report = doctor(model, batch(4), LOSS)
    assert not report.is_healthy and report.cost is None
    assert paths(report, "unsupported") == {"fft_rfft": ("0.1", "2")}
    (finding,) = report.unsupported
    assert "complex" in finding.reason and "view_as_real" in finding.remedy
    assert "fft_rfft in 0.1, 2" in str(report)


def test_functions_without_a_rule_and_their_place():
    model = Chain(nn.Linear(4, 4), Determinant(), nn.Linear(4, 2))
    report = doctor(model, batch(4), LOSS)
    assert report.is_healthy
    ((name, places),) = paths(report, "fallback").items()
    assert "slogdet" in name and places == ("1",)
    assert "register_rule" in report.fallbacks[0].remedy


def test_an_error_outside_of_torch_functions_has_a_place():
    model = Chain(nn.Linear(4, 4), Clip(), nn.Linear(4, 2))
    (finding,) = doctor(model, batch(4), LOSS).unsupported
    assert finding.paths == ("1",) and "forward (test_doctor.py, line" in finding.function
    assert "linear in the gradient" in finding.reason and finding.remedy


def test_a_model_that_is_refused_as_a_whole():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].register_full_backward_hook(lambda *_: None)
    (finding,) = doctor(model, batch(4), LOSS).unsupported
    assert (finding.function, finding.paths) == ("ForwardGradient", ("1",))


def test_samples_that_meet_fail_the_self_test():
    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.mean(0)

    model = Chain(nn.Linear(4, 3), Centred(), nn.Linear(3, 2))
    report = doctor(model, batch(4), LOSS)
    assert not report.is_healthy and not report.unsupported
    assert "between '0' and '2'" in report.fault and "self-test failed" in str(report)
    assert doctor(model, batch(4), LOSS, perturb="weights").is_healthy


def test_an_error_of_the_model_is_no_finding():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as raised:
        doctor(nn.Linear(3, 2), batch(4), LOSS)
    assert raised.value.__notes__ == [
        "Model and loss should run on the batch. They raise this without tangents."
    ]


def test_nothing_stays():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Dropout(), nn.Linear(3, 2))
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    report = doctor(model, batch(4), LOSS, fix=True)
    assert report.is_healthy and report.repairs == ()
    assert "batch normalisation" in report.notes[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(p.grad is None for p in model.parameters())
    assert not torch.nn.modules.module._global_forward_hooks


def test_bytes_of_live_tensors():
    x = torch.ones(256)  # 1 KiB
    assert peak_bytes(lambda: x + 1) == 1024
    assert peak_bytes(lambda: [x + i for i in range(3)]) == 3072
    assert peak_bytes(lambda: [(x + i).sum() for i in range(3)]) < 2048
    assert peak_bytes(lambda: x.view(2, 128).T.add_(0)) == 0


@pytest.mark.parametrize("perturb", ["activations", "weights"])
def test_memory_that_is_expected_of_more_tangents(perturb):
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    cost = doctor(model, (torch.randn(6, 20), torch.randn(6, 64)), nn.MSELoss(), perturb=perturb)
    assert cost.cost is not None
    few, many = (cost.cost.expected(k).bytes for k in (1, 33))
    block = 4 * cost.dimension  # of one tangent, in bytes
    assert many - few > 32 * block
    assert cost.cost.expected(33).memory_ratio > cost.cost.expected(1).memory_ratio > 1


def test_inference_is_not_charged_for_a_copy_of_the_batch():
    report = doctor(nn.Linear(400, 2), (torch.randn(6, 400), batch()[1]), LOSS)
    assert report.cost is not None and report.cost.inference[1] < 6 * 400 * 4
    assert "1 site, n = 2 ((model) 2)" in str(report) and "KiB with model" in str(report)


@pytest.mark.parametrize(("long", "runs"), [(60.0, 5), (0.0, 2)])
def test_what_takes_long_is_timed_once(long, runs, monkeypatch):
    monkeypatch.setattr(_cost, "_LONG", long)
    calls: list[int] = []
    steps = {k: partial(calls.append, k) for k in (1, 8)}
    measure_cost(4, 0, partial(calls.append, 0), steps)
    assert [calls.count(k) for k in (0, 1, 8)] == [runs] * 3  # one of them for memory


def with_weight_norm(layer: nn.Module, name: str = "weight", dim: int | None = 0) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(layer, name, dim)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_is_replaced_by_the_same_function(dim):
    model = nn.Sequential(with_weight_norm(nn.Linear(4, 3), dim=dim), nn.Linear(3, 2))
    x, y = batch(4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    old = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model(x)
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    assert len(repair(model)) == 1 and repair(model) == ()
    torch.testing.assert_close(model(x), expected)
    copy.deepcopy(model)
    assert {id(p) for p in model.parameters()} == {
        id(p) for p in optimizer.param_groups[0]["params"]
    }
    LOSS(model(x), y).backward()
    optimizer.step()
    assert not torch.allclose(model(x), expected)
    model.load_state_dict(old)
    torch.testing.assert_close(model(x), expected)


class Mixed(nn.Module):
    """A fused attention kernel, an LSTM, and weight normalisation of both kinds of layers."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=7, hidden_size=32, intermediate_size=6, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=1, attn_implementation="flex_attention",
        )  # fmt: skip
        self.language = transformers.LlamaForCausalLM(config)
        self.recurrent = with_weight_norm(nn.LSTM(7, 5, batch_first=True), "weight_hh_l0")
        self.head = with_weight_norm(nn.Linear(5, 2))

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.language(input_ids=tokens).logits
        return self.head(self.recurrent(logits)[0][:, -1])


@pytest.mark.parametrize("perturb", ["activations", "weights"])
def test_fix_repairs_attention_and_weight_norm_beside_an_lstm(perturb):
    torch.manual_seed(0)
    tokens, classes = torch.randint(7, (6, 5)), torch.randint(2, (6,))
    with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of flex_attention, which would like to be compiled
        model = Mixed()
        with torch.no_grad():
            expected = model(tokens)
        sick = doctor(model, (tokens, classes), LOSS, perturb=perturb)
        fixed = doctor(model, (tokens, classes), LOSS, perturb=perturb, fix=True)
    assert not sick.is_healthy and sick.repairs == ()
    assert sick.unsupported[0].paths == ("language.model.layers.0.self_attn",)
    assert "set_attn_implementation" in sick.unsupported[0].remedy
    assert fixed.is_healthy and fixed.fault == "" and not fixed.unsupported
    assert [text.partition(":")[0] for text in fixed.repairs] == ["language", "recurrent", "head"]
    assert "repaired: language: attention by 'flex_attention' became 'sdpa'" in str(fixed)
    torch.testing.assert_close(model(tokens), expected)
    assert "recurrent" in {f.paths[0] for f in fixed.fallbacks}


def test_a_remedy_that_changes_the_output_is_taken_back():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(_attn_implementation="fused")
            self.layer = nn.Linear(4, 2)

        def set_attn_implementation(self, name: str) -> None:
            if name == "eager":
                raise ValueError("there is none")
            self.config = SimpleNamespace(_attn_implementation=name)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + ("fused" in vars(self.config).values())

    model = Attention()
    assert doctor(model, batch(4), LOSS, fix=True).repairs == ()
    assert vars(model.config) == {"_attn_implementation": "fused"}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("perturb", ["activations", "weights"])
def test_what_needs_no_repair(perturb, training):
    """The fast path of an encoder, fused recurrent layers, both kinds of weight normalisation."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    model = Chain(
        nn.TransformerEncoder(layer, 2),
        nn.LSTM(4, 5, num_layers=2, bidirectional=True, batch_first=True),
        LastState(),
        with_weight_norm(nn.Linear(10, 4)),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 2)),
    ).train(training)
    report = doctor(model, batch(5, 4), LOSS, perturb=perturb)
    assert report.is_healthy, str(report)
