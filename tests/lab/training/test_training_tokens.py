"""Training on the losses of tokens, each credited to the positions up to it."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from multitangent import ForwardGradient, SimulatedGradient
from multitangent_lab.config import ConfigError, SearchConfig, TrainConfig
from multitangent_lab.data import next_token_losses
from multitangent_lab.models import gpt
from multitangent_lab.training import train
from multitangent_lab.training._named_gradients import build_gradient

SMALL = TrainConfig(
    dataset="text", model="gpt", context=8, embedding=16, blocks=2, heads=2, batch_size=16,
    images=160, epochs=3, learning_rate=0.01, device="cpu", gradient="mean", credit="token",
)  # fmt: skip
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "and", "runs"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "words.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=1500)))
    return path


@pytest.mark.parametrize("gradient", ["mean", "projection", "informed"])
def test_a_language_model_trains(text: Path, tmp_path: Path, gradient: str) -> None:
    config = replace(SMALL, data_file=text, run_dir=tmp_path / "run", gradient=gradient)
    losses = train(config).metrics()["train_loss"].tolist()
    assert losses[-1] < losses[0]


def test_the_simulation_gives_the_same_losses(text: Path, tmp_path: Path) -> None:
    runs = [
        train(
            replace(SMALL, data_file=text, run_dir=tmp_path / str(simulated), simulated=simulated)
        )
        for simulated in (False, True)
    ]
    first, second = (run.metrics()["train_loss"].tolist() for run in runs)
    assert first == pytest.approx(second, rel=1e-3)


def test_the_gradient_that_is_built() -> None:
    model = gpt(7, 8, embedding=16, blocks=2, heads=2)
    for simulated, kind in ((False, ForwardGradient), (True, SimulatedGradient)):
        config = replace(SMALL, text_hash="0", simulated=simulated, discount=0.5)
        gradient = build_gradient(config, model, next_token_losses)
        assert isinstance(gradient, kind)
        assert (gradient.perturb.credit, gradient.perturb.discount) == ("token", 0.5)
    x = torch.randint(7, (3, 8))
    assert gradient(x, x).ndim == 0


def test_hashes() -> None:
    config = replace(SMALL, text_hash="0")
    before = replace(config, credit="sample")
    assert {"credit", "discount"} <= before.identity.keys()
    assert len({c.hash for c in (before, config, replace(config, discount=0.5))}) == 3
    # That of a run from before there was a choice.
    assert replace(before, gradient="projection").resolved().hash == "ff7a701331ba"


@pytest.mark.parametrize("gradient", ["backpropagation", "mezo", "residual"])
def test_gradients_that_measure_no_activation(gradient: str) -> None:
    config = replace(SMALL, text_hash="0", gradient=gradient, discount=0.5)
    without = replace(config, credit="sample", discount=1.0)
    assert config.resolved().hash == without.resolved().hash


@pytest.mark.parametrize("kind", [TrainConfig, SearchConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"credit": "token"}, "`credit` should be set for --dataset text only"),
        ({"discount": 0.5}, "`discount` should be set for --credit token only"),
        (
            {"dataset": "text", "model": "gpt", "credit": "token", "perturb": "weights"},
            "`credit` should be sample for weights: a weight acts at all positions",
        ),
        (
            {"dataset": "text", "model": "gpt", "credit": "token", "discount": 1.5},
            "`discount` should be at most 1",
        ),
    ],
)
def test_what_does_not_fit(kind: type, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(gradient="mean", text_hash="0", **options).resolved()


def test_an_unknown_credit() -> None:
    with pytest.raises(ConfigError, match="`credit` should be one of sample, token"):
        replace(SMALL, credit="word")  # type: ignore[arg-type]
