import pytest
import torch

from multitangent_lab.models import fully_connected


@pytest.mark.parametrize("width", [1, 16])
@pytest.mark.parametrize("hidden_layers", [1, 2, 3])
def test_structure(width: int, hidden_layers: int) -> None:
    model = fully_connected((1, 8, 8), 10, width, hidden_layers)
    names = [type(layer).__name__ for layer in model]
    assert names == ["Flatten", *["Linear", "ReLU"] * hidden_layers, "Linear"]
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)


@pytest.mark.parametrize("width", [256, 1024, 4096])
def test_dimension_of_activity_perturbation(width: int) -> None:
    model = fully_connected((1, 28, 28), 10, width)
    outputs = [layer.out_features for layer in model if isinstance(layer, torch.nn.Linear)]
    assert sum(outputs) == 2 * width + 10  # Section IV-D


@pytest.mark.parametrize("name", ["width", "hidden_layers"])
def test_refuses_no_units(name: str) -> None:
    with pytest.raises(ValueError, match=rf"`{name}` should be at least 1. Found 0"):
        fully_connected((1, 8, 8), 10, **{name: 0})
