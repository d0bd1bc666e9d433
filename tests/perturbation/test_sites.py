"""Which layers are sites by default, and what belongs to none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from models_for_tests import relative_error
from multitangent import Activations, ForwardGradient, Projection, SimulatedGradient
from multitangent.tangents import Normal, StandardBasis

LOSS = nn.CrossEntropyLoss()


class Block(nn.Module):
    """Mixes tokens and adds to a stream, with a scale of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.layer = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.layer(self.norm(x)).mean(1, keepdim=True)
        return x + self.scale * torch.tanh(mixed + self.layer(x))


class Transformer(nn.Module):
    """A class token, positions, blocks, a head and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, 4, 4))
        self.embedding = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)
        self.temperature = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embedding(x)], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.temperature * self.head(self.norm(x[:, 0]))


class Windows(Transformer):
    """Folds windows of two tokens into the first axis before every layer."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embedding(x)], 1) + self.positions
        for block in self.blocks:
            x = block(x.reshape(-1, 2, 4)).reshape(len(x), 4, 4).roll(1, 1)
        return self.temperature * self.head(self.norm(x[:, 0]))


class Experts(Transformer):
    """Tokens of all samples go to one of two experts."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), self.embedding(x)], 1) + self.positions
        tokens = x.reshape(-1, 1, 4)
        chosen = tokens[:, 0, 0] > 0
        for i, block in enumerate(self.blocks):
            rows = (chosen == bool(i)).nonzero()[:, 0]
            tokens = tokens.index_copy(0, rows, block(tokens[rows]))
        return self.temperature * self.head(self.norm(tokens.reshape(x.shape)[:, 0]))


def made(kind: type[nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return kind().double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 1, 1, 0, 1])


LEAVES = ["embedding", "blocks.0.layer", "blocks.1", "head"]


@pytest.mark.parametrize(
    ("output", "recompute"), [("perturbed", False), ("perturbed", True), ("exact", False)]
)
@pytest.mark.parametrize("micro_batch", [2, 5])
@pytest.mark.parametrize("sites", [None, LEAVES], ids=["blocks", "layers"])
@pytest.mark.parametrize("share", ["batch", "sample"])
def test_parameters_outside_of_sites_are_trained(share, sites, micro_batch, output, recompute):
    model, (x, y) = made(Transformer), batch()
    right = copy.deepcopy(model)
    LOSS(right(x), y).backward()
    perturb = Activations(sites, share, output, recompute=recompute)
    ForwardGradient(model, LOSS, StandardBasis(80), Projection(), perturb, micro_batch=micro_batch)(
        x, y
    )
    error = relative_error(
        [p.grad for p in model.parameters()], [p.grad for p in right.parameters()]
    )
    assert error < 1e-9


@pytest.mark.parametrize("kind", [Windows, Experts])
def test_outputs_that_are_not_of_each_sample_belong_to_the_next_layer(kind):
    model, (x, y) = made(kind), batch()
    right = copy.deepcopy(model)
    LOSS(right(x), y).backward()
    perturb = Activations(["embedding", "blocks.0.layer", "blocks.1.layer", "head"])
    gradient = ForwardGradient(model, LOSS, StandardBasis(80), Projection(), perturb)
    gradient(x, y)
    assert list(gradient.sites) == ["embedding", "head"]
    error = relative_error(
        [p.grad for p in model.parameters()], [p.grad for p in right.parameters()]
    )
    assert error < 1e-9


def test_an_exact_output_begins_with_the_last_site():
    model, (x, y) = made(Transformer), batch()
    gradient = ForwardGradient(model, LOSS, Normal(16), perturb=Activations(output="exact"))
    runs = []
    model.register_forward_pre_hook(lambda *_: runs.append(1))
    gradient(x, y)
    assert gradient.sites == {"blocks.0": 16}
    runs.clear()
    gradient(x, y)
    assert len(runs) == 1  # how it ends is known after the first step
    right = copy.deepcopy(model)
    right.zero_grad()
    LOSS(right(x), y).backward()
    model.zero_grad()
    gradient(x, y)
    torch.testing.assert_close(model.blocks[1].layer.weight.grad, right.blocks[1].layer.weight.grad)


@pytest.mark.parametrize("output", ["perturbed", "exact"])
def test_few_tangents_give_what_the_simulation_gives(output):
    x, y = batch()
    forward, simulated = made(Transformer), made(Transformer)
    perturb = Activations(output=output)
    ForwardGradient(forward, LOSS, Normal(3), perturb=perturb)(x, y)
    SimulatedGradient(simulated, LOSS, Normal(3), perturb=perturb)(x, y)
    pairs = zip(forward.parameters(), simulated.parameters(), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-10)


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])


class Holder(nn.Module):
    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Mixture(nn.Module):
    """A block whose experts are blocks themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = Holder(experts=nn.ModuleList([Block(), Block()]))


def pairs(make):
    return nn.ModuleList([make(), make()])


@pytest.mark.parametrize(
    ("model", "sites"),
    {
        "blocks": (lambda: Holder(first=nn.Linear(2, 2), h=pairs(Block)), ["h.0", "h.1"]),
        "in a sequence": (lambda: Holder(h=nn.Sequential(Block(), Block())), ["h.0", "h.1"]),
        "stages": (
            lambda: Holder(s=pairs(Stage)),
            ["s.0.blocks.0", "s.0.blocks.1", "s.1.blocks.0", "s.1.blocks.1"],
        ),
        "experts": (lambda: Holder(h=pairs(Mixture)), ["h.0", "h.1"]),
        "two stacks": (
            lambda: Holder(encoder=pairs(Block), decoder=pairs(Block)),
            ["encoder.0", "encoder.1", "decoder.0", "decoder.1"],
        ),
        "single layers": (
            lambda: Holder(h=pairs(lambda: nn.Linear(2, 2)), last=nn.Linear(2, 2)),
            ["h.0", "h.1", "last"],
        ),
        "convolutions": (
            lambda: Holder(h=pairs(lambda: nn.Sequential(nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)))),
            ["h.0.0", "h.0.1", "h.1.0", "h.1.1"],
        ),
        "blocks of two kinds": (
            lambda: Holder(h=nn.ModuleList([Block(), Mixture(), Block(), Mixture()])),
            ["h.0", "h.1", "h.2", "h.3"],
        ),
        "different parts": (
            lambda: Holder(h=nn.ModuleList([Block(), Stage()])),
            ["h.1.blocks.0", "h.1.blocks.1"],
        ),
    }.values(),
)  # fmt: skip
def test_default_sites(model, sites):
    assert list(ForwardGradient(model(), LOSS).sites) == sites


def test_sizes_add_up_to_the_dimension():
    gradient = ForwardGradient(made(Transformer), LOSS)
    assert gradient.sites == {"blocks.0": None, "blocks.1": None}
    gradient(*batch())
    assert gradient.sites == {"blocks.0": 16, "blocks.1": 16}
    weights = ForwardGradient(made(Transformer), LOSS, perturb="weights")
    weights(*batch())
    assert weights.sites["head.weight"] == 8
