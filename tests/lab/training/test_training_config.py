import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from multitangent_lab.config import COMPARE_PRESETS, TRAIN_PRESETS
from multitangent_lab.data import DATASET_NAMES
from multitangent_lab.training import CompareConfig, ConfigError, TrainConfig
from multitangent_lab.training._run_folder import is_finished, to_toml

BAD = {
    "dataset": ("mnits", "`dataset` should be one of .* Found 'mnits'. Try 'mnist'"),
    "gradient": ("project", "Try 'projection'"),
    "width": (0, "`width` should be at least 1. Found 0. Try the default, 256"),
    "num_tangents": (0, "`num_tangents` should be at least 1"),
    "epochs": (2.5, "`epochs` should be a whole number. Found 2.5"),
    "batch_size": (True, "`batch_size` should be a whole number. Found True"),
    "seed": (-1, "`seed` should be at least 0"),
    "learning_rate": (float("nan"), "`learning_rate` should be positive and finite"),
    "optimizer": (3, "`optimizer` should be a string"),
    "run_dir": (3, "`run_dir` should be a path"),
    "tensorboard": ("yes", "`tensorboard` should be true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_value(name: str) -> None:
    value, message = BAD[name]
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**{name: value})


@pytest.mark.parametrize("value", ["mean", [], ["mean", "meen"]])
def test_bad_gradients(value: Any) -> None:
    with pytest.raises(ConfigError, match="`gradients` should be"):
        CompareConfig(gradients=value)


@pytest.mark.parametrize("rate", [0, -0.1, float("inf")])
def test_bad_learning_rate(rate: float) -> None:
    with pytest.raises(ConfigError, match="`learning_rate` should be positive and finite"):
        TrainConfig(learning_rate=rate)


def test_every_data_set_can_be_chosen() -> None:
    for name in DATASET_NAMES:
        TrainConfig(dataset=name)  # type: ignore[arg-type]


def test_hash_is_pinned() -> None:
    """Stored runs are found again by every later version, on every machine."""
    assert TrainConfig(gradient="projection").resolved().hash == "d4f4d4c93cc7"


def test_runs_from_before_guesses_set_their_gain_are_found(tmp_path: Path) -> None:
    old = TrainConfig(gradient="projection", run_dir=tmp_path).resolved()
    (tmp_path / "config.toml").write_text(to_toml(replace(old, gain=0.1)))
    assert "gain = 0.1" in (tmp_path / "config.toml").read_text()
    (tmp_path / "result.json").write_text("{}")
    assert is_finished(old, tmp_path)


def test_hash_is_that_of_what_determines_the_result() -> None:
    config = TrainConfig()
    same = replace(config, run_dir="x", data_dir="y", resume=True, tensorboard=True, device="cpu")
    assert same.hash == config.hash
    for change in ({"seed": 1}, {"width": 8}, {"gradient": "mean"}, {"learning_rate": 0.1}):
        assert replace(config, **change).hash != config.hash


def test_guesses_have_samples_of_their_own_and_an_exact_output() -> None:
    guided = TrainConfig(gradient="feedback").resolved()
    assert (guided.share, guided.output) == ("sample", "exact")
    assert (guided.num_tangents, guided.recalibrate) == (8, True)
    random = TrainConfig(gradient="projection").resolved()
    assert (random.share, random.output) == ("batch", "perturbed")
    assert (random.num_tangents, random.recalibrate) == (16, False)
    assert TrainConfig(gradient="feedback", share="batch").resolved().share == "batch"
    assert replace(guided, gain=0.2).hash != guided.hash
    assert replace(random, gain=0.2).resolved().gain == "auto"  # there is no guess
    with pytest.raises(ConfigError, match=r"`num_tangents` should be at least 3 for .* feedback"):
        TrainConfig(gradient="feedback", num_tangents=2).resolved()
    with pytest.raises(ConfigError, match=r"`num_tangents` should be at least 4 for .* informed"):
        TrainConfig(gradient="informed", num_tangents=3).resolved()
    with pytest.raises(ConfigError, match=r"`perturb` should be activations for .* local"):
        TrainConfig(gradient="local", perturb="weights").resolved()
    assert TrainConfig(gradient="previous", perturb="weights").resolved().perturb == "weights"


def test_tangents_of_low_rank_are_refused_for_activations() -> None:
    with pytest.raises(ConfigError, match=r"`tangents` should be of full rank for activations"):
        TrainConfig(tangents="low-rank").resolved()
    options = {"tangents": "low-rank", "perturb": "weights"}
    config = TrainConfig(gradient="projection", **options).resolved()
    assert config.tangents == "low-rank"
    backpropagation = TrainConfig(tangents="low-rank", gradient="backpropagation").resolved()
    assert backpropagation.tangents == "normal"


def test_equal_runs_have_equal_hashes() -> None:
    exact = TrainConfig(gradient="backpropagation", num_tangents=4, tangents="sphere")
    assert exact.resolved().hash == TrainConfig(gradient="backpropagation").resolved().hash
    single = TrainConfig(gradient="single", num_tangents=4)
    assert single.resolved().num_tangents == 1


def test_residual_has_one_tangent_and_an_exact_output() -> None:
    residual = TrainConfig(gradient="residual", tangents="sphere", num_tangents=4).resolved()
    assert (residual.num_tangents, residual.output, residual.label) == (1, "exact", "residual")
    assert residual.hash == TrainConfig(gradient="residual").resolved().hash


@pytest.mark.parametrize(
    ("setting", "found"), [({"perturb": "weights"}, "weights"), ({"output": "perturbed"}, "a pert")]
)
def test_residual_needs_an_exact_output(setting: dict[str, Any], found: str) -> None:
    with pytest.raises(ConfigError, match=f"for the gradient residual.* Found {found}"):
        TrainConfig(gradient="residual", **setting).resolved()


def test_mezo_perturbs_weights_along_one_tangent() -> None:
    mezo = TrainConfig(gradient="mezo", tangents="sphere", share="sample").resolved()
    assert (mezo.perturb, mezo.num_tangents, mezo.label) == ("weights", 1, "mezo")
    assert mezo.hash == TrainConfig(gradient="mezo", num_tangents=4).resolved().hash
    wider = TrainConfig(gradient="mezo", width=1024).resolved()
    assert mezo.learning_rate is not None and wider.learning_rate is not None
    assert 0 < wider.learning_rate < mezo.learning_rate < 0.002


def test_learning_rate_is_left_to_other_optimizers() -> None:
    assert TrainConfig(optimizer="Adam").resolved().learning_rate is None
    assert TrainConfig().resolved().learning_rate is not None


@pytest.mark.parametrize("preset", TRAIN_PRESETS.values())
def test_toml_round_trip(preset: TrainConfig) -> None:
    config = replace(preset, data_dir='a "quoted" \\ folder').resolved()
    assert TrainConfig(**tomllib.loads(to_toml(config))) == config


def test_the_folders_of_a_comparison_have_the_names_of_its_runs() -> None:
    for run in CompareConfig(run_dir=Path("here")).runs():
        assert run.run_dir == Path("here", run.label)
        assert "None" not in run.label


def test_runs_of_a_comparison_differ_in_the_gradient_only() -> None:
    for preset in COMPARE_PRESETS.values():
        runs = replace(preset, num_tangents=4, seed=7).resolved().runs()
        gradients = tuple("informed" if name == "auto" else name for name in preset.gradients)
        assert tuple(run.gradient for run in runs) == gradients
        assert {run.seed for run in runs} == {7}
        assert len({run.run_dir for run in runs}) == len(runs)


@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        ("fc", ("direct", 5, None, 32)),
        ("resnet18", ("feedback", 3, ("stage2", "head"), 1)),
        ("vit", ("residual", 1, None, 1)),
    ],
)
def test_the_gradient_that_suits_a_model(model: str, chosen: tuple[object, ...]) -> None:
    config = TrainConfig(model=model, dataset="mnist").resolved()
    found = config.gradient, config.num_tangents, config.sites, config.learn_every
    assert found == chosen
    assert config.resolved() == config
    named = TrainConfig(model=model, dataset="mnist", num_tangents=8).resolved()
    assert (named.gradient, named.sites) == ("informed", None)


def test_sites_of_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="`sites` should be left out where weights"):
        TrainConfig(gradient="mean", perturb="weights", sites=("1",)).resolved()
    assert TrainConfig(gradient="backpropagation", sites=("1",)).resolved().sites is None


def test_learning_in_every_step_keeps_its_name() -> None:
    always = TrainConfig(gradient="informed", learn_every=1).resolved()
    assert always.hash != TrainConfig(gradient="informed").resolved().hash
    with pytest.raises(ConfigError, match="`learn_every` should be at least 1"):
        TrainConfig(learn_every=0)
