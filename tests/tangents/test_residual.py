"""The error at the end of a residual stream as a guess, beside backpropagation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models_for_tests import relative_error
from multitangent import (
    Activations,
    ControlVariate,
    ForwardGradient,
    Normal,
    Projection,
    SimulatedGradient,
)
from multitangent.aggregation import SumOfGuesses
from multitangent.engine import ForwardMode
from multitangent.gradient import DifferenceGradient, VerificationError, step
from multitangent.tangents import Normalized, Residual, Tangents

B, T, D, V = 5, 3, 4, 7
EXACT = Activations(output="exact")
ALL_PERTURBED = [
    EXACT,
    Activations(output="exact", share="sample"),
    Activations(output="exact", recompute=True),
    Activations(output="exact", share="sample", recompute=True),
]


def token_loss(output, target):
    return F.cross_entropy(output.mT, target, reduction="none").mean(1)


class Block(nn.Module):
    """A block of a residual stream; of zero strength it is the identity."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(D), nn.Linear(D, D)
        self.out = nn.Linear(D, D, bias=False)
        self.strength = 1.0

    def forward(self, x):
        h = self.mix(self.norm(x))
        return x + self.strength * self.out(torch.tanh(h + h.mean(1, keepdim=True)))


class Transformer(nn.Module):
    """Blocks in a list, and parameters before and behind them."""

    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(D), nn.Linear(D, V)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class InPlace(Transformer):
    """Writes into the stream behind every block."""

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
            x.mul_(1.5)
        return self.head(self.norm(x))


def in_a_row(blocks=3):
    """The same as a sequence, which ends in its last site."""
    first, *between, last = (Block() for _ in range(blocks))
    return nn.Sequential(
        nn.Sequential(nn.Embedding(V, D), first),
        *between,
        nn.Sequential(last, nn.LayerNorm(D), nn.Linear(D, V)),
    )


def with_dropout():
    model = in_a_row()
    model[2].insert(1, nn.Dropout(0.3))
    return model


def tied():
    model = Transformer()
    model.head.weight = model.embed.weight
    return model


MODELS = {
    "behind": Transformer, "in a row": in_a_row, "in place": InPlace, "dropout": with_dropout,
    "tied": tied,
}  # fmt: skip


def made(name, **arguments):
    torch.manual_seed(0)
    model = MODELS[name](**arguments).double()
    return model, torch.randint(V, (B, T)), torch.randint(V, (B, T))


def true_gradients(model, x, y):
    """The gradients of backpropagation by the names of parameters."""
    model = copy.deepcopy(model)
    token_loss(model(x), y).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def estimated(model, x, y, *arguments, kind=ForwardGradient, **options):
    model = copy.deepcopy(model)
    gradient = kind(model, token_loss, *arguments, **options)
    gradient(x, y)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(found, expected, names=None):
    for name in expected if names is None else names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def fits(name, perturb):
    """With `recompute` the last site has to end in the model's output."""
    return not perturb.recompute or name in ("in a row", "dropout")


CASES = [(n, p) for n in MODELS for p in ALL_PERTURBED if fits(n, p)]


@pytest.mark.parametrize(("name", "perturb"), CASES)
@pytest.mark.parametrize("micro_batch", ["auto", 2])
def test_the_last_gradient_is_that_of_backpropagation(name, perturb, micro_batch):
    model, x, y = made(name)
    options = {"perturb": perturb, "micro_batch": micro_batch}
    source = Normal(2) + Residual()
    gradient = ForwardGradient(model, token_loss, source, Projection(), **options)
    prepared = gradient.prepare(x, y)
    found = list(step(*prepared).tangents.blocks.values())[-1].request.last_gradient
    problem, batch, stream = prepared
    run = problem.perturbation(batch, stream, (tangents := step(*prepared).tangents))
    tangents.blocks.clear()
    run.prepare()
    kept = {}

    def watch(value, name, samples):
        kept[name] = torch.zeros_like(value, requires_grad=True)
        return value + kept[name]

    with torch.enable_grad():
        losses = run.evaluate(batch, watch, "coupled").losses
    expected = torch.autograd.grad(losses.sum(), kept[list(tangents.blocks)[-1]])[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("name", "perturb"), [c for c in CASES if c[0] != "in place"])
def test_identities_between_make_it_exact(name, perturb):
    model, x, y = made(name)
    for block in model.modules():
        if isinstance(block, Block):
            block.strength = 0.0
    model.eval()
    found = estimated(model, x, y, Residual(), SumOfGuesses(), perturb)
    assert_close(found, true_gradients(model, x, y))


@pytest.mark.parametrize(("name", "perturb"), CASES)
def test_the_last_blocks_are_exact(name, perturb):
    model, x, y = made(name)
    model.eval()
    found = estimated(model, x, y, Residual(), SumOfGuesses(), perturb)
    true = true_gradients(model, x, y)
    assert found.keys() == true.keys()
    last = ("blocks.1", "blocks.2", "norm", "1.", "2.") + (("head",) if name != "tied" else ())
    assert_close(found, true, [n for n in true if n.startswith(last)])
    earlier = [n for n in true if n.startswith(("blocks.0", "0."))]
    assert relative_error([found[n] for n in earlier], [true[n] for n in earlier]) > 1e-3


def test_two_blocks_are_exact_but_for_what_comes_before():
    model, x, y = made("behind", blocks=2)
    found = estimated(model, x, y, Residual(), SumOfGuesses(), EXACT)
    assert_close(found, true_gradients(model, x, y))


@pytest.mark.parametrize("name", ["behind", "in a row"])
@pytest.mark.parametrize("frozen", ["first", "last", "head", "middle"])
def test_frozen_parts(name, frozen):
    model, x, y = made(name)
    part = {
        "behind": {"first": "embed", "last": "blocks.2", "head": "head", "middle": "blocks.1"},
        "in a row": {"first": "0", "last": "2.0", "head": "2.2", "middle": "1"},
    }[name][frozen]
    model.get_submodule(part).requires_grad_(False)
    found = estimated(model, x, y, Residual(), SumOfGuesses(), EXACT)
    true = true_gradients(model, x, y)
    assert found.keys() == true.keys()
    behind = [n for n in true if n.startswith(("blocks.2", "norm", "head", "2."))]
    assert_close(found, true, behind)


@pytest.mark.parametrize("aggregator", [ControlVariate(), Projection(), SumOfGuesses()], ids=repr)
@pytest.mark.parametrize("perturb", ALL_PERTURBED, ids=repr)
@pytest.mark.parametrize(
    "source", [Normal(2) + Residual(), Residual(2) + Normal(1), Normalized(Residual())], ids=repr
)
def test_equals_the_simulation(source, perturb, aggregator):
    model, x, y = made("in a row")
    rest = source, aggregator, perturb
    real = estimated(model, x, y, *rest)
    assert_close(real, estimated(model, x, y, *rest, kind=SimulatedGradient))
    assert_close(real, estimated(model, x, y, *rest, micro_batch=2))
    assert_close(real, estimated(model, x, y, *rest, store_tangents=False))


def test_spanned_by_other_tangents_it_changes_nothing():
    model, x, y = made("in a row", blocks=2)
    perturb = Activations(output="exact", share="sample")
    found = estimated(model, x, y, Normal(T * D) + Residual(), Projection(), perturb)
    assert_close(found, true_gradients(model, x, y))


def test_differences_know_the_guess():
    model, x, y = made("in a row")
    rest = Residual(), Projection(), EXACT
    found = estimated(model, x, y, *rest, kind=DifferenceGradient)
    expected = estimated(model, x, y, *rest)
    assert all(torch.allclose(found[n], expected[n], atol=1e-5) for n in expected)


def test_other_shapes_have_no_guess():
    model = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4), nn.Linear(4, 4)).double()
    gradient = ForwardGradient(
        model, nn.CrossEntropyLoss(), Residual(), SumOfGuesses(), Activations(output="exact")
    )
    gradient(torch.randn(B, 3).double(), torch.randint(4, (B,)))
    assert float(model[0].weight.grad.norm()) == 0
    assert float(model[2].weight.grad.norm()) > 0


def test_nothing_is_pushed(monkeypatch):
    model, x, y = made("behind")

    def refuse(*args):
        raise AssertionError("pushed")

    gradient = ForwardGradient(model, token_loss, Residual(), SumOfGuesses(), EXACT)
    gradient.prepare(x, y)  # compares derivatives once
    monkeypatch.setattr(ForwardMode, "__call__", refuse)
    value = gradient(x, y)
    torch.testing.assert_close(value, token_loss(model(x), y).mean().detach())
    assert gradient.diagnostics.jvps.isnan().all()
    assert gradient.diagnostics.gradient_norm.shape == (B,)


def test_an_assessment_measures_what_the_guess_holds():
    model, x, y = made("behind", blocks=2)
    gradient = ForwardGradient(model, token_loss, Residual(), SumOfGuesses(), EXACT)
    found = gradient.assess(x, y)
    assert found.captured["all"] == pytest.approx(1)
    assert found.cosine == pytest.approx(1)


@pytest.mark.parametrize("micro_batch", ["auto", 2])
@pytest.mark.parametrize("aggregator", [Projection(), SumOfGuesses()], ids=repr)
@pytest.mark.parametrize(
    ("perturb", "found"),
    [("weights", "a step that perturbs weights"), ("activations", "none at '0'")],
)
@pytest.mark.filterwarnings("ignore:micro_batch")
def test_what_has_no_last_gradient_is_refused(perturb, found, aggregator, micro_batch):
    model, x, y = made("in a row")
    gradient = ForwardGradient(
        model, token_loss, Residual(), aggregator, perturb, micro_batch=micro_batch
    )
    with pytest.raises(ValueError, match=f"Found {found}. Try `perturb=Activations"):
        gradient(x, y)


def test_another_last_value_is_refused():
    class Skipping(Transformer):
        count = 3

        def forward(self, tokens):
            x = self.embed(tokens)
            for block in self.blocks[: self.count]:
                x = block(x)
            return self.head(self.norm(x))

    torch.manual_seed(0)
    model = Skipping().double()
    gradient = ForwardGradient(model, token_loss, Residual(), SumOfGuesses(), EXACT, verify=False)
    x = torch.randint(V, (B, T))
    gradient(x, x)
    model.count = 1
    with pytest.raises(ValueError, match="should be the same in every run"):
        gradient(x, x)


def test_a_wrong_last_gradient_is_found(monkeypatch):
    model, x, y = made("behind")
    right = Tangents.with_last_gradient
    monkeypatch.setattr(
        Tangents, "with_last_gradient", lambda self, gradient: right(self, 1.1 * gradient)
    )
    gradient = ForwardGradient(model, token_loss, Residual(), SumOfGuesses(), EXACT)
    with pytest.raises(VerificationError, match="gradient of the last perturbed value"):
        gradient(x, y)
