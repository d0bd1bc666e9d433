"""Laws of the sources that learn, over one table of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import multitangent
from models_for_tests import build, gradients, relative_error
from multitangent import (
    Activations,
    ControlVariate,
    Feedback,
    ForwardGradient,
    LocalLoss,
    Mean,
    Normal,
    OwnValue,
    Projection,
    Rademacher,
    SimulatedGradient,
)
from multitangent.gradient import step
from multitangent.tangents import Needs, Normalized, RunningMean, ScaledByRMS

WITH_GUESSES = [
    Feedback(), Feedback(3, step_size=1.0, gated=False), LocalLoss(),
    LocalLoss(2, learning_rate=0.1), RunningMean(), RunningMean(2, decay=0.5), OwnValue(),
    OwnValue(2),
]  # fmt: skip
MIXTURES = [
    *(Normal(2) + source for source in WITH_GUESSES),
    Feedback(2) + Normal(2),  # missing rows that are not the last
    Rademacher(1) + LocalLoss(2) + Normalized(RunningMean()) + Normal(1) + Feedback(),
    ScaledByRMS(Normal(2), decay=0.5) + Feedback(),
]
PERTURBATIONS = [
    Activations(),
    Activations(share="sample"),
    Activations(output="exact"),
    Activations(share="sample", output="exact", recompute=True),
]
LOSS = nn.CrossEntropyLoss()


def trained(gradient, x, y, steps):
    """Losses of some steps of descent; the gradient's model ends as they leave it."""
    optimizer = torch.optim.SGD(gradient.model.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(gradient(x, y))
        optimizer.step()
    return torch.stack(losses)


def same_training(model, one, other, x, y, steps=4):
    """Whether two gradients train a model in the same way, memory and all."""
    weights = []
    for arguments in (one, other):
        kind, *rest, options = arguments
        again = copy.deepcopy(model)
        gradient = kind(again, LOSS, *rest, **options)
        trained(gradient, x, y, steps)
        weights.append([p.detach() for p in again.parameters()])
    return relative_error(*weights) <= 1e-8


@pytest.mark.parametrize("name", ["mlp", "cnn", "attention", "norms", "dropout"])
@pytest.mark.parametrize("source", MIXTURES, ids=repr)
def test_equals_the_simulation(name, source):
    model, x, y, _ = build(name)
    for perturb in PERTURBATIONS:
        for aggregator in (Projection(), ControlVariate(0.5), Mean()):
            rest = source, aggregator, perturb
            real, simulated = (ForwardGradient, *rest, {}), (SimulatedGradient, *rest, {})
            assert same_training(model, real, simulated, x, y), (perturb, aggregator)


@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=repr)
@pytest.mark.parametrize("source", MIXTURES, ids=repr)
def test_neither_the_split_nor_the_store_changes_anything(source, perturb):
    model, x, y, _ = build("attention")
    rest = source, ControlVariate(), perturb
    for options in ({"micro_batch": 1}, {"micro_batch": 4}, {"store_tangents": False}):
        one, other = ForwardGradient, ForwardGradient
        assert same_training(model, (one, *rest, {}), (other, *rest, options), x, y), options


@pytest.mark.parametrize("source", MIXTURES, ids=repr)
def test_a_saved_state_goes_on(source):
    model, x, y, _ = build("mlp")
    whole = copy.deepcopy(model)
    trained(ForwardGradient(whole, LOSS, source, ControlVariate()), x, y, 6)
    first = ForwardGradient(model, LOSS, source, ControlVariate())
    trained(first, x, y, 3)
    state = copy.deepcopy(first.state_dict())
    trained(first, x, y, 1)  # after the state was taken: it must not have part in this
    second_model = build("mlp")[0]
    trained(ForwardGradient(second_model, LOSS, source, ControlVariate()), x, y, 3)
    second = ForwardGradient(second_model, LOSS, source, ControlVariate())
    second.load_state_dict(state)
    before = repr(state)
    trained(second, x, y, 3)
    assert repr(state) == before  # what was loaded is a copy
    found, expected = ([p.detach() for p in m.parameters()] for m in (second_model, whole))
    assert relative_error(found, expected) <= 1e-12


@pytest.mark.parametrize("source", WITH_GUESSES, ids=repr)
def test_a_description_has_no_memory(source):
    assert eval(repr(source), {type(source).__name__: type(source)}) == source
    assert source.guesses == (True,) * source.num_tangents
    assert (Normal(2) + source).guesses == (False,) * 2 + source.guesses
    model, x, y, _ = build("mlp")
    mixture = Normal(2) + source
    one, other = (ForwardGradient(copy.deepcopy(model), LOSS, mixture) for _ in range(2))
    trained(one, x, y, 3)
    trained(other, x, y, 1)
    fresh = ForwardGradient(model, LOSS, mixture)
    trained(fresh, x, y, 1)
    assert relative_error(gradients(model), gradients(other.model)) == 0


@pytest.mark.parametrize("share", ["batch", "sample"])
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_feedback_becomes_the_jacobian_of_a_linear_model(share, rate):
    """Every row of J is found: the gradient is exact, with fewer tangents than dimensions."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Linear(12, 9), nn.Linear(9, 3)).double()
    x, y = torch.randn(32, 5).double(), torch.randint(0, 3, (32,))
    perturb = Activations(share=share, output="exact")
    source = Normal(2) + Feedback(step_size=rate, gated=False)
    gradient = ForwardGradient(model, LOSS, source, Projection(), perturb)
    for _ in range(600):
        model.zero_grad()
        gradient(x, y)
    found = gradients(model)
    matrices = gradient.state_dict()["tangents"]["1"]["matrices"]
    torch.testing.assert_close(matrices["1"], model[2].weight.detach())
    torch.testing.assert_close(matrices["0"], (model[2].weight @ model[1].weight).detach())
    model.zero_grad()
    LOSS(model(x), y).backward()
    assert relative_error(found, gradients(model)) < 1e-6


@pytest.mark.parametrize("gated", [False, True])
def test_gated_feedback_follows_the_output(gated):
    """Two kinds of samples, told apart by the output, whose Jacobians differ."""
    torch.manual_seed(0)

    class TwoKinds(nn.Module):
        """J = W + sign W' with a sign that the output shows."""

        def __init__(self):
            super().__init__()
            self.lower, self.upper = nn.Linear(5, 12), nn.Linear(12, 3)
            self.other = nn.Linear(12, 3).requires_grad_(False)

        def forward(self, x):
            sign = x[:, :1].sign()
            h = self.lower(x)
            shown = 8 * sign * torch.tensor([1.0, -1.0, 0.0])
            return self.upper(h) + sign * self.other(h) + shown

    model = TwoKinds().double()
    x, y = torch.randn(64, 5).double(), torch.randint(0, 3, (64,))
    source = Normal(2) + Feedback(gated=gated)
    perturb = Activations(sites=["lower", "upper"], share="sample")
    gradient = ForwardGradient(model, LOSS, source, perturb=perturb)
    for _ in range(400):
        gradient(x, y)
    held = gradient.assess(x, y).captured[repr(Feedback(gated=gated))]
    assert held > 0.99 if gated else held < 0.9


@pytest.mark.parametrize("shape", [(), (2, 3)], ids=["numbers", "sequences"])
def test_feedback_from_outputs_of_any_shape(shape):
    class Shaped(nn.Module):
        def __init__(self):
            super().__init__()
            self.lower, self.upper = nn.Linear(4, 5), nn.Linear(5, 6 if shape else 1)

        def forward(self, x):
            return self.upper(self.lower(x)).reshape(len(x), *shape)

    def loss(output, target):
        return (output.reshape(len(output), -1).sum(1) - target).square()

    torch.manual_seed(0)
    x, y = torch.randn(16, 4), torch.randn(16)
    perturb = Activations(share="sample")
    gradient = ForwardGradient(Shaped(), loss, Normal(2) + Feedback(), perturb=perturb)
    for _ in range(100):
        gradient(x, y)
    assert gradient.assess(x, y).cosine > 0.9


@pytest.mark.parametrize("share", ["batch", "sample"])
def test_gated_feedback_is_no_worse_for_one_jacobian(share):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 12), nn.Linear(12, 3)).double()
    x, y = torch.randn(32, 5).double(), torch.randint(0, 3, (32,))
    perturb = Activations(share=share, output="exact")
    gradient = ForwardGradient(model, LOSS, Normal(2) + Feedback(), Projection(), perturb)
    for _ in range(600):
        gradient(x, y)
    assert gradient.assess(x, y).cosine > 1 - 1e-4


def test_feedback_learns_from_every_sample_at_once():
    """K B = 128 random tangents a step for n = 20: one step tells most, 20 all."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 20), nn.Linear(20, 3)).double()
    x, y = torch.randn(64, 5).double(), torch.randint(0, 3, (64,))

    def error(share, steps):
        perturb = Activations(share=share, output="exact")
        source = Normal(2) + Feedback(gated=False)
        gradient = ForwardGradient(model, LOSS, source, Projection(), perturb)
        for _ in range(steps):
            gradient(x, y)
        learned = gradient.state_dict()["tangents"]["1"]["matrices"]["0"]
        return ((learned - model[1].weight).norm() / model[1].weight.norm()).item()

    assert error("sample", 20) < 1e-3
    assert error("batch", 20) > 0.1


def test_local_loss_guesses_the_gradient_of_its_own_heads():
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(2) + LocalLoss(2, learning_rate=0.1))
    trained(gradient, x, y, 20)
    state = gradient.state_dict()["tangents"]["1"]
    head = next(iter(state["heads"].values()))
    block = gradient_blocks(gradient, x, y)[0]
    value = block.request.primal.requires_grad_()
    logits = value @ head["weight"].T + head["bias"]
    loss = nn.functional.cross_entropy(logits, y, reduction="none")
    (expected,) = torch.autograd.grad(loss.sum(), value)
    torch.testing.assert_close(block.rows()[2], expected)
    assert loss.mean() < 0.7 * torch.tensor(3.0).log()  # the heads learn


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_previous_is_a_mean_of_each_class(decay):
    model, x, y, _ = build("mlp")
    y = torch.tensor([0, 0, 2, 2, 2, 0])
    noted = []

    @dataclass(frozen=True)
    class Noted(RunningMean):
        """Keeps the gradient of the first site in every step."""

        def init(self):
            means = super().init()
            update = means.update

            def note(observation):
                noted.append(next(iter(observation.gradients.values())))
                update(observation)

            means.update = note
            return means

    gradient = ForwardGradient(model, LOSS, Normal(2) + Noted(decay=decay))
    gradient(x, y)
    gradient(x, y)
    (means, *_) = gradient.state_dict()["tangents"]["1"]["means"].values()
    first, second = (torch.stack([g[y == c].mean(0) for c in (0, 2)]) for g in noted)
    expected = (1 - decay) * (decay * first + second)
    torch.testing.assert_close(means[[0, 2]], expected)
    assert not means[1].any()


def test_previous_for_weights_is_the_last_gradient():
    model, x, y, _ = build("mlp")
    source = Normal(2) + RunningMean(decay=0.0)
    gradient = ForwardGradient(model, LOSS, source, Projection(), "weights")
    for _ in range(30):  # on one batch, the projection only grows
        model.zero_grad()
        gradient(x, y)
    found = gradients(model)
    model.zero_grad()
    LOSS(model(x), y).backward()
    expected = gradients(model)
    along = sum((f * e).sum() for f, e in zip(found, expected, strict=True))
    norms = [sum(g.square().sum() for g in each).sqrt() for each in (found, expected)]
    # Each step adds what two new tangents find of the rest: a cosine of 0.73 after 30, where two
    # tangents alone have 0.16.
    assert along / (norms[0] * norms[1]) > 0.55


def test_radial_tangents_make_the_growth_of_weights_exact():
    """<grad W, W> of every linear layer, where each has a tangent of its own."""
    torch.manual_seed(0)
    layers = [nn.Linear(i, o, bias=False).double() for i, o in ((5, 6), (6, 4), (4, 3))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    x, y = torch.randn(8, 5).double(), torch.randint(0, 3, (8,))

    def growth():
        return torch.stack([(layer.weight.grad * layer.weight).sum() for layer in layers]).detach()

    source = Normal(2) + OwnValue(3)
    ForwardGradient(model, LOSS, source, ControlVariate(0.5), seed=1)(x, y)
    found = growth()
    model.zero_grad()
    LOSS(model(x), y).backward()
    torch.testing.assert_close(found, growth())
    model.zero_grad()
    weights = ForwardGradient(model, LOSS, source, ControlVariate(0.5), "weights")
    weights(x, y)
    torch.testing.assert_close(weights.diagnostics.jvps[2:], found)


@pytest.mark.parametrize("spread", [0.1, 0.5])
@pytest.mark.parametrize("maps", [False, True], ids=["tokens", "maps"])
def test_balanced_tangents_find_the_position_that_counts(spread, maps):
    """Of four tokens, or four cells of a feature map, the output depends on the first."""

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.lower = nn.Conv2d(3, 5, 1) if maps else nn.Linear(3, 5)
            self.upper = nn.Linear(5, 3)

        def forward(self, x):
            h = self.lower(x)
            return self.upper(h[:, :, 0, 0] if maps else h[:, 0])

    torch.manual_seed(0)
    model = First().double()
    x = torch.randn(8, *((3, 2, 2) if maps else (4, 3))).double()
    y = torch.randint(0, 3, (8,))
    source = ScaledByRMS(Normal(30), spread=spread)  # so many that the gradient is exact
    gradient = ForwardGradient(model, LOSS, source, perturb=Activations(output="exact"))
    gradient(x, y)
    (block,) = gradient_blocks(gradient, x, y)
    rows = block.rows().squeeze(1)  # [K, C, H, W] or [K, T, D]
    plain = Normal(30).draw(block.request).squeeze(1)
    scale = (rows / plain).mean(1 if maps else 2).mean(0).flatten()
    # All of the energy is the first position's, but for what is spread over four.
    rest = (spread / 4 / (1 - spread + spread / 4)) ** 0.5
    torch.testing.assert_close(scale, torch.tensor([1.0, rest, rest, rest]).double())


def test_balanced_tangents_of_values_without_positions_are_what_they_were():
    """Such as those of linear layers, and weights."""
    model, x, y, _ = build("mlp")
    for perturb in (Activations(), "weights"):
        one, other = (
            (ForwardGradient, source, Mean(), perturb, {})
            for source in (ScaledByRMS(Normal(3)), Normal(3))
        )
        assert same_training(model, one, other, x, y)


def gradient_blocks(gradient, x, y):
    """The tangents that the next step draws."""
    return list(step(*gradient.prepare(x, y)).tangents.blocks.values())


def test_rows_of_later_sites_are_not_carried_before_them():
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(1) + LocalLoss(5))
    gradient(x, y)
    counts = [len(block.rows()) for block in gradient_blocks(gradient, x, y)]
    assert counts == list(range(2, 2 + len(counts)))


BAD = [
    (lambda: Feedback(0), "`num_tangents` should be an integer of at least 1"),
    (lambda: Feedback(step_size=1.5), "`step_size` should be above 0 and at most 1"),
    (lambda: LocalLoss(learning_rate=0.0), "`learning_rate` should be above 0"),
    (lambda: LocalLoss(pool=0), "`pool` should be at least 1"),
    (lambda: ScaledByRMS(Normal(2), decay=1.0), "`decay` should be at least 0 and below 1"),
    (lambda: ScaledByRMS(Normal(2), spread=0.0), "`spread` should be above 0 and at most 1"),
    (lambda: RunningMean(decay=1.0), "`decay` should be at least 0 and below 1"),
    (lambda: ControlVariate(0.0), "`gain` should be 'auto', or above 0 and at most 1"),
    (lambda: ControlVariate("most"), "`gain` should be 'auto', .* Found 'most'"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("source", [Feedback(), LocalLoss()], ids=repr)
def test_weights_have_no_output_error(source):
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(2) + source, perturb="weights")
    with pytest.raises(ValueError, match="should be among the tangents of activations"):
        gradient(x, y)


def test_feedback_alone_learns_nothing():
    model, x, y, _ = build("mlp")
    with pytest.raises(ValueError, match=r"random tangents beside it, .*Normal\(2\)"):
        ForwardGradient(model, LOSS, Feedback())(x, y)


def test_sources_that_learn_are_drawn_for_a_gradient():
    with pytest.raises(RuntimeError, match="should be drawn from after `init"):
        multitangent.forward_gradient(torch.sum, torch.ones(3), Normal(2) + RunningMean())


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return {"logits": self.layer(x)}


def test_an_output_that_is_no_tensor():
    def loss(output, target):
        return nn.functional.cross_entropy(output["logits"], target, reduction="none")

    gradient = ForwardGradient(TwoOutputs(), loss, Normal(2) + Feedback())
    with pytest.raises(ValueError, match=r"should return one tensor.* Found dict"):
        gradient(torch.ones(2, 4), torch.tensor([0, 1]))


@pytest.mark.parametrize("source", [Feedback(), OwnValue(), ScaledByRMS(Normal(1))], ids=repr)
def test_compiled_steps_are_left_out(source):
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(2) + source, compile=True)
    with pytest.warns(UserWarning, match="depend on the batch or on earlier steps"):
        gradient(x, y)


@pytest.mark.parametrize("source", [Normal(2), Normal(2) + OwnValue(), Normal(2) + LocalLoss()])
@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
def test_the_output_is_differentiated_only_for_those_who_ask(source, kind):
    """`LocalLoss` asks in its first step, for the output's shape."""
    model, x, y, _ = build("mlp")
    gradient = kind(model, LOSS, source, perturb=Activations(output="exact"))
    gradient(x, y)
    found = step(*gradient.prepare(x, y))
    assert found.observation is None or found.observation.output_tangents is None
    assert not found.tangents.needs & Needs.OUTPUT


def test_tangents_that_are_not_stored_are_drawn_again_only_for_those_who_ask():
    drawn = []

    class Counted(Normal):
        def draw(self, request):
            drawn.append(request.site)
            return super().draw(request)

    counts = []
    for source in (Counted(2), ScaledByRMS(Counted(2))):
        model, x, y, _ = build("mlp")
        drawn.clear()
        ForwardGradient(model, LOSS, source, perturb="weights", store_tangents=False)(x, y)
        counts.append(len(drawn))
    assert counts[0] == counts[1]
