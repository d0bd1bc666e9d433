"""Ordinary code of models that once gave a wrong gradient without a word, kind by kind."""

from __future__ import annotations

import copy
from collections import UserDict
from types import MappingProxyType

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models_for_tests import Model, data, gradients, linear, relative_error
from multitangent import (
    Activations,
    Feedback,
    ForwardGradient,
    Normal,
    Projection,
    SimulatedGradient,
    forward_gradient,
)
from multitangent.dual import DualTensor
from multitangent.tangents import RunningMean, StandardBasis

DTYPE = torch.float64
SQUARE = nn.MSELoss()


def assert_right(model, x, y, loss=SQUARE, perturb="activations", n=200, **options):
    """The gradient of as many tangents as there are dimensions is that of backpropagation."""
    loss(model(x), y).backward()
    expected = gradients(model)
    gradient = ForwardGradient(model, loss, StandardBasis(n), Projection(), perturb, **options)
    gradient(x, y)
    assert relative_error(gradients(model), expected) <= 1e-9


BOTH = pytest.mark.parametrize("perturb", ["activations", "weights"])


@BOTH
def test_a_module_under_several_names_keeps_its_parameters(perturb):
    layer = linear(4, 4)
    model = Model(lambda m, x: m.parts[0](torch.tanh(m.parts[1](x))), layer, layer, layer)
    weight = layer.weight
    assert_right(model, data(5, 4), data(5, 4), perturb=perturb)
    assert layer.weight is weight
    assert type(model(data(5, 4))) is torch.Tensor
    assert [name for name, _ in model.named_parameters()] == ["parts.0.weight", "parts.0.bias"]


def test_nothing_of_a_step_stays_in_a_recurrent_layer():
    model = Model(
        lambda m, x: m.parts[1](m.parts[0](x)[0][:, -1]),
        nn.GRU(3, 4, batch_first=True).double(),
        linear(4, 2),
    )
    x, y = data(5, 6, 3), data(5, 2)
    SQUARE(model(x), y).backward()
    expected = gradients(model)
    ForwardGradient(model, SQUARE, StandardBasis(200), perturb="weights")(x, y)
    assert relative_error(gradients(model), expected) <= 1e-9
    kept = [
        value for module in model.modules() for value in module.__dict__.get("_flat_weights", [])
    ]
    assert len(kept) == 4
    assert not any(isinstance(value, DualTensor) for value in kept)


def test_an_error_in_the_middle_leaves_the_model_as_it_was():
    def fail(m, x):
        m.parts[0](x)
        raise KeyError("in the model")

    model = Model(fail, linear(4, 4))
    with pytest.raises(KeyError, match="in the model"):
        ForwardGradient(model, SQUARE, StandardBasis(2), perturb="weights", micro_batch=1)(
            data(5, 4), data(5, 4)
        )
    assert type(model.parts[0].weight) is nn.Parameter


def halved(m, x):
    h = m.parts[0](x)
    with torch.no_grad():
        s = 2 * h
    return m.parts[1](h * s)


def frozen_by_name(m, x):
    h = m.parts[0](x)
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    s = h.exp()
    torch.set_grad_enabled(before)
    return m.parts[1](h * s)


def decorated(m, x):
    @torch.no_grad()
    def scale(h):
        return h.square().mean(1, keepdim=True)

    h = m.parts[0](x)
    return m.parts[1](h / (1 + scale(h)))


def written_in_place(m, x):
    h = m.parts[0](x) * 1
    with torch.no_grad():
        h.mul_(3)
    return m.parts[1](h)


def target_network(m, x):
    with torch.no_grad():
        target = m.parts[1](m.parts[0](x))
    return m.parts[1](torch.tanh(m.parts[0](x))) * target


def with_attention(m, x):
    h = m.parts[0](x).unsqueeze(1)
    with torch.no_grad():
        s = nn.functional.scaled_dot_product_attention(h, h, h)
    return m.parts[1]((h * s).squeeze(1))


NO_GRAD = [halved, frozen_by_name, decorated, written_in_place, target_network, with_attention]


@BOTH
@pytest.mark.parametrize("micro_batch", ["auto", 2])
@pytest.mark.parametrize("function", NO_GRAD)
def test_gradients_that_the_model_switches_off_do_not_pass(function, perturb, micro_batch):
    model = Model(function, linear(3, 4), linear(4, 2))
    assert_right(model, data(5, 3), data(5, 2), perturb=perturb, micro_batch=micro_batch)


def test_gradients_switched_off_are_back_on_behind_a_recomputed_layer():
    inner = Model(halved, linear(3, 4), linear(4, 4))
    model = nn.Sequential(inner, nn.Tanh(), linear(4, 2))
    perturb = Activations(recompute=True, output="exact")
    assert_right(model, data(5, 3), data(5, 2), perturb=perturb)


def test_gradients_that_the_loss_switches_off_do_not_pass():
    def loss(output, target):
        with torch.no_grad():
            weight = (output - target).abs().mean(1)
        return weight * (output - target).square().sum(1)

    model, x, y = Model(lambda m, x: m.parts[0](x), linear(3, 2)), data(5, 3), data(5, 2)
    loss(model(x), y).mean().backward()
    expected = gradients(model)
    ForwardGradient(model, loss, StandardBasis(8))(x, y)
    assert relative_error(gradients(model), expected) <= 1e-9


def test_a_plain_function_may_switch_gradients_off():
    def f(x):
        with torch.no_grad():
            s = x * 1
        return (s * x).sum()

    x = torch.tensor([1.0, 2.0, 3.0])
    _, gradient = forward_gradient(f, x, StandardBasis(3), Projection())
    torch.testing.assert_close(gradient, x)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Rounded(torch.autograd.Function):
    """Straight through, with a context set up apart."""

    @staticmethod
    def forward(x):
        return x.round()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Spike(torch.autograd.Function):
    """A step with the slope of a sigmoid."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return gradient * s * (1 - s)


class Mixed(torch.autograd.Function):
    """Two tensors and a number in, two tensors and a mask out."""

    @staticmethod
    def forward(ctx, x, w, scale):
        ctx.save_for_backward(x, w)
        ctx.scale = scale
        mask = x > 0
        ctx.mark_non_differentiable(mask)
        return x @ w * scale, x.sum(1), mask

    @staticmethod
    def backward(ctx, product, total, mask):
        x, w = ctx.saved_tensors
        return (product @ w.T + total[:, None]) * ctx.scale, x.T @ product, None


class Doubled(torch.autograd.Function):
    """In place."""

    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient  # unlike what the forward says


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, gradient):
        return gradient.clamp(-1e-3, 1e-3)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return 2 * gradient


def custom(apply):
    return lambda m, x: m.parts[1](apply(m.parts[0](x) * 1))


def mixed(m, x):
    product, total, mask = Mixed.apply(m.parts[0](x), m.parts[1].weight.T, 0.5)
    return product * total[:, None] + mask[:, :1]


CUSTOM = [custom(Reversed.apply), custom(Rounded.apply), custom(Spike.apply), custom(Doubled.apply)]


@BOTH
@pytest.mark.parametrize("micro_batch", ["auto", 2])
@pytest.mark.parametrize("function", CUSTOM, ids=["reversed", "rounded", "spike", "in place"])
def test_a_backward_of_ones_own_is_what_counts(function, perturb, micro_batch):
    model = Model(function, linear(3, 4), linear(4, 2))
    x = 3 * data(5, 3)
    assert_right(model, x, data(5, 2), perturb=perturb, micro_batch=micro_batch)
    assert torch.autograd.function._SingleLevelFunction.__dict__.get("apply") is None


def test_several_tensors_in_and_out_of_a_function_of_ones_own():
    model = Model(mixed, linear(3, 4), linear(4, 2, bias=False))
    assert_right(model, data(5, 3), data(5, 2), perturb="weights")


@pytest.mark.parametrize("function", [Clipped, Once])
def test_a_backward_that_says_nothing_of_tangents_is_refused(function):
    model = Model(custom(function.apply), linear(3, 4), linear(4, 2))
    with pytest.raises(NotImplementedError, match=f"backward of {function.__name__} should be"):
        ForwardGradient(model, SQUARE, StandardBasis(2))(data(5, 3), data(5, 2))


def test_parameters_that_were_replaced_are_found():
    model = Model(lambda m, x: m.parts[1](torch.tanh(m.parts[0](x))), linear(3, 4), linear(4, 2))
    gradient = ForwardGradient(model, SQUARE, StandardBasis(20))
    x, y = data(5, 3), data(5, 2)
    gradient(x, y)
    state = {name: 2 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.parts[1] = nn.Linear(4, 2, dtype=DTYPE)
    model.zero_grad()
    value = gradient(x, y)
    torch.testing.assert_close(value, SQUARE(model(x), y).detach())
    estimate = gradients(model)
    SQUARE(model(x), y).backward()
    assert relative_error(estimate, gradients(model)) <= 1e-9


@BOTH
def test_hooks_of_parameters_run(perturb):
    model = Model(lambda m, x: m.parts[0](x), linear(3, 2))
    weight, bias = model.parts[0].weight, model.parts[0].bias
    seen = []
    weight.register_hook(lambda g: 2 * g)
    bias.register_hook(lambda g: seen.append(g.clone()))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    x, y = data(5, 3), data(5, 2)
    for take in (
        lambda: SQUARE(model(x), y).backward(),
        lambda: ForwardGradient(model, SQUARE, StandardBasis(20), perturb=perturb)(x, y),
    ):
        weight.grad = torch.ones_like(weight)
        bias.grad = None
        take()
        seen.append(weight.grad)
    assert len(seen) == 6
    expected, estimated = (sorted(s, key=torch.Tensor.numel) for s in (seen[:3], seen[3:]))
    for one, other in zip(expected, estimated, strict=True):
        torch.testing.assert_close(one, other)


RANDOM = [
    lambda h: h.normal_(),
    lambda h: torch.empty_like(h).normal_(),
    lambda h: h.new(h.size()).uniform_(),
    lambda h: h.bernoulli_(0.5),
    lambda h: nn.init.normal_(h),
]


@pytest.mark.parametrize("fill", RANDOM)
def test_random_numbers_that_fill_a_tensor_replace_what_was_there(fill):
    """The loss does not depend on what was there, and has the size of fresh numbers."""

    def noisy(m, x):
        h = m.parts[0](x)
        return m.parts[1](h * fill(1e9 * h))

    model = Model(noisy, linear(3, 4), linear(4, 2))
    gradient = ForwardGradient(model, SQUARE, StandardBasis(100))
    estimate = gradient.assess(data(5, 3), data(5, 2))
    assert estimate.cosine > 1 - 1e-9
    assert gradient(data(5, 3), data(5, 2)) < 1e3


def test_the_mean_of_weighted_losses_is_not_their_weighted_mean():
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=DTYPE)
    loss = nn.CrossEntropyLoss(weight=weight, reduction="none")
    model, x, y = (
        Model(lambda m, x: m.parts[0](x), linear(4, 3)),
        data(6, 4),
        torch.arange(6) % 3,
    )
    loss(model(x), y).mean().backward()
    expected = gradients(model)
    value = ForwardGradient(model, loss, StandardBasis(10))(x, y)
    torch.testing.assert_close(value, loss(model(x), y).mean().detach())
    assert relative_error(gradients(model), expected) <= 1e-9


@pytest.mark.parametrize("source", [Normal(2), Normal(2) + Feedback()], ids=repr)
def test_one_sample_has_no_statistics_of_a_batch(source):
    model = nn.Sequential(linear(3, 4), nn.BatchNorm1d(4, dtype=DTYPE), linear(4, 2))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ForwardGradient(model, SQUARE, source)(data(1, 3), data(1, 2))


def test_a_model_that_adds_up_gradients_of_processes_is_refused():
    model = nn.DataParallel(linear(3, 2))
    with pytest.raises(TypeError, match=r"`model` should be the module itself.*model\.module"):
        ForwardGradient(nn.Sequential(model), SQUARE)


class Scalar(nn.Module):
    def forward(self, output, target):
        return (output - target).square().mean()


def test_a_loss_module_that_returns_a_scalar_is_refused_clearly():
    with pytest.raises(ValueError, match="one number per sample"):
        ForwardGradient(linear(3, 2), Scalar(), StandardBasis(2))(data(5, 3), data(5, 2))


def test_a_batch_without_a_label_that_counts_is_refused_clearly():
    loss = nn.CrossEntropyLoss(ignore_index=1)
    with pytest.raises(ValueError, match="labels are all ignored"):
        ForwardGradient(linear(3, 2), loss, StandardBasis(2))(data(4, 3), torch.ones(4).long())


@pytest.mark.parametrize("kind", [UserDict, MappingProxyType, dict])
@pytest.mark.parametrize("micro_batch", [2, "auto"])
def test_any_mapping_is_split(kind, micro_batch):
    """As a tokenizer returns one that is no dictionary."""

    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear(3, 2)

        def forward(self, x, scale):
            return self.layer(x) * scale

    model, y = TwoInputs(), data(5, 2)
    inputs = {"x": data(5, 3), "scale": data(5, 1)}
    SQUARE(model(**inputs), y).backward()
    expected = gradients(model)
    source = StandardBasis(10)
    ForwardGradient(model, SQUARE, source, micro_batch=micro_batch)(kind(inputs), y)
    assert relative_error(gradients(model), expected) <= 1e-9


def test_the_state_of_other_tangents_is_refused():
    model = linear(3, 2)
    state = ForwardGradient(model, SQUARE, Normal(2) + Feedback()).state_dict()
    with pytest.raises(ValueError, match=r"with the tangents Normal\(num_tangents=2\)"):
        ForwardGradient(model, SQUARE, Normal(2)).load_state_dict(state)


def test_hooks_that_change_gradients_teach_a_source_nothing():
    learned = []
    for hook in (None, lambda p: p.grad.zero_()):
        model = linear(3, 2)
        if hook is not None:
            model.weight.register_post_accumulate_grad_hook(hook)
        source = Normal(2) + RunningMean(decay=0.0)
        gradient = ForwardGradient(model, SQUARE, source, perturb="weights")
        gradient(data(5, 3), data(5, 2))
        learned.append(gradient.state_dict()["tangents"]["1"]["means"]["weight"])
    assert learned[0].any()
    torch.testing.assert_close(*learned)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@BOTH
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_parts_run_as_they_are(perturb, reentrant):
    def checkpointed(m, x):
        h = m.parts[0](x)
        return m.parts[1](checkpoint(lambda h: torch.tanh(h) * h, h, use_reentrant=reentrant))

    model = Model(checkpointed, linear(3, 4), linear(4, 2))
    assert_right(model, data(5, 3), data(5, 2), perturb=perturb)


def test_the_oracle_holds_statistics_of_functions_constant_too():
    """Batch normalisation by a function, weights perturbed: as the forward sweep has it."""

    def normalized(m, x):
        h = nn.functional.batch_norm(m.parts[0](x), None, None, training=True)
        return m.parts[1](torch.tanh(h))

    estimates = []
    for kind in (ForwardGradient, SimulatedGradient):
        model = Model(normalized, linear(3, 4), linear(4, 2))
        kind(model, SQUARE, Normal(3), perturb="weights", micro_batch=8)(data(8, 3), data(8, 2))
        estimates.append(gradients(model))
    assert relative_error(*estimates) <= 1e-9


@pytest.mark.parametrize("statistics", ["frozen", "coupled"])
def test_the_oracle_updates_running_averages_once(statistics):
    layers = (nn.InstanceNorm1d(4, track_running_stats=True, dtype=DTYPE),)
    model = Model(
        lambda m, x: m.parts[1](m.parts[2](m.parts[0](x)).mean(2)),
        nn.Conv1d(3, 4, 1).double(),
        linear(4, 2),
        *layers,
    )
    x = data(5, 3, 6)
    expected = copy.deepcopy(model)
    expected(x)
    SimulatedGradient(model, SQUARE, Normal(2), perturb="weights", statistics=statistics)(
        x, data(5, 2)
    )
    torch.testing.assert_close(model.parts[2].running_mean, expected.parts[2].running_mean)
