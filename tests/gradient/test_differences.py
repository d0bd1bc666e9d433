"""Gradients from finite differences, beside those of forward mode."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from models_for_tests import (
    DEVICE,
    MODELS,
    Model,
    OfParts,
    build,
    data,
    gradients,
    linears,
    relative_error,
)
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
    VerificationError,
    Weights,
)
from multitangent.aggregation import Sum
from multitangent.gradient import DifferenceGradient, mezo
from multitangent.tangents import RunningMean, ScaledByRMS, Sphere, StandardBasis
from pairwise import pairwise

LOSS = nn.CrossEntropyLoss()


class Tied(nn.Module):
    """An embedding whose weights are those of the output too."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(3, 4)
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, 3, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, x):
        return self.out(torch.tanh(self.hidden(self.embedding(x)).mean(1)))


def recurrent():
    return OfParts(
        lambda parts, x: parts[1](parts[0](x)[0][:, -1]),
        nn.LSTM(5, 4, batch_first=True),
        nn.Linear(4, 3),
    )


OTHERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
        lambda: data(6, 5),
    ),
    "dropout inside": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 2), nn.Dropout1d(0.4), nn.Flatten(), nn.Linear(12, 3)
        ),
        lambda: data(6, 2, 5),
    ),
    "tied": (Tied, lambda: torch.arange(24).view(6, 4) % 3),
    "recurrent": (recurrent, lambda: data(6, 4, 5)),
    "noise": (
        lambda: Model(
            lambda m, x: m.parts[1](m.parts[0](x) + 0.1 * torch.randn_like(x[:, :1])),
            *linears((5, 6), (6, 3)),
        ),
        lambda: data(6, 5),
    ),
}


def prepared(name):
    if name in MODELS:
        return build(name)[:3]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = OTHERS[name][0]().double(), OTHERS[name][1]()
    return model.to(DEVICE), x.to(DEVICE), torch.tensor([0, 1, 2, 0, 1, 1], device=DEVICE)


SOURCES = [
    Normal(4),
    Rademacher(3),
    Sphere(2),
    StandardBasis(5),
    Normal(2) + RunningMean(),
    ScaledByRMS(Normal(3)) + OwnValue(),
]
PERTURBATIONS = [
    Weights(),
    Activations(),
    Activations(share="sample"),
    Activations(share="sample", output="exact", recompute=True),
]
TABLE = pairwise(
    [*MODELS, *OTHERS],
    PERTURBATIONS,
    SOURCES,
    [Mean(), Projection(), Sum()],
    [{}, {"micro_batch": 2}, {"store_tangents": False}],
)


@pytest.mark.parametrize(("name", "perturb", "source", "aggregator", "options"), TABLE)
def test_equals_forward_mode(name, perturb, source, aggregator, options):
    model, x, y = prepared(name)
    other = copy.deepcopy(model)
    if name == "recurrent" and getattr(perturb, "recompute", False):
        perturb = Activations(share="sample", output="exact")
    one = DifferenceGradient(model, LOSS, source, aggregator, perturb, **options)
    two = ForwardGradient(other, LOSS, source, aggregator, perturb)
    for _ in range(2):  # the second step has other tangents, and guesses
        torch.testing.assert_close(one(x, y), two(x, y), rtol=1e-12, atol=1e-12)
        assert relative_error(gradients(model), gradients(other)) <= 1e-6
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name])


@pytest.mark.parametrize("source", [Normal(3) + Feedback(2), Normal(2) + LocalLoss() + OwnValue()])
def test_guesses_learn_from_differences(source):
    """They get the differences of the output, and are of other lengths than random tangents."""
    model, x, y, _ = build("mlp")
    perturb = Activations(share="sample", output="exact")
    arguments = (model, LOSS, source, ControlVariate(), perturb)
    one, two = DifferenceGradient(*arguments), ForwardGradient(*arguments)
    for _ in range(4):
        one(x, y)
        found = gradients(model)
        two(x, y)
        assert relative_error(found, gradients(model)) <= 1e-6


def test_a_step_to_either_side_is_as_long_for_every_guess():
    """A tangent of length 1e-6 is no worse than one of length 1."""
    model, x, y, _ = build("mlp")
    source = Normal(2) + RunningMean(decay=0.0)
    errors = []
    for scale in (1.0, 1e-8):
        loss = Scaled(scale)
        one, two = (
            kind(model, loss, source, Projection(), "weights")
            for kind in (DifferenceGradient, ForwardGradient)
        )
        for _ in range(2):
            one(x, y)
            found = gradients(model)
            two(x, y)
            expected = gradients(model)
        errors.append(relative_error(found, expected))
    assert max(errors) <= 1e-6


class Scaled(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, output, target):
        return self.scale * nn.functional.cross_entropy(output, target, reduction="none")


@pytest.mark.parametrize("store_tangents", [True, False])
def test_coupled_statistics_are_those_of_backpropagation(store_tangents):
    model, x, y = prepared("batch norm")
    n = sum(p.numel() for p in model.parameters())
    LOSS(copy.deepcopy(model).train()(x), y)
    other = copy.deepcopy(model)
    LOSS(other(x), y).backward()
    DifferenceGradient(
        model, LOSS, StandardBasis(n), perturb="weights", statistics="coupled",
        store_tangents=store_tangents,
    )(x, y)  # fmt: skip
    assert relative_error(gradients(model), gradients(other)) <= 1e-6
    for name, buffer in model.named_buffers():  # they change once
        torch.testing.assert_close(buffer, dict(other.named_buffers())[name])


@pytest.mark.parametrize("name", ["mlp", "dropout", "batch norm", "recurrent", "tied"])
@pytest.mark.parametrize("perturb", ["weights", "activations"])
def test_parameters_are_never_written_into(name, perturb):
    model, x, y = prepared(name)
    before = {n: (p, p.detach().clone(), p._version) for n, p in model.named_parameters()}
    stores = [vars(module)["_parameters"] for module in model.modules()]
    DifferenceGradient(model, LOSS, Normal(3), perturb=perturb)(x, y)
    mine = [vars(module)["_parameters"] for module in model.modules()]
    assert all(a is b for a, b in zip(stores, mine, strict=True))
    for n, parameter in model.named_parameters():
        same, value, version = before[n]
        assert parameter is same and parameter._version == version
        assert torch.equal(parameter, value)


@pytest.mark.parametrize("perturb", ["weights", "activations"])
@pytest.mark.parametrize("failing", [2, 3, 4])
def test_everything_is_as_before_after_an_error_in_the_loss(perturb, failing):
    model, x, y = prepared("batch norm")
    calls = 0

    def loss(output, target):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise RuntimeError("no loss today")
        return nn.functional.cross_entropy(output, target, reduction="none")

    gradient = DifferenceGradient(model, loss, Normal(2), perturb=perturb, verify=False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    parameters = [*model.parameters()]
    with pytest.raises(RuntimeError, match="no loss today"):
        gradient(x, y)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    gradient(x, y)  # goes on


def wrong(output, target):
    return output.argmax(1) != target


def wrong_in_numpy(output, target):
    answers = np.asarray(output.tolist()).argmax(1)
    return float(np.mean(answers != np.asarray(target.tolist())))


@torch.no_grad()
def wrong_for_the_batch(output, target):
    return (output.argmax(1) != target).double().mean()


@pytest.mark.parametrize("loss", [wrong, wrong_in_numpy, wrong_for_the_batch])
@pytest.mark.parametrize("options", [{}, {"primal_run": False, "store_tangents": False}])
def test_an_accuracy_can_be_trained_on(loss, options):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2), torch.randn(200, 4)
    y = (x[:, 0] > x[:, 1]).long()
    gradient = DifferenceGradient(
        model, loss, Normal(8), Mean(), "weights", epsilon=0.2, **options
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    before = float(wrong(model(x), y).float().mean())
    value = gradient(x, y)
    torch.testing.assert_close(float(value), before)
    for _ in range(60):
        optimizer.zero_grad()
        gradient(x, y)
        optimizer.step()
    after = float(wrong(model(x), y).float().mean())
    assert after < 0.1 < 0.3 < before


def test_a_loss_of_the_batch_gives_what_its_samples_give():
    model, x, y, _ = build("mlp")
    found = []
    for loss in (LOSS, lambda output, target: nn.functional.cross_entropy(output, target)):
        value = DifferenceGradient(model, loss, Normal(3), perturb="weights")(x, y)
        found.append([value, *gradients(model)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_a_loss_of_the_batch_is_not_one_of_its_parts():
    """The root of a mean: the batch is not split."""
    model, x, y, _ = build("mlp")

    def loss(output, target):
        return nn.functional.cross_entropy(output, target).sqrt()

    expected = DifferenceGradient(model, loss, Normal(3), perturb="weights")(x, y), gradients(model)
    parts = DifferenceGradient(model, loss, Normal(3), perturb="weights", micro_batch=2)
    value = parts(x, y)
    torch.testing.assert_close(value, expected[0])
    assert relative_error(gradients(model), expected[1]) <= 1e-6


def test_a_loss_of_the_batch_is_refused_for_activations():
    model, x, y, _ = build("mlp")
    with pytest.raises(ValueError, match="`loss` should return one number per sample"):
        DifferenceGradient(model, nn.functional.cross_entropy)(x, y)


class Square(torch.autograd.Function):
    """A kernel with a backward that PyTorch can not differentiate, and no forward derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.from_numpy(np.square(x.detach().numpy()))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


@torch.library.custom_op("multitangent_tests::cube", mutates_args=())
def cube(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """An operator without any derivative, which reads memory by itself."""
    return torch.from_numpy(x.numpy() ** 3 @ weight.numpy().T)


def memory_of(weight):
    """The numbers of a tensor, read without a function that anybody could follow."""
    return torch.utils.dlpack.from_dlpack(torch._C._to_dlpack(weight))


class Kernels(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.first, self.second = linears((5, 6), (6, 3))
        self.function = function

    def forward(self, x):
        return self.function(self, x)


def with_square(model, x):
    return model.second(Square.apply(model.first(x)))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="its kernel is one of NumPy")
@pytest.mark.parametrize("perturb", ["weights", "activations"])
def test_a_kernel_without_a_forward_derivative_is_trained(perturb):
    model, x, y = Kernels(with_square), data(6, 5), torch.tensor([0, 1, 2, 0, 1, 1])
    with pytest.raises(NotImplementedError, match="should be linear in the gradient"):
        ForwardGradient(model, LOSS, Normal(3), verify=False)(x, y)
    LOSS(model(x), y).backward()
    expected = gradients(model)
    n = 9 if perturb == "activations" else sum(p.numel() for p in model.parameters())
    DifferenceGradient(model, LOSS, StandardBasis(n), perturb=perturb)(x, y)
    assert relative_error(gradients(model), expected) <= 1e-6


@pytest.mark.skipif(DEVICE.type != "cpu", reason="its kernel is one of NumPy")
def test_an_operator_that_reads_memory_by_itself_sees_displaced_weights():
    """The last one reaches for the weight's memory behind the back of PyTorch's functions."""
    y = torch.tensor([0, 1, 2, 0, 1, 1])
    functions = [
        lambda m, x: torch.ops.multitangent_tests.cube(m.first(x), m.second.weight),
        lambda m, x: torch.from_numpy(
            m.first(x).detach().numpy() ** 3 @ m.second.weight.detach().numpy().T
        ),
        lambda m, x: nn.functional.linear(m.first(x) ** 3, m.second.weight),
        lambda m, x: nn.functional.linear(m.first(x) ** 3, memory_of(m.second.weight)),
    ]
    found = []
    for function in functions:
        model = Kernels(function)
        DifferenceGradient(model, LOSS, Normal(4), Sum(), "weights")(data(6, 5), y)
        found.append(gradients(model))
    model = Kernels(functions[2])
    ForwardGradient(model, LOSS, Normal(4), Sum(), "weights")(data(6, 5), y)
    expected = gradients(model)
    assert all(relative_error(one, expected) <= 1e-6 for one in found)


def test_parameters_that_others_hold_are_displaced_too():
    """A penalty in the loss, a function with a parameter in its closure, a cached list."""
    model, x, y, _ = build("mlp")
    scale = model[1].bias

    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x) * scale.sum()

    def loss(output, target):
        penalty = sum(p.square().sum() for p in model.parameters())
        return nn.functional.cross_entropy(output, target, reduction="none") + penalty

    whole = Closure()
    n = sum(p.numel() for p in whole.parameters())
    loss(whole(x), y).mean().backward()
    expected = gradients(whole)
    DifferenceGradient(whole, loss, StandardBasis(n), perturb="weights")(x, y)
    assert relative_error(gradients(whole), expected) <= 1e-6


def test_the_parameters_of_a_loss_get_their_gradient():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.temperature = nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

        def forward(self, output, target):
            return nn.functional.cross_entropy(output / self.temperature, target, reduction="none")

    found = []
    for kind, options, wrap in (
        (DifferenceGradient, {"primal_run": False}, False),
        (DifferenceGradient, {"primal_run": False}, True),
        (DifferenceGradient, {"micro_batch": 2}, False),
        (ForwardGradient, {}, False),
    ):
        model, x, y, _ = build("mlp")
        module = loss = Tempered()
        if wrap:  # nothing says that this has parameters
            loss = lambda output, target, module=module: module(output, target)  # noqa: E731
        gradient = kind(model, loss, Normal(2), perturb="weights", **options)
        for _ in range(3):
            module.temperature.grad = None
            gradient(x, y)
        found.append(module.temperature.grad)
    for other in found[:-1]:
        torch.testing.assert_close(other, found[-1])


def runs_of(model, gradient, x, y, steps=3):
    counts = []
    handle = model.register_forward_hook(lambda *_: counts.append(1))
    for _ in range(steps):
        counts.clear()
        gradient(x, y)
    handle.remove()
    return len(counts)


def test_a_step_runs_the_model_as_often_as_it_says():
    model, x, y, _ = build("mlp")
    for options, runs in (({}, 9), ({"primal_run": False}, 8)):
        gradient = DifferenceGradient(model, LOSS, Normal(4), perturb="weights", **options)
        assert runs_of(model, gradient, x, y) == runs
    assert runs_of(model, mezo(model, LOSS), x, y) == 2
    noisy, x, y, _ = build("dropout")  # whose masks are drawn once
    assert runs_of(noisy, mezo(noisy, LOSS), x, y) == 3
    assert runs_of(noisy, DifferenceGradient(noisy, LOSS, Normal(4)), x, y) == 9


def test_mezo_takes_the_step_of_its_paper():
    """Algorithm 1 of arXiv:2305.17333, but for where random numbers come from."""
    model, x, y, _ = build("mlp")
    gradient = mezo(model, LOSS, epsilon=1e-3, seed=4)
    gradient(x, y)
    found = gradients(model)
    gradient = ForwardGradient(model, LOSS, Normal(1), Mean(), "weights", seed=4)
    gradient(x, y)
    along = gradients(model)  # z times the derivative along z
    z = [g / float(gradient.diagnostics.jvps) for g in along]
    losses = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        for p, direction in zip(moved.parameters(), z, strict=True):
            p.data.add_(direction, alpha=sign * 1e-3)
        losses.append(LOSS(moved(x), y).detach())
    projected = (losses[0] - losses[1]) / 2e-3
    assert relative_error(found, [projected * direction for direction in z]) <= 1e-9


def test_the_loss_without_a_run_of_its_own_is_that_of_the_neighbours():
    model, x, y, _ = build("mlp")
    gradient = DifferenceGradient(
        model, LOSS, Normal(2), perturb="weights", primal_run=False, epsilon=1e-2
    )
    exact = LOSS(model(x), y).detach()
    torch.testing.assert_close(gradient(x, y), exact)  # the first batch of a kind
    value = gradient(x, y)
    assert (value - exact).abs() > 1e-6
    torch.testing.assert_close(value, exact, rtol=1e-2, atol=0)


def test_the_aggregator_hears_how_precise_differences_are():
    seen = []

    class Listening(Mean):
        def coefficients(self, measured):
            seen.append(measured.precision)
            return super().coefficients(measured)

    model, x, y, _ = build("mlp")
    for kind in (DifferenceGradient, ForwardGradient):
        kind(model, LOSS, Normal(2), Listening(), verify=False)(x, y)
    eps = torch.finfo(torch.float64).eps
    assert seen == [eps ** (2 / 3), eps]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("perturb", ["weights", "activations"])
def test_the_step_to_either_side_suits_the_type(dtype, perturb):
    model, x, y, _ = build("residual", torch.float64)
    ForwardGradient(model, LOSS, Normal(8), Sum(), perturb)(x, y)
    expected = gradients(model)
    model, x = model.to(dtype), x.to(dtype)

    def loss(output, target):
        return nn.functional.cross_entropy(output.float(), target, reduction="none")

    DifferenceGradient(model, loss, Float32Normal(8), Sum(), perturb)(x, y)
    tolerance = 1e-2 if dtype == torch.float32 else 1.0
    assert relative_error([g.double() for g in gradients(model)], expected) <= tolerance


class Float32Normal(Normal):
    """The tangents that float64 has, rounded."""

    def draw(self, request):
        from dataclasses import replace

        return super().draw(replace(request, dtype=torch.float64)).to(request.dtype)

    def draw_one(self, request, k):
        return self.draw(request)[k : k + 1]


class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = linears((5, 4), (4, 3))

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.second(h - h.mean(0))


def test_samples_that_meet_are_noticed_without_backpropagation():
    x, y = data(6, 5), torch.tensor([0, 1, 2, 0, 1, 1])
    with pytest.raises(VerificationError, match="should treat every sample by itself"):
        DifferenceGradient(Centred(), LOSS)(x, y)
    DifferenceGradient(Centred(), LOSS, perturb="weights")(x, y)


def test_runs_that_differ_are_noticed():
    model, x, y, _ = build("mlp")
    count = [0]

    def loss(output, target):
        count[0] += 1
        losses = nn.functional.cross_entropy(output, target, reduction="none")
        return losses * (1 + 1e-8 * count[0])

    for perturb in ("weights", "activations"):
        with pytest.raises(VerificationError, match="same losses whenever they see the same"):
            DifferenceGradient(model, loss, perturb=perturb)(x, y)


def test_local_steps_are_compared_where_there_is_a_derivative():
    class Wrong(Activations):
        def bind(self, objective):
            bound = super().bind(objective)

            def run_of(*args):
                run = bound(*args)
                pullback = run.pullback
                run.pullback = lambda g: {p: 2 * d for p, d in pullback(g).items()}
                return run

            return run_of

    model, x, y, _ = build("mlp")
    with pytest.raises(VerificationError, match="The local steps should give the gradients"):
        DifferenceGradient(model, LOSS, perturb=Wrong())(x, y)
    DifferenceGradient(model, wrong, perturb=Wrong())(x, y)  # there is nothing to compare with


def test_what_a_step_leaves_in_modules_is_compared():
    class Counting(nn.Module):
        """It counts in an object that nobody puts back, and keeps the count where it is seen."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 3).double()
            self.register_buffer("seen", torch.zeros(()))
            self.hidden = iter(range(10**6))

        def forward(self, x):
            self.seen.fill_(float(next(self.hidden)))
            return self.layer(x)

    _, x, y, _ = build("mlp")
    for perturb in ("weights", "activations"):
        with pytest.raises(VerificationError, match=r"leave in modules what one run .* seen"):
            DifferenceGradient(Counting(), LOSS, Normal(2), perturb=perturb)(x, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epsilon": 0.0}, "`epsilon` should be above 0"),
        ({"epsilon": "small"}, "`epsilon` should be above 0"),
        ({"statistics": "none"}, "`statistics` should be 'frozen' or 'coupled'"),
        ({"statistics": "coupled"}, "`statistics` should be 'frozen' unless weights"),
        ({"compile": True}, "`compile` should be False"),
    ],
)
def test_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DifferenceGradient(nn.Linear(2, 2), LOSS, **options)


def test_repr_names_what_is_no_default():
    gradient = DifferenceGradient(nn.Linear(2, 2), LOSS, Normal(2), epsilon=0.5, primal_run=False)
    assert "epsilon=0.5, primal_run=False)" in repr(gradient)
    assert "epsilon" not in repr(DifferenceGradient(nn.Linear(2, 2), LOSS))
