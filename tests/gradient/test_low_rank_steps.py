"""Steps with tangents of low rank, against the same tangents as full rows and backpropagation."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from multitangent import (
    ForwardGradient,
    Mean,
    Normal,
    OwnValue,
    Projection,
    SimulatedGradient,
    VerificationError,
    Weights,
)
from multitangent.aggregation import Sum, TopK
from multitangent.dual import Factors
from multitangent.gradient import step
from multitangent.tangents import LowRank, Normalized, RunningMean, TangentSource


@dataclass(frozen=True)
class Multiplied(TangentSource):
    """The tangents of another source as full rows."""

    inner: TangentSource

    @property
    def sources(self):
        return (self.inner,)

    @property
    def num_tangents(self):
        return self.inner.num_tangents

    def draw(self, request):
        return self.inner.draw(request)

    def mixing(self, gram, dimension):
        return self.inner.mixing(gram, dimension)


class Everything(nn.Module):
    """Weights in all the roles that have a rule, some without one, tied and frozen ones."""

    def __init__(self, *, recompute=False):
        super().__init__()
        self.recompute = recompute
        self.embedding = nn.Embedding(11, 12, padding_idx=2)
        self.convolution = nn.Conv1d(12, 8, 3, padding=1, groups=2)
        self.transposed = nn.ConvTranspose1d(8, 6, 3, groups=2, stride=2)
        self.frozen = nn.Linear(6, 6)
        self.frozen.weight.requires_grad_(False)
        self.linear = nn.Linear(6, 9)
        self.matrix = nn.Parameter(torch.randn(9, 12) / 3)
        self.positions = nn.Parameter(torch.randn(1, 15, 12) / 3)
        self.norm = nn.LayerNorm(12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.recurrent = nn.GRU(12, 12, batch_first=True)
        self.reparametrized = nn.utils.parametrizations.weight_norm(nn.Linear(12, 12))

    def forward(self, x):
        h = self.convolution(self.embedding(x).mT).relu()
        h = self.linear(self.frozen(self.transposed(h).mT)).tanh()
        rest = checkpoint(self.rest, h, use_reentrant=False) if self.recompute else self.rest(h)
        return F.linear(rest, self.embedding.weight).mean(1)

    def rest(self, h):
        h = self.norm(h @ self.matrix + self.positions)
        h = self.attention(h, h.flip(1), h)[0]
        return self.reparametrized(self.recurrent(h)[0])


def problem_of(dtype=torch.float64, **options):
    torch.manual_seed(0)
    model = Everything(**options).to(dtype)
    x = torch.randint(0, 11, (5, 7))
    x[0, 0] = 2
    return model, x, torch.randint(0, 11, (5,))


def taken(gradient, x, y, steps=1):
    """The loss, gradients, and what the last step measured."""
    for _ in range(steps):
        gradient.model.zero_grad()
        result = step(*gradient.prepare(x, y))
        loss = gradient(x, y)
    return {
        "loss": loss,
        "jvps": result.combination.jvps,
        "gram": result.gram,
        **{name: p.grad for name, p in gradient.model.named_parameters() if p.requires_grad},
    }


def assert_same(found, expected, tolerance=1e-10):
    for name, value in expected.items():
        scale = max(value.abs().max().item(), 1e-3)
        torch.testing.assert_close(
            found[name].to(value.dtype), value, rtol=0, atol=tolerance * scale,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


SOURCES = {
    "one": LowRank(5),
    "thick": LowRank(4, rank=2),
    "sum": LowRank(2) + Normal(2) + LowRank(2, rank=2),
    "guesses": OwnValue(2) + LowRank(3) + RunningMean(),
    "normalised": Normalized(LowRank(5)),
}


@pytest.mark.filterwarnings("ignore::multitangent.dual.FallbackWarning")
@pytest.mark.parametrize("name", SOURCES)
def test_steps_are_those_of_the_same_tangents_as_rows(name):
    model, x, y = problem_of()
    source = SOURCES[name]
    learns = name == "guesses"
    found = taken(ForwardGradient(model, nn.CrossEntropyLoss(), source, perturb="weights"), x, y)
    if not learns:
        rows = ForwardGradient(
            model, nn.CrossEntropyLoss(), Multiplied(source), perturb="weights", verify=False
        )
        assert_same(found, taken(rows, x, y))
    simulated = SimulatedGradient(model, nn.CrossEntropyLoss(), source, perturb="weights")
    assert_same(found, taken(simulated, x, y), 1e-8)
    if learns:
        both = [
            taken(kind(model, nn.CrossEntropyLoss(), source, perturb="weights"), x, y, steps=3)
            for kind in (ForwardGradient, SimulatedGradient)
        ]
        assert_same(*both, 1e-8)


@pytest.mark.filterwarnings("ignore::multitangent.dual.FallbackWarning")
@pytest.mark.parametrize(
    "options",
    [{"store_tangents": False}, {"micro_batch": 2}, {"micro_batch": 2, "store_tangents": False}],
    ids=repr,
)
def test_storing_and_parts_change_nothing(options):
    model, x, y = problem_of()
    gradients = [
        ForwardGradient(model, nn.CrossEntropyLoss(), LowRank(4), perturb="weights", **chosen)
        for chosen in ({}, options)
    ]
    expected, found = (taken(gradient, x, y) for gradient in gradients)
    assert_same(found, expected)


@pytest.mark.filterwarnings("ignore::multitangent.dual.FallbackWarning")
@pytest.mark.parametrize("aggregator", [Mean(), Sum(), TopK(2), Projection()], ids=repr)
def test_all_aggregators_and_recomputation(aggregator):
    model, x, y = problem_of(recompute=True)
    both = [
        kind(model, nn.CrossEntropyLoss(), LowRank(4), aggregator, Weights())
        for kind in (ForwardGradient, SimulatedGradient)
    ]
    assert_same(*(taken(gradient, x, y) for gradient in both), 1e-8)


@pytest.mark.filterwarnings("ignore::multitangent.dual.FallbackWarning")
@pytest.mark.parametrize("rank", [1, 2])
def test_enough_tangents_give_the_gradient_of_backpropagation(rank):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(6, 5), nn.Flatten(), nn.Linear(10, 4), nn.Tanh())
    model.append(nn.Linear(4, 3)).double()
    count = sum(p.numel() for p in model.parameters())
    x, y = torch.randint(0, 6, (8, 2)), torch.randint(0, 3, (8,))
    nn.functional.cross_entropy(model(x), y).backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    gradient = ForwardGradient(
        model, nn.CrossEntropyLoss(), LowRank(count, rank), Projection(), perturb="weights"
    )
    assert_same(taken(gradient, x, y), expected, 1e-8)


class Largest(TorchDispatchMode):
    """Notes the largest number of entries that an operation returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        values = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        sizes = [value.numel() for value in values if value.is_floating_point()]
        self.numel = max([self.numel, *sizes])
        return out


class Wide(nn.Module):
    """Each of its weights is larger than the values of a batch, or their tangents together."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(300, 64)
        self.convolution = nn.Conv1d(64, 96, 3, padding=1)
        self.transposed = nn.ConvTranspose1d(96, 80, 3)
        self.linear = nn.Linear(80, 128)
        self.matrix = nn.Parameter(torch.randn(128, 64) / 8)

    def forward(self, x):
        h = self.transposed(self.convolution(self.embedding(x).mT))
        h = torch.addmm(torch.zeros(64), self.linear(h.mean(-1)).relu(), self.matrix)
        return F.linear(h, self.embedding.weight)


@pytest.mark.parametrize("store", [True, False])
def test_no_block_of_full_rows_is_ever_made(store):
    torch.manual_seed(0)
    model, count = Wide(), 16
    x, y = torch.randint(0, 300, (2, 3)), torch.randint(0, 300, (2,))
    smallest = min(p.numel() for p in model.parameters() if p.ndim > 1)
    for source, fits in ((LowRank(count), True), (Normal(count), False)):
        gradient = ForwardGradient(
            model, nn.CrossEntropyLoss(), source, perturb="weights", store_tangents=store
        )
        with Largest() as largest:
            gradient(x, y)
        largest_weight = max(prod(p.shape) for p in model.parameters())
        assert (largest.numel < count * smallest) is fits
        if fits:  # the gradient of a weight is the largest of all
            assert largest.numel <= max(largest_weight, count * 2 * 300)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_types(dtype):
    """bfloat16 rounds every product: the derivatives agree within some of its units."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4)).to(dtype)
    x, y = torch.randn(8, 20).to(dtype), torch.randint(0, 4, (8,))
    both = [
        kind(model, nn.CrossEntropyLoss(), LowRank(4), Mean(), perturb="weights", verify=False)
        for kind in (ForwardGradient, SimulatedGradient)
    ]
    found, expected = (taken(gradient, x, y) for gradient in both)
    assert found["gram"].dtype is torch.float64
    assert found["0.weight"].dtype is dtype
    assert_same(found, expected, 1e-4 if dtype is torch.float32 else 0.1)


def test_tangents_of_low_precision():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 4))
    x, y = torch.randn(8, 20), torch.randint(0, 4, (8,))
    both = [
        ForwardGradient(
            model, nn.CrossEntropyLoss(), LowRank(4), perturb="weights", tangent_dtype=dtype
        )
        for dtype in (torch.bfloat16, None)
    ]
    found, expected = (taken(gradient, x, y) for gradient in both)
    assert found["gram"].dtype is torch.float64
    assert_same(found, expected, 0.1)
    with pytest.raises(AssertionError):
        assert_same(found, expected, 1e-5)


def test_activations_get_normal_tangents():
    model, x, y = problem_of()
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5).double(), torch.randint(0, 3, (6,))
    both = [ForwardGradient(model, nn.CrossEntropyLoss(), kind(3)) for kind in (LowRank, Normal)]
    assert_same(*(taken(gradient, x, y) for gradient in both), 1e-12)


def test_compiled_steps_are_left_out():
    model = nn.Linear(20, 10)
    x, y = torch.randn(8, 20), torch.randn(8, 10)
    gradient = ForwardGradient(
        model, nn.MSELoss(), LowRank(4), perturb="weights", compile=True, verify=False
    )
    with pytest.warns(UserWarning, match="is left out .* tangents in factors, at 'weight'"):
        found = taken(gradient, x, y)
    eager = ForwardGradient(model, nn.MSELoss(), LowRank(4), perturb="weights", verify=False)
    assert_same(found, taken(eager, x, y), 1e-6)


def test_verification_pushes_factors(monkeypatch):
    """A rule that is wrong for factors alone is noticed at the first step."""

    def wrong(self):
        return Factors(2 * self.right.mT, self.left.mT)

    monkeypatch.setattr(Factors, "transposed", wrong)

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 6))

        def forward(self, x):
            return x @ self.weight

    x, y = torch.randn(8, 5), torch.randn(8, 6)
    with pytest.raises(VerificationError, match="weight"):
        ForwardGradient(Product(), nn.MSELoss(), LowRank(4), perturb="weights")(x, y)
    ForwardGradient(Product(), nn.MSELoss(), Normal(4), perturb="weights")(x, y)
