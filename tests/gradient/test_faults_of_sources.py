"""Sources of tangents see what was perturbed, and a step that fails leaves them as they were."""

from __future__ import annotations

import copy
from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm
from torch.utils import _pytree as pytree

from models_for_tests import Model, data, gradients, linear, relative_error
from multitangent import (
    Activations,
    Feedback,
    ForwardGradient,
    LocalLoss,
    Mean,
    Normal,
    OwnValue,
    Projection,
    SimulatedGradient,
    forward_gradient,
)
from multitangent.gradient import step
from multitangent.tangents import (
    GuessSource,
    Needs,
    Normalized,
    RunningMean,
    ScaledByRMS,
    StandardBasis,
    StatefulSource,
    TangentSource,
    guess_block,
)

DTYPE = torch.float64
SQUARE = nn.MSELoss()
CLASSES = nn.CrossEntropyLoss()


LABELS = torch.tensor([0, 1, 2, 1, 0, 2])


def with_relu(m, x):
    return m.parts[1](nn.functional.relu(m.parts[0](x), inplace=True))


def with_method(m, x):
    h = m.parts[0](x)
    h += 1
    return m.parts[1](h)


def with_view(m, x):
    h = m.parts[0](x)
    h[:, :2].mul_(3)
    return m.parts[1](h)


def with_dropout(m, x):
    return m.parts[1](nn.functional.dropout(m.parts[0](x), 0.5, inplace=True))


def with_module(m, x):
    return m.parts[1](m.parts[2](m.parts[0](x)))


class Undeclared(TangentSource):
    """A user's source that looks at the values, and says nothing of it."""

    num_tangents = 1

    def draw(self, request):
        return request.primal.tanh().unsqueeze(0)

    @property
    def guesses(self):
        return (True,)


class Declared(Undeclared):
    def needs(self, step):
        return Needs.PRIMAL


class Late(Undeclared):
    """A user's source that looks at the values when a step is over."""

    def __init__(self):
        self.seen = []

    def needs(self, step):
        return Needs.PRIMAL | Needs.UPDATE

    def update(self, observation):
        self.seen.append(sum(float(r.primal.sum()) for r in observation.requests.values()))


WRITES = [with_relu, with_method, with_view, with_dropout, with_module]
LOOKING = [OwnValue(), LocalLoss(2), Declared(), Normalized(OwnValue()), ScaledByRMS(OwnValue(2))]


def trained(kind, function, source, **options):
    """The gradient after some steps."""
    model = Model(function, linear(4, 6), linear(6, 3), nn.LeakyReLU(0.3, inplace=True))
    gradient = kind(model, CLASSES, Normal(2) + source, **options)
    for _ in range(3):
        model.zero_grad()
        gradient(data(6, 4), LABELS)
    return gradients(model)


@pytest.mark.parametrize("source", LOOKING, ids=lambda source: type(source).__name__)
@pytest.mark.parametrize("function", WRITES)
def test_sources_see_values_before_a_layer_writes_into_them(function, source):
    """What is drawn depends neither on the split of the batch nor on what is kept."""
    expected = trained(ForwardGradient, lambda m, x: function(m, x), source, micro_batch=6)
    for options in (
        {"micro_batch": 2},
        {"micro_batch": 6, "store_tangents": False},
        {"micro_batch": 4, "store_tangents": False},
        {"perturb": Activations(recompute=True), "micro_batch": 6},
        {"perturb": Activations(recompute=True), "micro_batch": 2},
    ):
        found = trained(ForwardGradient, function, source, **options)
        assert relative_error(found, expected) <= 1e-9
    assert relative_error(trained(SimulatedGradient, function, source), expected) <= 1e-9


def out_of_place(m, x):
    return m.parts[1](nn.functional.relu(m.parts[0](x)))


@pytest.mark.parametrize("source", LOOKING, ids=lambda source: type(source).__name__)
def test_in_place_and_out_of_place_are_the_same_to_a_source(source):
    for options in ({"micro_batch": 6}, {"micro_batch": 2}, {"store_tangents": False}):
        expected = trained(ForwardGradient, out_of_place, source, **options)
        found = trained(ForwardGradient, with_relu, source, **options)
        assert relative_error(found, expected) <= 1e-9


@pytest.mark.parametrize("micro_batch", [2, 6])
def test_sources_learn_of_values_before_a_layer_wrote_into_them(micro_batch):
    seen = []
    for function in (out_of_place, with_relu):
        source = Late()
        trained(ForwardGradient, function, source, micro_batch=micro_batch)
        seen.append(source.seen)
    assert seen[0] == pytest.approx(seen[1], rel=1e-12)


def test_a_value_that_is_lost_is_refused():
    with pytest.warns(UserWarning, match=r"written into it in place, at 'parts.0'.*Needs.PRIMAL"):
        trained(ForwardGradient, with_relu, Undeclared(), micro_batch=2)  # goes on with all
    trained(ForwardGradient, out_of_place, Undeclared(), micro_batch=2)  # where nothing is written


def shifted(output, target):
    output -= target
    return output.square().mean(1)


def not_shifted(output, target):
    return (output - target).square().mean(1)


class Responses(TangentSource):
    """A user's source that keeps the derivatives of the output."""

    num_tangents = 2

    def __init__(self):
        self.seen = []

    def draw(self, request):
        return request.random.normal(2)

    def needs(self, step):
        return Needs.OUTPUT_TANGENTS | Needs.UPDATE

    def update(self, observation):
        self.seen.append(observation.output_tangents)


@pytest.mark.parametrize("micro_batch", [2, 6])
@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
@pytest.mark.parametrize(
    ("source", "perturb"),
    [
        (lambda: Normal(3) + Feedback(), Activations()),
        (lambda: Normal(3), Activations(output="exact")),
        (lambda: Normal(3) + LocalLoss(), Activations()),
        (Responses, Activations()),
        (Responses, "weights"),
    ],
)
def test_a_loss_that_writes_into_the_output_hides_nothing(source, perturb, kind, micro_batch):
    found = []
    for loss in (shifted, not_shifted):
        model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 3))
        gradient = kind(model, loss, source(), Projection(), perturb, micro_batch=micro_batch)
        for _ in range(3):
            model.zero_grad()
            gradient(data(6, 4), data(6, 3))
        found.append([*gradients(model), *getattr(gradient.tangents, "seen", [])])
    assert relative_error(*found) <= 1e-9


@pytest.mark.parametrize("perturb", ["activations", "weights"])
def test_the_oracle_knows_the_output_that_no_source_asked_for(perturb):
    found = []
    for kind in (ForwardGradient, SimulatedGradient):
        model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 3))
        source = Responses()
        kind(model, CLASSES, source, perturb=perturb)(data(6, 4), LABELS)
        found.append(source.seen)
        assert source.seen[0].shape == (2, 6, 3)
    assert relative_error(*found) <= 1e-9


@pytest.mark.parametrize(
    "source", [Normal(2), Normal(2) + Feedback(), Normal(2) + LocalLoss()], ids=repr
)
@pytest.mark.parametrize("output", ["exact", "perturbed"])
@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
def test_a_loss_without_a_derivative_is_refused_clearly(kind, output, source):
    model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 3))

    def detached(output, target):
        return output.detach().square().mean(1)

    gradient = kind(model, detached, source, perturb=Activations(output=output))
    with pytest.raises(RuntimeError, match=r"losses without derivatives.*remove the `detach"):
        gradient(data(6, 4), data(6, 3))


# What a step that fails, or that is only assessed, leaves as it was.


STATEFUL = [
    LocalLoss(2),
    RunningMean(),
    Feedback(),
    ScaledByRMS(Normal(2)),
    ScaledByRMS(LocalLoss()),
    Normalized(LocalLoss()) + RunningMean(),
]


def everything(gradient):
    """All that a step may change."""
    kept = [None if p.grad is None else p.grad.clone() for p in gradient.model.parameters()]
    return copy.deepcopy((gradient.state_dict(), kept))


def assert_same(one, other):
    leaves, structure = pytree.tree_flatten(one)
    expected, other_structure = pytree.tree_flatten(other)
    assert structure == other_structure
    for a, b in zip(leaves, expected, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("source", STATEFUL, ids=repr)
@pytest.mark.parametrize("steps", [0, 2])
def test_an_assessment_leaves_the_state(source, steps):
    model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 3))
    gradient = ForwardGradient(model, CLASSES, Normal(2) + source)
    for _ in range(steps):
        gradient(data(6, 4), LABELS)
    before = everything(gradient)
    gradient.assess(data(6, 4), LABELS)
    step(*gradient.prepare(data(6, 4), LABELS))
    assert_same(everything(gradient), before)


class Count(TangentSource):
    """A source that counts its draws."""

    num_tangents = 2
    draws = 0

    def draw(self, request):
        self.draws += 1
        return request.random.normal(2)


def test_an_assessment_draws_nothing_for_an_observation():
    drawn = []
    for beside in (Normal(1), Feedback()):
        source = Count()
        model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 3))
        gradient = ForwardGradient(model, CLASSES, source + beside, store_tangents=False)
        gradient.assess(data(6, 4), LABELS)
        drawn.append(source.draws)
    assert drawn[0] == drawn[1]


class Failing(nn.Module):
    """A layer that fails when it is told to."""

    fails = False

    def __init__(self):
        super().__init__()
        self.layer = linear(5, 5)

    def forward(self, x):
        if self.fails:
            raise KeyError("told to fail")
        return self.layer(x)


class FailingMean(Mean):
    fails = False

    def coefficients(self, *args, **kwargs):
        if self.fails:
            raise KeyError("told to fail")
        return super().coefficients(*args, **kwargs)


@dataclass(frozen=True)
class FailingSource(GuessSource):
    """Guesses of zeros; their update fails when it is told to."""

    num_tangents: int = 1

    def init(self):
        return FailingUpdate(self)


class FailingUpdate(StatefulSource):
    fails = False

    def draw(self, request):
        return guess_block(request.primal * 0, request, 1)

    def update(self, observation):
        if FailingUpdate.fails:
            raise KeyError("told to fail")


@pytest.mark.parametrize("source", STATEFUL, ids=repr)
@pytest.mark.parametrize("place", ["module", "aggregator", "source", "hook", "again"])
def test_a_step_that_fails_changes_nothing(place, source, monkeypatch):
    layer, aggregator = Failing(), FailingMean()
    model = nn.Sequential(linear(4, 5), nn.Tanh(), layer, nn.Tanh(), linear(5, 3))
    gradient = ForwardGradient(
        model,
        CLASSES,
        Normal(2) + source + FailingSource(),
        aggregator,
        Activations(recompute=place == "again"),
        micro_batch=6,
    )

    def hook(value):
        if place == "hook" and layer.fails is None:
            raise KeyError("told to fail")

    model[2].layer.weight.register_hook(hook)
    for _ in range(2):
        gradient(data(6, 4), LABELS)
    before = everything(gradient)
    if place == "again":
        # The layer runs for the step, and fails when it runs again for its gradient.
        runs = []

        def fail(module, args):
            runs.append(module)
            if len(runs) == 2:
                raise KeyError("told to fail")

        handle = layer.register_forward_pre_hook(fail)
    layer.fails = {"module": True, "hook": None}.get(place, False)
    monkeypatch.setattr(FailingMean, "fails", place == "aggregator")
    monkeypatch.setattr(FailingUpdate, "fails", place == "source")
    with pytest.raises(KeyError, match="told to fail"):
        gradient(data(6, 4), LABELS)
    assert_same(everything(gradient), before)
    layer.fails = False
    monkeypatch.undo()
    if place == "again":
        handle.remove()
    assert gradient(data(6, 4), LABELS).isfinite()
    assert gradient.step == 3


def test_a_hook_after_the_step_may_fail():
    """As in backpropagation, the gradients are there by then."""
    model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 3))
    gradient = ForwardGradient(model, CLASSES, Normal(2) + RunningMean())

    def fail(parameter):
        raise KeyError("told to fail")

    model[0].weight.register_post_accumulate_grad_hook(fail)
    with pytest.raises(KeyError, match="told to fail"):
        gradient(data(6, 4), LABELS)
    assert gradient.step == 1
    assert all(p.grad is not None for p in model.parameters())


# What sources make of targets and shapes.


@pytest.mark.parametrize("ignored", [-100, -1, 255, 10**9])
@pytest.mark.parametrize("source", STATEFUL, ids=repr)
def test_labels_that_the_loss_ignores(source, ignored):
    target = torch.tensor([0, ignored, 2, 1, ignored, 2])
    model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 3))
    loss = nn.CrossEntropyLoss(ignore_index=ignored)
    gradient = ForwardGradient(model, loss, Normal(2) + source)
    for _ in range(3):
        assert gradient(data(6, 4), target).isfinite()
    if isinstance(source, RunningMean):
        state = gradient.state_dict()["tangents"]["1"]
        assert state["labels"].tolist() == sorted({0, 1, 2, ignored})
        of_ignored = state["means"]["0"][state["labels"] == ignored]
        assert not of_ignored.any()


def test_every_number_is_a_label():
    """Of samples in {-1, 1}, and of such as come for the first time later."""

    def hinge(output, target):
        return (1 - output[:, 0] * target).clamp(min=0)

    model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 1))
    gradient = ForwardGradient(model, hinge, StandardBasis(8) + RunningMean(decay=0.0))
    for target in ([1, 1, 1, 1, 1, 1], [1, -1, 1, -1, 1, -1]):
        target = torch.tensor(target)
        found = step(*gradient.prepare(data(6, 4), target)).values["0"]
        gradient(data(6, 4), target)
    state = gradient.state_dict()["tangents"]["1"]
    assert state["labels"].tolist() == [1, -1]
    expected = torch.stack([found[target == label].mean(0) for label in (1, -1)])
    torch.testing.assert_close(state["means"]["0"], expected)
    blocks = step(*gradient.prepare(data(6, 4), torch.tensor([1, -1, 7, 1, 1, 1]))).tangents.blocks
    rows = blocks["0"].rows()[8]
    torch.testing.assert_close(rows[:2], expected)
    assert not rows[2].any()  # a label that has not been seen


def test_losses_of_probabilities_are_refused_by_local_losses():
    model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 1), nn.Sigmoid())
    gradient = ForwardGradient(model, nn.BCELoss(), Normal(2) + LocalLoss())
    before = everything(gradient)
    with pytest.raises(ValueError, match=r"takes any numbers.*nn.BCEWithLogitsLoss"):
        gradient(data(6, 4), torch.rand(6, 1, dtype=DTYPE))
    assert_same(everything(gradient), before)

    def with_logarithm(output, target):
        return -(target * output.log()).sum(1)

    gradient = ForwardGradient(model, with_logarithm, Normal(2) + LocalLoss())
    with pytest.raises(ValueError, match=r"Found.*losses that are not finite"):
        gradient(data(6, 4), torch.rand(6, 1, dtype=DTYPE))


@pytest.mark.parametrize("perturb", ["activations", "weights"])
@pytest.mark.parametrize("source", [*STATEFUL, OwnValue()], ids=repr)
def test_layers_may_be_frozen_between_steps(source, perturb):
    if perturb == "weights" and any(text in repr(source) for text in ("LocalLoss", "Feedback")):
        pytest.skip("a source for activations")
    model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 6), nn.Tanh(), linear(6, 3))
    gradient = ForwardGradient(model, CLASSES, Normal(2) + source, perturb=perturb)
    for frozen in (None, 0, 2, 4, None):  # the sites' names stay, and their layers change
        model.requires_grad_(True)
        if frozen is not None:
            model[frozen].requires_grad_(False)
        for _ in range(2):
            assert gradient(data(6, 4), LABELS).isfinite()


@pytest.mark.parametrize("source", [*STATEFUL[1:4], OwnValue()], ids=repr)
def test_lengths_may_change_between_steps(source):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv1d(4, 5, 1), nn.ReLU(inplace=True), nn.Conv1d(5, 3, 1))
    gradient = ForwardGradient(model.to(DTYPE), SQUARE, Normal(2) + source)
    for length in (3, 4, 1, 3):
        assert gradient(data(6, 4, length), data(6, 3, length)).isfinite()


def test_local_losses_say_that_the_output_has_another_shape():
    model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 3))
    gradient = ForwardGradient(model, CLASSES, Normal(2) + LocalLoss())
    gradient(data(6, 4), LABELS)
    model[2] = linear(5, 4)
    with pytest.raises(ValueError, match=r"first batch's output.*a new gradient"):
        gradient(data(6, 4), torch.tensor([0, 1, 2, 3, 3, 3]))


# Layers that run again for their local step.


def doubled(module, args):
    return (2 * args[0] + 1,)


def tripled(module, args, output):
    return 3 * output


def hooked():
    layers = linear(4, 5), linear(5, 3)
    for layer in layers:
        layer.register_forward_pre_hook(doubled)
        layer.register_forward_hook(tripled)
    return nn.Sequential(layers[0], nn.Tanh(), layers[1])


def normalized(wrap):
    def build():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nn.Sequential(wrap(linear(4, 5)), nn.Tanh(), wrap(linear(5, 3)))

    return build


NORMALIZED = [hooked, normalized(spectral_norm), normalized(weight_norm)]
NORMALIZED += [
    normalized(wrap) for wrap in (parametrizations.spectral_norm, parametrizations.weight_norm)
]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.filterwarnings("ignore::multitangent.dual.FallbackWarning")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("build", NORMALIZED)
def test_what_runs_before_a_layer_runs_once(build, recompute):
    model = build()
    before = copy.deepcopy(model.state_dict())
    SQUARE(model(data(6, 4)), data(6, 3)).backward()
    expected, after = gradients(model), copy.deepcopy(model.state_dict())
    model.load_state_dict(before)
    perturb = Activations(recompute=recompute)
    ForwardGradient(model, SQUARE, StandardBasis(8), Projection(), perturb, micro_batch=6)(
        data(6, 4), data(6, 3)
    )
    assert relative_error(gradients(model), expected) <= 1e-9
    torch.testing.assert_close(dict(model.state_dict()), dict(after))


def test_hooks_of_all_modules_run_once_before_a_layer():
    model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 3))
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: doubled(module, args) if isinstance(module, nn.Linear) else None
    )
    with handle:
        SQUARE(model(data(6, 4)), data(6, 3)).backward()
        expected = gradients(model)
        perturb = Activations(recompute=True)
        ForwardGradient(model, SQUARE, StandardBasis(8), Projection(), perturb)(
            data(6, 4), data(6, 3)
        )
    assert relative_error(gradients(model), expected) <= 1e-9


def test_layers_that_run_again_have_the_same_precision():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    found = []
    for recompute in (False, True):
        perturb = Activations(recompute=recompute)
        gradient = ForwardGradient(model, SQUARE, Normal(20), perturb=perturb)
        with torch.autocast("cpu", torch.bfloat16):
            gradient(data(6, 4).float(), data(6, 3).float())
        found.append(gradients(model))
    assert relative_error(*found) == 0


# Structures.


@dataclass
class Plain:
    value: torch.Tensor
    count: int = 2


@dataclass(frozen=True, slots=True)
class Frozen:
    value: torch.Tensor


class Items(list):
    pass


class Pair(tuple):
    pass


class Output(OrderedDict):
    """Such as libraries of transformers return: a dictionary with attributes."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Encoding(UserDict):
    """Such as tokenizers return."""


class Opaque:
    def __init__(self, value):
        self.value = value


class Slots:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


Named = namedtuple("Named", "value rest")

STRUCTURES = {
    "dataclass": (Plain, lambda s: s.value),
    "frozen": (Frozen, lambda s: s.value),
    "mapping": (lambda h: MappingProxyType({"a": h}), lambda s: s["a"]),
    "encoding": (lambda h: Encoding(a=h), lambda s: s["a"]),
    "output": (lambda h: Output(logits=h), lambda s: s.logits),
    "list": (lambda h: Items([h]), lambda s: s[0]),
    "tuple": (lambda h: Pair([h, None]), lambda s: s[0]),
    "named": (lambda h: Named(h, None), lambda s: s.value),
    "nested": (lambda h: ([Plain(Encoding(a=(h,)))],), lambda s: s[0][0].value["a"][0]),
}


class Wrapping(nn.Module):
    """A layer that returns a structure."""

    def __init__(self, wrap):
        super().__init__()
        self.layer = linear(4, 5)
        self.wrap = wrap

    def forward(self, x):
        return self.wrap(self.layer(x))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("micro_batch", [2, 6])
@pytest.mark.parametrize("name", STRUCTURES)
def test_sites_may_return_structures(name, micro_batch, recompute):
    wrap, unwrap = STRUCTURES[name]
    model = Model(
        lambda m, x: m.parts[1](unwrap(m.parts[0](x)).tanh()), Wrapping(wrap), linear(5, 3)
    )
    SQUARE(model(data(6, 4)), data(6, 3)).backward()
    expected = gradients(model)
    perturb = Activations(sites=["parts.0", "parts.1"], recompute=recompute)
    gradient = ForwardGradient(
        model, SQUARE, StandardBasis(8), Projection(), perturb, micro_batch=micro_batch
    )
    gradient(data(6, 4), data(6, 3))
    assert relative_error(gradients(model), expected) <= 1e-9


@pytest.mark.parametrize("wrap", [Opaque, Slots, lambda h: (Opaque([h]), 1), lambda h: {h}])
def test_a_site_that_hides_tensors_is_refused(wrap):
    model = Model(lambda m, x: m.parts[1](m.parts[0](x).value), Wrapping(wrap), linear(5, 3))
    gradient = ForwardGradient(model, SQUARE, perturb=Activations(sites=["parts.0", "parts.1"]))
    with pytest.raises(ValueError, match=r"inside (Opaque|Slots|set) at 'parts.0'.*Try"):
        gradient(data(6, 4), data(6, 3))


def assert_structures_work(name, place, x, y, gradient_of):
    """The gradient of a batch in which inputs or target are a structure."""
    wrap, unwrap = STRUCTURES[name]

    def loss(output, target):
        return (output - (unwrap(target) if place == "target" else target)).square().mean(1)

    def first(s):
        return unwrap(s[0]) if place == "inputs" else s

    model = Model(lambda m, s: m.parts[1](m.parts[0](first(s)).tanh()), linear(4, 5), linear(5, 3))
    gradient = gradient_of(model, loss)
    for factor in (1, 2):  # nothing of the first batch stays
        inputs = ([wrap(factor * x)],) if place == "inputs" else factor * x
        target = wrap(factor * y) if place == "target" else factor * y
        loss(model(inputs[0] if place == "inputs" else inputs), target).mean().backward()
        expected = gradients(model)
        gradient(inputs, target)
        assert relative_error(gradients(model), expected) <= 1e-9


@pytest.mark.parametrize("micro_batch", [2, "auto"])
@pytest.mark.parametrize("place", ["inputs", "target"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_inputs_and_targets_may_be_structures(name, place, micro_batch):
    assert_structures_work(
        name,
        place,
        data(6, 4),
        data(6, 3),
        lambda *parts: ForwardGradient(*parts, StandardBasis(8), micro_batch=micro_batch),
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("place", ["inputs", "target"])
def test_structures_in_a_compiled_step(place):
    assert_structures_work(
        "mapping",
        place,
        data(6, 4),
        data(6, 3),
        lambda *parts: ForwardGradient(*parts, StandardBasis(8), compile=True),
    )


def test_inputs_that_can_not_be_split():
    model = Model(lambda m, s: m.parts[0](s[0] * s[1].value), linear(4, 3))

    def inputs():
        return ([data(6, 4), Opaque(data(6, 4))],)

    SQUARE(model(*inputs()), data(6, 3)).backward()
    expected = gradients(model)
    ForwardGradient(model, SQUARE, StandardBasis(3))(inputs(), data(6, 3))
    assert relative_error(gradients(model), expected) <= 1e-9
    with pytest.warns(UserWarning, match=r"6 samples inside Opaque.*micro_batch=6"):
        ForwardGradient(model, SQUARE, micro_batch=2)(inputs(), data(6, 3))


def test_a_loss_of_an_output_with_attributes():
    model = Model(lambda m, x: Output(logits=m.parts[0](x)), linear(4, 3))
    for loss in (CLASSES, nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum")):
        with pytest.raises(ValueError, match=r"returns Output. Try .*out.logits, y, reduction="):
            ForwardGradient(model, loss)(data(6, 4), LABELS)

    def loss(out, y):
        return F.cross_entropy(out.logits, y, reduction="none")

    loss(model(data(6, 4)), LABELS).mean().backward()
    expected = gradients(model)
    ForwardGradient(model, loss, StandardBasis(3), micro_batch=2)(data(6, 4), LABELS)
    assert relative_error(gradients(model), expected) <= 1e-9


# Outputs that nobody uses.


class Attending(nn.Module):
    """PyTorch's attention, which returns its weights too."""

    def __init__(self, *, use, **options):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=DTYPE)
        self.head = linear(4, 2)
        self.use = use
        self.options = options

    def forward(self, x):
        out, weights = self.attention(x, x, x, **self.options)
        if self.use == "later":
            return self.head(torch.einsum("bts,bsd->btd", weights, out)).mean(1)
        if self.use == "overwritten":
            weights.mul_(2)
        values = self.head(out).mean(1)
        return values if self.use == "not" else (values, weights)


def attention_loss(output, target):
    values, weights = output if isinstance(output, tuple) else (output, target[:, :1] * 0)
    return (values - target).square().mean(1) + weights.square().flatten(1).sum(1)


@pytest.mark.parametrize(
    "options", [{}, {"need_weights": False}, {"average_attn_weights": False}], ids=str
)
@pytest.mark.parametrize("micro_batch", [2, 6])
@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
def test_weights_of_attention_that_are_dropped_are_not_perturbed(kind, micro_batch, options):
    model = Attending(use="not", **options)
    x, y = data(6, 5, 4), data(6, 2)
    SQUARE(model(x), y).backward()
    expected = gradients(model)
    gradient = kind(model, SQUARE, StandardBasis(30), micro_batch=micro_batch)
    assert step(*gradient.prepare(x, y)).tangents.dimension == 5 * 4 + 5 * 2
    gradient(x, y)
    assert relative_error(gradients(model), expected) <= 1e-9


@pytest.mark.parametrize("use", ["not", "later", "overwritten", "in the loss"])
@pytest.mark.parametrize("source", [StandardBasis(60), Normal(60) + OwnValue() + LocalLoss()])
@pytest.mark.parametrize("micro_batch", [2, 6])
@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
@pytest.mark.parametrize("recompute", [False, True])
def test_weights_of_attention_that_are_used_stay_in_the_graph_of_what_uses_them(
    recompute, kind, micro_batch, source, use
):
    if use != "not" and use != "later" and "LocalLoss" in repr(source):
        source = Normal(60) + OwnValue()  # the model returns no tensor
    model = Attending(use=use)
    x, y = data(6, 5, 4), data(6, 2)
    attention_loss(model(x), y).mean().backward()
    expected = gradients(model)
    perturb = Activations(recompute=recompute)
    gradient = kind(model, attention_loss, source, Projection(), perturb, micro_batch=micro_batch)
    n = step(*gradient.prepare(x, y)).tangents.dimension
    assert n == 5 * 4 + 5 * 2 + (5 * 5 if recompute else 0)
    for _ in range(2):
        gradient(x, y)
        assert relative_error(gradients(model), expected) <= 1e-7


def test_an_exact_output_may_be_that_of_attention():
    layer = nn.MultiheadAttention(4, 2, batch_first=True, dtype=DTYPE)
    model = Model(lambda m, x: m.parts[1](*[m.parts[0](x)] * 3)[0], linear(4, 4), layer)
    x, y = data(6, 5, 4), data(6, 5, 4)
    SQUARE(model(x), y).backward()
    expected = gradients(model)
    perturb = Activations(output="exact")
    ForwardGradient(model, SQUARE, StandardBasis(20), perturb=perturb)(x, y)
    assert relative_error(gradients(model), expected) <= 1e-9


# Hooks on gradients that forward mode does not have.


def reversing(module, grad_input, grad_output):
    return tuple(None if g is None else -g for g in grad_input)


REGISTER = {
    "full": lambda layer: layer.register_full_backward_hook(reversing),
    "pre": lambda layer: layer.register_full_backward_pre_hook(lambda m, g: (-g[0],)),
    "old": lambda layer: layer.register_backward_hook(reversing),
}


@pytest.mark.parametrize("perturb", ["activations", "weights"])
@pytest.mark.parametrize("name", REGISTER)
@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
def test_backward_hooks_of_modules_are_refused(kind, name, perturb):
    model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 3))
    gradient = kind(model, SQUARE, Normal(2), perturb=perturb)
    with REGISTER[name](model[1]):
        for take in (gradient, gradient.assess):
            with pytest.raises(ValueError, match=r"backward hook of '1' \(Tanh\). Try"):
                take(data(6, 4), data(6, 3))
    with (
        nn.modules.module.register_module_full_backward_hook(reversing),
        pytest.raises(ValueError, match="backward hook of all modules"),
    ):
        gradient(data(6, 4), data(6, 3))
    assert gradient(data(6, 4), data(6, 3)).isfinite()


@pytest.mark.parametrize("perturb", ["activations", "weights"])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("micro_batch", [2, 6])
def test_hooks_of_activations_are_refused(place, perturb, micro_batch):
    class Clipping(nn.Module):
        """A layer that clips the gradient of its output."""

        def __init__(self):
            super().__init__()
            self.layer = linear(4, 4)

        def forward(self, x):
            h = self.layer(x)
            h.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
            return h

    layers = [linear(4, 4), nn.Tanh(), linear(4, 3)]
    layers[place] = Clipping()
    gradient = ForwardGradient(
        nn.Sequential(*layers), SQUARE, Normal(2), perturb=perturb, micro_batch=micro_batch
    )
    with pytest.raises(RuntimeError, match=r"`register_hook` should be called on parameters"):
        gradient(data(6, 4), data(6, 3))


def test_hooks_of_activations_in_a_function_are_refused():
    def function(x):
        y = x * 2
        y.register_hook(lambda g: -g)
        return y.sum()

    with pytest.raises(RuntimeError, match=r"`register_hook` should be called on parameters"):
        forward_gradient(function, data(4))


# Nothing is perturbed before the output.


@pytest.mark.parametrize("micro_batch", [2, 6])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("aggregator", [Projection(), Mean()], ids=repr)
@pytest.mark.parametrize("source", [Normal(3), *STATEFUL, OwnValue()], ids=repr)
@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
def test_an_exact_output_of_a_single_site(kind, source, aggregator, recompute, micro_batch):
    """A frozen trunk: the gradient of its head is the loss's own."""
    model = nn.Sequential(linear(4, 5), nn.Tanh(), linear(5, 3))
    model[0].requires_grad_(False)
    CLASSES(model(data(6, 4)), LABELS).backward()
    expected = gradients(model)
    perturb = Activations(output="exact", recompute=recompute)
    gradient = kind(
        model, CLASSES, Normal(2) + source, aggregator, perturb, micro_batch=micro_batch
    )
    for _ in range(2):
        gradient(data(6, 4), LABELS)
        assert relative_error(gradients(model), expected) <= 1e-9
    assert gradient.diagnostics.jvps.shape == (2 + source.num_tangents, 6)
    assert gradient.assess(data(6, 4), LABELS).cosine == pytest.approx(1)
    model[0].requires_grad_(True)
    assert gradient(data(6, 4), LABELS).isfinite()
