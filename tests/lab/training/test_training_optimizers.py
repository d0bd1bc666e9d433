import pytest
import torch

from multitangent_lab.models import fully_connected
from multitangent_lab.training import ConfigError
from multitangent_lab.training._optimizers import build_optimizer, optimizer_names

MODEL = fully_connected((1, 2, 2), 2, 3)


@pytest.mark.parametrize("name", sorted(set(optimizer_names()) - {"Muon"}))
def test_every_optimizer_can_be_had(name: str) -> None:
    optimizer = build_optimizer(name, MODEL.parameters(), learning_rate=0.25)
    assert type(optimizer) is getattr(torch.optim, name)
    assert optimizer.param_groups[0]["lr"] == 0.25


def test_sgd_is_plain() -> None:
    (group,) = build_optimizer("SGD", MODEL.parameters(), learning_rate=0.1).param_groups
    assert group["momentum"] == group["weight_decay"] == 0


def test_learning_rate_of_torch() -> None:
    assert build_optimizer("Adam", MODEL.parameters(), None).param_groups[0]["lr"] == 0.001


@pytest.mark.parametrize(
    ("name", "hint"), [("sgd", "SGD"), ("AdmaW", "AdamW"), ("LBFGS", "SGD"), ("zzz", "SGD")]
)
def test_unknown(name: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=rf"Adam.* Found '{name}'. Try '{hint}'"):
        build_optimizer(name, MODEL.parameters(), None)


@pytest.mark.skipif("Muon" not in optimizer_names(), reason="torch is too old")
def test_unsuitable() -> None:
    with pytest.raises(ConfigError, match=r"Found 'Muon', which says: .*2D"):
        build_optimizer("Muon", MODEL.parameters(), None)
