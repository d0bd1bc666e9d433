"""The models on which gradients are compared: small, in float64, each with another trait."""

from __future__ import annotations

import os

import torch
from torch import Tensor, nn

DEVICE = torch.device(os.environ.get("MULTITANGENT_TEST_DEVICE", "cpu"))


class ResidualMLP(nn.Module):
    """``x + f(x)``, with layers called in another order than they are defined in."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.first = nn.Linear(5, 6)
        self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + torch.sigmoid(self.second(h))
        return self.head(h)


class Attention(nn.Module):
    """One head of attention over four tokens, in plain torch calls."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(3, 4)
        self.key = nn.Linear(3, 4)
        self.value = nn.Linear(3, 4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        weights = torch.softmax(q @ k.transpose(-1, -2) / 2.0, dim=-1)
        return self.out((weights @ v).mean(1))


class SharedLayer(nn.Module):
    """One layer that runs twice: two blocks of tangents, one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 2), nn.Flatten(), nn.Linear(8, 3)
    )


def with_norms() -> nn.Module:
    """Normalisation without rules, and batch normalisation with running statistics."""
    model = nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 3)
    )
    model[1].eval()
    return model


def with_dropout() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Dropout(0.4), nn.Linear(6, 3))


class HeadsWithDropout(nn.Module):
    """PyTorch's own attention layer, with dropout on the weights of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].flatten(1))


MODELS = {  # name: (constructor, shape of one input, size of all sites' outputs)
    "mlp": (mlp, (5,), 13),
    "cnn": (cnn, (1, 5, 5), 18 + 8 + 3),
    "residual": (ResidualMLP, (5,), 15),
    "attention": (Attention, (4, 3), 3 * 16 + 3),
    "shared": (SharedLayer, (5,), 13),
    "dropout": (with_dropout, (5,), 9),
    "heads": (HeadsWithDropout, (3, 4), 12 + 3),
    "norms": (with_norms, (5,), 6 + 6 + 6 + 3),
}


def build(
    name: str, dtype: torch.dtype = torch.float64, batch: int = 6
) -> tuple[nn.Module, Tensor, Tensor, int]:
    """A model, a batch for it, and the dimension n of its activations."""
    constructor, shape, dimension = MODELS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = constructor().to(dtype)
        x = torch.randn(batch, *shape, dtype=dtype)
        y = torch.randint(3, (batch,))
    return model.to(DEVICE), x.to(DEVICE), y.to(DEVICE), dimension


def gradients(model: nn.Module) -> list[Tensor]:
    """The gradients of all parameters, taken away from them."""
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The error of the gradient of all parameters, relative to its norm.

    Not parameter by parameter: that of a bias of attention's keys is exactly zero.
    """
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
    return (difference / sum(float(b.square().sum()) for b in expected)) ** 0.5


class Model(nn.Module):
    """A model from a function of itself, whose modules are its `parts`."""

    def __init__(self, function, *modules, **parameters) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(modules)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *inputs):
        return self.function(self, *inputs)


class OfParts(Model):
    """A model from a function of its parts."""

    def forward(self, *inputs):
        return self.function(self.parts, *inputs)


def linear(*sizes, **options) -> nn.Linear:
    """A linear layer in float64, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(*sizes, dtype=torch.float64, **options)


def linears(*shapes) -> list[nn.Linear]:
    """Several linear layers in float64, one drawn after the other."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [nn.Linear(*shape, dtype=torch.float64) for shape in shapes]


def data(*shape) -> Tensor:
    """Always the same numbers, in float64."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torch.randn(shape, dtype=torch.float64)
