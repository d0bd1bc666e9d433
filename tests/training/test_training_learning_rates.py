import pytest

from multitangent.training._learning_rates import default_learning_rate as rate


def test_nearest_on_a_logarithmic_scale() -> None:
    assert rate("mnist", "mean", 256, 3) == rate(
        "mnist", "mean", 256, 4
    )  # 3 is closer to 4 than to 2
    assert rate("mnist", "mean", 500, 16) == rate("mnist", "mean", 256, 16)
    assert rate("mnist", "mean", 520, 16) == rate("mnist", "mean", 1024, 16)
    assert rate("mnist", "projection", 10_000, 1000) == rate("mnist", "projection", 4096, 16)


@pytest.mark.parametrize("dataset", ["digits", "mnist", "fashion-mnist", "cifar10"])
@pytest.mark.parametrize("gradient", ["backpropagation", "single", "sum", "mean", "projection"])
def test_every_run_has_one(dataset: str, gradient: str) -> None:
    assert 0 < rate(dataset, gradient, 64, 3) < 1


@pytest.mark.parametrize("num_tangents", [1, 2, 16, 64])
def test_the_sum_moves_as_far_as_the_mean(num_tangents: int) -> None:
    mean = rate("mnist", "mean", 256, num_tangents)
    assert rate("mnist", "sum", 256, num_tangents) * num_tangents == pytest.approx(mean)


def test_a_single_tangent_is_the_mean_of_one() -> None:
    assert rate("mnist", "single", 1024, 1) == rate("mnist", "mean", 1024, 1)
