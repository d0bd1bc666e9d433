"""Forward gradients against backpropagation and against their simulation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import multitangent
from models_for_tests import DEVICE, MODELS, build, gradients, relative_error
from multitangent import (
    Activations,
    Feedback,
    ForwardGradient,
    Mean,
    Normal,
    Projection,
    Rademacher,
    SimulatedGradient,
    Weights,
)
from multitangent.aggregation import Rescaled, Sum, TopK
from multitangent.tangents import (
    Cone,
    Normalized,
    Orthogonal,
    RunningMean,
    ScaledByRMS,
    Sphere,
    StandardBasis,
)
from pairwise import pairwise

WEIGHT = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64, device=DEVICE)  # of three classes
DETERMINISTIC = [name for name in MODELS if name not in ("dropout", "heads")]
SOURCES = [
    Normal(4),
    Rademacher(3),
    Sphere(4),
    Orthogonal(4),
    StandardBasis(5),
    Cone(4, angle=30.0),
    Normalized(Normal(3)),
    Normal(1),
    Normal(2) + Cone(3, angle=45.0) + StandardBasis(2),
]
AGGREGATORS = [Sum(), Mean(), Projection(), TopK(2), Rescaled(Mean()), Rescaled(Projection())]
PERTURBATIONS = [
    Weights(),
    Activations(),
    Activations(share="sample"),
    Activations(recompute=True),
    Activations(output="exact"),
    Activations(share="sample", output="exact", recompute=True),
]


def backpropagation(model, loss, x, y):
    loss(model(x), y).backward()
    return gradients(model)


def size(model):
    return sum(p.numel() for p in model.parameters())


EXACT = pairwise(
    DETERMINISTIC,
    PERTURBATIONS,
    [StandardBasis, Normal, Orthogonal],
    [(torch.float64, 1e-10), (torch.float32, 1e-4)],
)


@pytest.mark.parametrize(("name", "perturb", "source", "precision"), EXACT)
def test_as_many_independent_tangents_as_dimensions_give_the_exact_gradient(
    name, perturb, source, precision
):
    dtype, tolerance = precision
    model, x, y, n = build(name, dtype)
    n = size(model) if isinstance(perturb, Weights) else n
    if source is not StandardBasis:
        n += 8  # a square Gaussian matrix may be nearly singular, which costs digits
    loss = nn.CrossEntropyLoss()
    expected = backpropagation(model, loss, x, y)
    value = ForwardGradient(model, loss, source(n), Projection(), perturb, seed=3)(x, y)
    torch.testing.assert_close(value, loss(model(x), y).detach())
    assert relative_error(gradients(model), expected) <= tolerance


SIMULATED = pairwise(list(MODELS), PERTURBATIONS, SOURCES, AGGREGATORS)


@pytest.mark.parametrize(("name", "perturb", "source", "aggregator"), SIMULATED)
def test_equals_the_simulation(name, perturb, source, aggregator):
    model, x, y, _ = build(name)
    arguments = (model, nn.CrossEntropyLoss(), source, aggregator, perturb)
    real, simulated = ForwardGradient(*arguments), SimulatedGradient(*arguments)
    for _ in range(2):  # the second step has other tangents
        value, estimate = real(x, y), gradients(model)
        torch.testing.assert_close(value, simulated(x, y), rtol=1e-12, atol=1e-12)
        assert relative_error(estimate, gradients(model)) <= 1e-9


SPLIT = pairwise(list(MODELS), PERTURBATIONS, [1, 2, 4, 5, 100])


@pytest.mark.parametrize(("name", "perturb", "micro_batch"), SPLIT)
def test_the_split_into_micro_batches_changes_nothing(name, perturb, micro_batch):
    model, x, y, _ = build(name)
    loss = nn.CrossEntropyLoss(weight=WEIGHT)
    whole = ForwardGradient(model, loss, Normal(4), Projection(), perturb)(x, y)
    expected = gradients(model)
    parts = ForwardGradient(model, loss, Normal(4), Projection(), perturb, 0, micro_batch)(x, y)
    torch.testing.assert_close(parts, whole)
    assert relative_error(gradients(model), expected) <= 1e-9


LOSSES = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "weighted": nn.CrossEntropyLoss(weight=WEIGHT),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.2),
    "ignoring": nn.CrossEntropyLoss(ignore_index=1),
    "likelihood": nn.NLLLoss(weight=WEIGHT),
    "square": nn.MSELoss(),
    "square sum": nn.MSELoss(reduction="sum"),
    "smooth": nn.SmoothL1Loss(),
    "divergence": nn.KLDivLoss(reduction="batchmean"),
    "callable": lambda output, target: nn.functional.cross_entropy(
        output, target, reduction="none"
    ),
}


@pytest.mark.parametrize("perturb", [Weights(), Activations()], ids=repr)
@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_honoured(name, perturb):
    model, x, y, n = build("mlp")
    loss = LOSSES[name]
    if name in ("likelihood", "divergence"):
        model.append(nn.LogSoftmax(-1))
    if (name.startswith(("square", "smooth")) and name != "smoothed") or name == "divergence":
        y = torch.rand(6, 3, dtype=torch.float64)
    expected_value = loss(model(x), y).mean()
    expected_value.backward()
    expected = gradients(model)
    n = size(model) if isinstance(perturb, Weights) else n
    value = ForwardGradient(model, loss, StandardBasis(n), perturb=perturb, micro_batch=4)(x, y)
    torch.testing.assert_close(value, expected_value.detach())
    assert relative_error(gradients(model), expected) <= 1e-10


def test_losses_of_sequences_average_over_all_that_count():
    model = nn.Linear(4, 3, dtype=torch.float64)
    x = torch.randn(5, 7, 4, dtype=torch.float64)
    y = torch.randint(3, (5, 7))
    y[0, :4], y[3, 1:] = -100, -100
    wrapped = nn.Sequential(model, Transposed())
    loss = nn.CrossEntropyLoss()
    expected = backpropagation(wrapped, loss, x, y)
    ForwardGradient(wrapped, loss, StandardBasis(21), micro_batch=2)(x, y)
    assert relative_error(gradients(wrapped), expected) <= 1e-10


class Transposed(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


def test_gradients_accumulate():
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(4))
    gradient(x, y)
    first = [p.grad.clone() for p in model.parameters()]
    again = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(4))
    again(x, y)
    for parameter, once in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * once)


@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=repr)
def test_nothing_but_the_gradients_is_changed(perturb):
    model, x, y, _ = build("dropout")
    model[0].bias.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    x.requires_grad_()
    ForwardGradient(model, nn.CrossEntropyLoss(), Normal(3), perturb=perturb)(x, y)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert model.training and torch.is_grad_enabled() and x.grad is None
    assert torch.equal(random_state, torch.get_rng_state())
    assert model[0].bias.grad is None and not model[0].bias.requires_grad
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad.grad_fn is None for p in model.parameters() if p.grad is not None)


def test_hooks_are_removed_and_grad_mode_restored_after_an_error():
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        gradient(x[:, :3], y)
    assert torch.is_grad_enabled()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_no_graph_reaches_across_layers():
    """The input of every layer carries no graph, and a layer's graph ends in its own parameters."""
    model, x, y, _ = build("mlp")
    reached = {}
    own = {name: {id(p) for p in module.parameters()} for name, module in model.named_children()}

    def record(name):
        def hook(module, args, output):
            from multitangent.dual import primal

            assert primal(args[0]).requires_grad == (not own[name])
            reached[name] = _leaves(primal(output).grad_fn)

        return hook

    handles = [m.register_forward_hook(record(n)) for n, m in list(model.named_children())[1:]]
    ForwardGradient(model, nn.CrossEntropyLoss(), Normal(3), micro_batch=len(x), verify=False)(x, y)
    for handle in handles:
        handle.remove()
    linear = [name for name in reached if own[name]]
    assert len(linear) == 3
    assert all(reached[name] == own[name] for name in linear)


def _leaves(node):
    if node is None:
        return set()
    if hasattr(node, "variable"):
        return {id(node.variable)}
    return set().union(*[_leaves(following) for following, _ in node.next_functions])


def test_steps_are_reproducible_and_resume():
    def run(steps, state=None):
        model, x, y, _ = build("dropout")
        gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(2), seed=7)
        if state is not None:
            gradient.load_state_dict(state)
        found = []
        for _ in range(steps):
            gradient(x, y)
            found.append(gradients(model))
        return found, gradient.state_dict()

    whole, _ = run(4)
    head, state = run(2)
    tail, _ = run(2, state)
    for expected, found in zip(whole, head + tail, strict=True):
        assert all(map(torch.equal, expected, found))
    assert not torch.equal(whole[0][0], whole[1][0])


def test_frozen_parameters_stay_frozen_and_cost_no_dimension():
    model, x, y, _ = build("mlp")
    for parameter in model[1].parameters():
        parameter.requires_grad_(False)
    expected = backpropagation(model, nn.CrossEntropyLoss(), x, y)
    ForwardGradient(model, nn.CrossEntropyLoss(), StandardBasis(7))(x, y)  # 4 + 3 of 13
    assert relative_error(gradients(model), expected) <= 1e-10


def test_several_inputs_as_tuple_and_mapping():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, a, b):
            return self.layer(a * b)

    model = Two().double()
    a, b = torch.randn(2, 5, 4, dtype=torch.float64)
    y = torch.randint(3, (5,))
    nn.CrossEntropyLoss()(model(a, b), y).backward()
    expected = gradients(model)
    for inputs in ((a, b), {"b": b, "a": a}):
        ForwardGradient(model, nn.CrossEntropyLoss(), StandardBasis(3), micro_batch=2)(inputs, y)
        assert relative_error(gradients(model), expected) <= 1e-10


def test_tied_weights_have_one_tangent_and_one_gradient():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(4, 4, bias=False)
            self.decode = nn.Linear(4, 4, bias=False)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(torch.tanh(self.encode(x)))

    model = Tied().double()
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    expected = backpropagation(model, nn.MSELoss(), x, y)
    for perturb, n in ((Weights(), 16), (Activations(), 8)):
        ForwardGradient(model, nn.MSELoss(), StandardBasis(n), perturb=perturb)(x, y)
        assert relative_error(gradients(model), expected) <= 1e-10


def test_a_layer_that_is_not_reached_gets_no_gradient():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.used(x)

    model = Sometimes()
    ForwardGradient(model, nn.MSELoss(), Normal(2))(torch.ones(2, 3), torch.ones(2, 3))
    assert model.unused.weight.grad is None and model.used.weight.grad is not None


def test_diagnostics_describe_the_last_step():
    model, x, y, n = build("attention")
    gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Orthogonal(4), micro_batch=4)
    with pytest.raises(RuntimeError, match="read after a step"):
        _ = gradient.diagnostics
    gradient(x, y)
    found = gradient.diagnostics
    assert found.jvps.shape == (4, 6) and found.gradient_norm.shape == (6,)
    torch.testing.assert_close(found.gram, n * torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(float(found.condition), 1.0)
    torch.testing.assert_close(float(found.effective_rank), 4.0)
    assert found.fallbacks == frozenset()


def test_repr_names_every_setting():
    gradient = ForwardGradient(nn.Linear(2, 2), nn.MSELoss(), Normal(2), Mean(), "weights", seed=4)
    assert repr(gradient) == (
        "ForwardGradient(Linear(...), MSELoss(), tangents=Normal(num_tangents=2), "
        "aggregator=Mean(), perturb=Weights(parameters=None), seed=4, micro_batch='auto')"
    )


@pytest.mark.parametrize("value", [*SOURCES, *AGGREGATORS, *PERTURBATIONS], ids=repr)
def test_repr_is_a_constructor_call(value):
    rooms = (multitangent, multitangent.aggregation, multitangent.tangents)
    names = {name: getattr(room, name) for room in rooms for name in room.__all__}
    assert eval(repr(value), names) == value


def test_what_is_trainable_may_change_between_steps():
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, nn.CrossEntropyLoss(), StandardBasis(13))
    model[1].requires_grad_(False)
    gradient(x, y)
    assert model[1].weight.grad is None
    model[1].requires_grad_(True)
    model.zero_grad()
    gradient(x, y)
    assert model[1].weight.grad is not None


def test_a_simulation_says_what_it_does_with_statistics():
    model, *_ = build("mlp")
    arguments = model, nn.CrossEntropyLoss()
    assert "statistics='coupled'" in repr(SimulatedGradient(*arguments, statistics="coupled"))
    assert "statistics" not in repr(SimulatedGradient(*arguments))


def test_a_state_from_before_the_names_changed_is_read():
    """The keys of version 0.1.0, with which checkpoints were written."""
    model, x, y, _ = build("mlp")
    names = ("1", "3", "5")
    matrices = {
        name: torch.ones(9, size, dtype=torch.float64)
        for name, size in zip(names, (6, 4, 3), strict=True)
    }
    means = {
        name: torch.ones(3, size, dtype=torch.float64)
        for name, size in zip(names, (6, 4, 3), strict=True)
    }
    squares = {name: torch.ones(1, dtype=torch.float64) for name in names}
    learned = {
        "0": {"squares": squares, "inner": {}},
        "1": {"matrices": matrices},
        "2": {"means": means},
    }
    source = ScaledByRMS(Normal(2)) + Feedback() + RunningMean()
    gradient = ForwardGradient(model, nn.CrossEntropyLoss(), source)
    gradient.load_state_dict({"seed": 7, "step": 12, "tangents": learned})
    assert (gradient.seed, gradient.step) == (7, 12)
    learned["2"]["labels"] = torch.arange(3)  # of means by class
    torch.testing.assert_close(gradient.state_dict()["tangents"], learned)
    assert gradient(x, y).isfinite()
