"""Models that run differently each time, or whose samples meet: right, or refused clearly."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models_for_tests import OfParts, data, gradients, linears, relative_error
from multitangent import Activations, ForwardGradient, Projection, VerificationError
from multitangent.tangents import StandardBasis

DTYPE = torch.float64
SQUARE = nn.MSELoss()
BOTH = pytest.mark.parametrize("perturb", ["activations", "weights"])


def two(function):
    return lambda: OfParts(function, *linears((3, 4), (4, 4)))


def assert_right(model, x, y, loss=SQUARE, perturb="activations", extra=(), **options):
    """The gradient of as many tangents as there are dimensions is that of backpropagation."""
    parameters = [*[p for p in model.parameters() if p.requires_grad], *extra]
    value = loss(model(x), y)
    (value.mean() if value.ndim else value).backward()
    expected = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    ForwardGradient(model, loss, StandardBasis(300), Projection(), perturb, **options)(x, y)
    assert relative_error([p.grad for p in parameters], expected) <= 1e-9


# Random numbers: those of a part are rows of those of the whole.


def dropped_path(parts, x):
    h = torch.tanh(parts[0](x))
    return parts[1](h * h.new_empty((len(h), 1)).bernoulli_(0.5).div_(0.5))


def time_first(parts, x):
    h = parts[0](x)[None].expand(8, -1, -1)  # T = B = 8
    return parts[1](F.dropout(h, 0.5).mean(0))


RANDOM = {
    "rand": lambda p, x: p[1](p[0](x) * torch.rand(len(x), 1, dtype=DTYPE)),
    "randn_like": lambda p, x: p[1](p[0](x) * torch.randn_like(p[0](x))),
    "one number for all": lambda p, x: p[1](p[0](x) * torch.rand([], dtype=DTYPE)),
    "bernoulli": lambda p, x: p[1](p[0](x) * torch.full((len(x), 4), 0.5, dtype=DTYPE).bernoulli()),
    "stochastic depth": dropped_path,
    "rsample": lambda p, x: p[1](p[0](x) + torch.normal(torch.zeros_like(x[:, :1]), 1.0)),
    "gumbel": lambda p, x: p[1](F.gumbel_softmax(p[0](x))),
    "hard gumbel": lambda p, x: p[1](F.gumbel_softmax(p[0](x), hard=True)),
    "alpha dropout": lambda p, x: p[1](F.alpha_dropout(p[0](x), 0.3, True)),
    "feature alpha": lambda p, x: p[1](F.feature_alpha_dropout(p[0](x)[None], 0.3, True)[0]),
    "rrelu": lambda p, x: p[1](F.rrelu(p[0](x), training=True)),
    "second axis": time_first,
    "Python's": lambda p, x: p[1](p[0](x)) * random.random(),
    "a generator": lambda p, x: p[1](
        p[0](x) * torch.rand(len(x), 1, dtype=DTYPE, generator=torch.Generator().manual_seed(3))
    ),
}  # fmt: skip


def taken(make, micro_batch, perturb, steps=1, loss=SQUARE, x=None):
    """Gradients, buffers and loss after some steps."""
    random.seed(0)
    model = make()
    gradient = ForwardGradient(
        model, loss, StandardBasis(300), perturb=perturb, micro_batch=micro_batch
    )
    for _ in range(steps):
        value = gradient(data(8, 3) if x is None else x.clone(), data(8, 4))
    return [*gradients(model), *[b.clone().double() for b in model.buffers()], value]


@BOTH
@pytest.mark.parametrize("name", RANDOM)
def test_random_numbers_do_not_depend_on_the_split(name, perturb):
    whole = taken(two(RANDOM[name]), 8, perturb)
    assert relative_error(taken(two(RANDOM[name]), 3, perturb), whole) <= 1e-12


# What modules keep from run to run changes once a step.


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.runs, self.seen = linears((3, 4))[0], 0, []
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.runs += 1
        self.count += 1
        self.seen.append(len(x))
        return self.layer(x) / self.runs / self.count / len(self.seen)


class FirstBatch(nn.Module):
    """Chooses a shift by the first batch, in a buffer."""

    def __init__(self):
        super().__init__()
        self.layer, self.chosen = linears((3, 4))[0], False
        self.register_buffer("shift", torch.zeros(4, dtype=DTYPE))

    def forward(self, x):
        h = self.layer(x)
        if not self.chosen:
            with torch.no_grad():
                self.shift.copy_(-h.mean(0))
            self.chosen = True
        return h + self.shift


class RunningNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linears((3, 4))[0]
        self.norm = nn.InstanceNorm1d(4, track_running_stats=True, dtype=DTYPE)

    def forward(self, x):
        h = self.layer(x)
        return h * self.norm(h[:, :, None] * torch.arange(1, 4)).amax(2)


class Recurrent(nn.Module):
    """Keeps its last output, without its derivative or with it."""

    def __init__(self, detached):
        super().__init__()
        self.layer, self.kept, self.detached = linears((3, 4))[0], None, detached

    def forward(self, x):
        h = torch.tanh(self.layer(x) if self.kept is None else self.layer(x) + self.kept)
        self.kept = h.detach() if self.detached else h
        return h


class Caching(nn.Module):
    """Writes into the first rows of a buffer, as many as there are samples."""

    def __init__(self):
        super().__init__()
        self.layer = linears((3, 4))[0]
        self.register_buffer("rows", torch.zeros(9, 4, dtype=DTYPE))

    def forward(self, x):
        self.rows.detach_()
        h = self.layer(x)
        self.rows[: len(x)] = h.detach()
        return h.tanh()


STATES = {
    "cache": Caching,
    "counters": Counting,
    "first batch": FirstBatch,
    "running averages": RunningNorm,
    "kept output": lambda: Recurrent(True),
    "kept output with derivative": lambda: Recurrent(False),
    "writes into its input": two(lambda p, x: p[1](p[0](x.add_(1.0)))),
}


@BOTH
@pytest.mark.parametrize("micro_batch", [8, 3, "auto"])
@pytest.mark.parametrize("name", STATES)
@pytest.mark.filterwarnings("ignore:micro_batch=3 splits what belongs together")
def test_what_modules_keep_changes_once_a_step(name, perturb, micro_batch):
    if name == "writes into its input" and micro_batch == 3:
        with pytest.raises(RuntimeError, match="should leave its input as it is"):
            taken(STATES[name], micro_batch, perturb)
        return
    model = STATES["kept output"]() if "derivative" in name else STATES[name]()
    for _ in range(3):
        loss = SQUARE(model(data(8, 3)), data(8, 4))
        loss.backward()
    expected = [*gradients(model), *[b.clone().double() for b in model.buffers()], loss.detach()]
    assert relative_error(taken(STATES[name], micro_batch, perturb, steps=3), expected) <= 1e-9


def test_a_model_holds_ordinary_tensors_after_a_step():
    model = Recurrent(detached=False)
    ForwardGradient(model, SQUARE)(data(8, 3), data(8, 4))
    assert type(model.kept) is torch.Tensor
    assert not model.kept.requires_grad


def test_a_tensor_kept_elsewhere_is_refused_in_the_next_step():
    kept = []

    def run(parts, x):
        earlier = [h for h in kept if len(h) == len(x)]
        kept.append(parts[0](x))
        return parts[1](kept[-1] + earlier[0] if earlier else kept[-1])

    gradient = ForwardGradient(two(run)(), SQUARE, micro_batch=8, verify=False)
    gradient(data(8, 3), data(8, 4))
    with pytest.raises(RuntimeError, match=r"tangents of an earlier run.*Try `\.detach\(\)`"):
        gradient(data(8, 3), data(8, 4))


@pytest.mark.parametrize("error", [AssertionError, KeyError, ZeroDivisionError])
def test_a_model_for_batches_of_one_size(error):
    def run(parts, x):
        if len(x) != 8:
            raise error("size")
        return parts[1](torch.tanh(parts[0](x)))

    assert_right(two(run)(), data(8, 3), data(8, 4))


# Samples that meet.


def centred(parts, x):
    h = parts[0](x)
    return parts[1](h * h.mean(0))


def ordered(parts, x):
    order = x.sum(1).argsort()
    return parts[1](torch.tanh(parts[0](x[order])[order.argsort()]))


def contrastive(out, y):
    return F.cross_entropy(out @ out.T, torch.arange(len(out)), reduction="none")


@pytest.mark.parametrize("micro_batch", [8, 3, "auto"])
@pytest.mark.parametrize(
    ("function", "loss"),
    [(centred, SQUARE), (ordered, SQUARE), (lambda p, x: p[1](p[0](x)), contrastive)],
)
@pytest.mark.filterwarnings("ignore:micro_batch=3 splits what belongs together")
def test_samples_that_meet_are_refused_for_activations(function, loss, micro_batch):
    gradient = ForwardGradient(two(function)(), loss, micro_batch=micro_batch)
    with pytest.raises(VerificationError, match="Samples may depend on each other"):
        gradient(data(8, 3), data(8, 4))


@pytest.mark.parametrize("loss", [SQUARE, contrastive])
@pytest.mark.filterwarnings("ignore:micro_batch=3 splits what belongs together")
def test_samples_that_meet_are_not_split_for_weights(loss):
    for micro_batch in (8, 3, "auto"):
        model = two(centred)()
        assert_right(model, data(8, 3), data(8, 4), loss, "weights", micro_batch=micro_batch)


def test_a_split_that_goes_wrong_only_later_is_noticed_by_its_losses():
    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.late = linears((3, 4))[0], False

        def forward(self, x):
            return self.layer(x) * (len(x) if self.late else 1)

    model = Late()
    gradient = ForwardGradient(model, SQUARE, StandardBasis(9), micro_batch=3)
    gradient(data(8, 3), data(8, 4))
    model.late = True
    with pytest.warns(UserWarning, match=r"micro_batch=3 splits what belongs together \(their los"):
        gradient(data(8, 3), data(8, 4))


# Values that are not one of each sample.


class Positions(nn.Module):
    def __init__(self, length):
        super().__init__()
        self.words, self.positions = nn.Embedding(9, 4), nn.Embedding(length, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 4)
        self.to(DTYPE)

    def forward(self, x):
        length = self.positions.num_embeddings
        h = self.words((10 * x[:, :1].abs()).long() % 9).expand(-1, length, -1)
        return self.head(torch.tanh(self.norm(h) + self.positions(torch.arange(length)))).mean(1)


@BOTH
@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_positions_are_no_samples(size, length, perturb):
    assert_right(Positions(length), data(size, 3), data(size, 4), perturb=perturb)


def test_parametrized_weights_are_no_samples():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(4, 1, dtype=DTYPE))

        def forward(self, weight):
            return weight * self.factor

    model = two(lambda p, x: p[1](torch.tanh(p[0](x))))()
    nn.utils.parametrize.register_parametrization(model.parts[1], "weight", Doubled())
    model.parts[1].requires_grad_(False)
    factor = model.parts[1].parametrizations.weight[0].factor.requires_grad_()
    assert_right(model, data(4, 3), data(4, 4))
    assert factor.grad is not None


def test_time_first_stays_in_the_graph_of_the_next_layer():
    model = OfParts(
        lambda p, x: p[1](torch.tanh(p[0](x[None].expand(8, -1, -1))).mean(0)),
        *linears((3, 4), (4, 4)),
    )  # T = B = 8
    assert_right(model, data(8, 3), data(8, 4), perturb=Activations())


def test_time_first_alone_is_refused():
    model = two(lambda p, x: p[1](torch.tanh(p[0](x[None].expand(8, -1, -1)))).mean(0))()
    with pytest.raises(ValueError, match=r"outputs that depend on the samples. Found none"):
        ForwardGradient(model, SQUARE)(data(8, 3), data(8, 4))


# Parameters outside of layers.


@BOTH
@pytest.mark.parametrize(
    "loss",
    {
        "penalty": lambda model, t: (
            lambda out, y: (
                ((out - y) ** 2).mean(1) + sum(p.square().sum() for p in model.parameters())
            )
        ),
        "a list": lambda model, t: (
            lambda out, y: (
                ((out - y) ** 2).mean(1) + torch.stack([p.sum() for p in model.parameters()]).norm()
            )
        ),
        "temperature": lambda model, t: lambda out, y: ((out * t - y) ** 2).mean(1),
    }.items(),
    ids=lambda case: case[0],
)
def test_parameters_in_a_loss(loss, perturb):
    temperature = nn.Parameter(torch.tensor(1.5, dtype=DTYPE))
    extra = [temperature] if loss[0] == "temperature" else []
    for micro_batch in (6, 4, "auto"):
        model = two(lambda p, x: p[1](torch.tanh(p[0](x))))()
        function = loss[1](model, temperature)
        temperature.grad = None
        x, y = data(6, 3), data(6, 4)
        assert_right(model, x, y, function, perturb, extra, micro_batch=micro_batch)


def test_parameters_in_the_loss_of_a_single_layer():
    temperature = nn.Parameter(torch.tensor(1.5, dtype=DTYPE))
    for perturb in ("activations", "weights", Activations(recompute=True)):
        temperature.grad = None
        model = linears((3, 4))[0]
        loss = lambda out, y: ((out * temperature - y) ** 2).mean(1)  # noqa: E731
        assert_right(model, data(6, 3), data(6, 4), loss, perturb, [temperature])


@BOTH
@pytest.mark.parametrize("micro_batch", [8, 3])
def test_parameters_chosen_by_the_first_batch_see_all_of_it(perturb, micro_batch):
    class Chosen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.chosen = linears((3, 4))[0], False

        def forward(self, x):
            if not self.chosen:
                self.layer.bias.data.copy_(-self.layer(x).detach().mean(0))
                self.chosen = True
            return self.layer(x)

    model, plain = Chosen(), Chosen()
    plain(data(8, 3))
    gradient = ForwardGradient(model, SQUARE, perturb=perturb, micro_batch=micro_batch)
    for _ in range(2):
        gradient(data(8, 3), data(8, 4))
    torch.testing.assert_close(model.layer.bias, plain.layer.bias)


def test_a_loss_module_with_parameters():
    class Centres(nn.Module):
        reduction = "mean"

        def __init__(self):
            super().__init__()
            self.centre = nn.Parameter(data(4))

        def forward(self, out, y):
            losses = ((out - self.centre - y) ** 2).mean(1)
            return losses if self.reduction == "none" else losses.mean()

    loss = Centres()
    for perturb in ("activations", "weights", Activations(recompute=True)):
        loss.zero_grad()
        model = two(lambda p, x: p[1](torch.tanh(p[0](x))))()
        assert_right(model, data(6, 3), data(6, 4), loss, perturb, loss.parameters())


BORROWED = {
    "by name": lambda p, x: F.linear(p[1](p[0](x)), weight=p[1].weight),
    "transposed": lambda p, x: p[1](p[0](x)) @ p[1].weight.T,
    "mT": lambda p, x: p[1](p[0](x)) @ p[1].weight.mT,
    "stacked": lambda p, x: p[1](p[0](x)) + torch.stack([p[0].bias, p[1].bias]).sum(0),
    "concatenated": lambda p, x: p[1](p[0](x) * torch.cat([p[0].bias[:2], p[1].bias[2:]])),
    "vmap": lambda p, x: p[1](p[0](x)) + torch.func.vmap(torch.sum)(p[1].weight),
    "in place": lambda p, x: p[1](p[0](x)).add_(p[1].bias),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", BORROWED)
def test_a_parameter_between_layers(name, recompute):
    model = two(BORROWED[name])()
    assert_right(model, data(6, 3), data(6, 4), perturb=Activations(recompute=recompute))


@pytest.mark.parametrize("name", [name for name in BORROWED if name != "vmap"])
def test_a_parameter_between_layers_with_weights_perturbed(name):
    assert_right(two(BORROWED[name])(), data(6, 3), data(6, 4), perturb="weights")


# Differentiation inside of a model.


def run_on(parts):
    return lambda z: parts[1](torch.tanh(parts[0](z)))


def residual(parts, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(run_on(parts)(x).sum(), x, create_graph=True)[0].sum(1, keepdim=True)


INSIDE = {
    "autograd.grad": residual,
    "jvp": lambda p, x: torch.func.jvp(run_on(p), (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda p, x: torch.func.vmap(torch.func.jacrev(run_on(p)))(x).sum(2),
    "of an activation": lambda p, x: p[1](
        torch.func.jvp(torch.tanh, (p[0](x),), (torch.ones(len(x), 4, dtype=DTYPE),))[1]
    ),
}


@BOTH
@pytest.mark.parametrize("verify", ["first", False])
@pytest.mark.parametrize("name", INSIDE)
def test_a_model_that_differentiates_its_layers_is_refused(name, verify, perturb):
    gradient = ForwardGradient(two(INSIDE[name])(), SQUARE, perturb=perturb, verify=verify)
    with pytest.raises(NotImplementedError, match=r"differentiate its own|outside of torch\.func"):
        gradient(data(6, 3), data(6, 4))


def of_constants(parts, x):
    z = x.clone().requires_grad_()
    slope = torch.autograd.grad((z**3).sum(), z)[0] + torch.func.jvp(torch.sin, (x,), (x,))[1]
    return parts[1](torch.tanh(parts[0](slope)))


@BOTH
def test_a_model_may_differentiate_what_is_not_trained(perturb):
    assert_right(two(of_constants)(), data(6, 3), data(6, 4), perturb=perturb)
