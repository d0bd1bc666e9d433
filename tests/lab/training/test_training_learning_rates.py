from typing import get_args

import pytest

from multitangent_lab.config import GradientName
from multitangent_lab.config import default_learning_rate as rate


def test_nearest_on_a_logarithmic_scale() -> None:
    assert rate("mnist", "mean", 3, width=256) == rate(
        "mnist", "mean", 4, width=256
    )  # 3 is closer to 4 than to 2
    assert rate("mnist", "mean", 16, width=500) == rate("mnist", "mean", 16, width=256)
    assert rate("mnist", "mean", 16, width=520) == rate("mnist", "mean", 16, width=1024)
    assert rate("mnist", "projection", 1000, width=10_000) == rate(
        "mnist", "projection", 16, width=4096
    )


@pytest.mark.parametrize("dataset", ["digits", "mnist", "fashion-mnist", "cifar10"])
@pytest.mark.parametrize("gradient", get_args(GradientName))
def test_every_run_has_one(dataset: str, gradient: str) -> None:
    assert 0 < rate(dataset, gradient, 3, width=64) < 1


@pytest.mark.parametrize("num_tangents", [1, 2, 16, 64])
def test_the_sum_moves_as_far_as_the_mean(num_tangents: int) -> None:
    mean = rate("mnist", "mean", num_tangents, width=256)
    assert rate("mnist", "sum", num_tangents, width=256) * num_tangents == pytest.approx(mean)


def test_a_single_tangent_is_the_mean_of_one() -> None:
    assert rate("mnist", "single", 1, width=1024) == rate("mnist", "mean", 1, width=1024)


def test_deep_networks_have_those_published() -> None:
    assert rate("mnist", "projection", 16, "resnet18") == 0.1215
    assert rate("cifar10", "single", 16, "vit") == rate("cifar10", "mean", 1, "vit") == 4.993e-05
    assert rate("cifar10", "backpropagation", 16, "resnet18") == 0.1
    assert rate("digits", "mean", 3, "vit") == rate("mnist", "mean", 4, "vit")
