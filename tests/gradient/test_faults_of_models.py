"""Ordinary code of whole models that once failed: its gradient is that of backpropagation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models_for_tests import Model, gradients, relative_error
from multitangent import Activations, ForwardGradient, Projection
from multitangent.dual import DualTensor
from multitangent.tangents import StandardBasis

DTYPE = torch.float64
SQUARE = nn.MSELoss()
BOTH = pytest.mark.parametrize("perturb", ["activations", "weights"])
SPLIT = pytest.mark.parametrize("micro_batch", ["auto", 2])


def seeded(make):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().to(DTYPE)


def data(*shape):
    return torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(sum(shape)))


def layers(function, *others):
    """A model of two linear layers, from 6 to 6 to 2, with something between them."""
    return seeded(lambda: Model(function, nn.Linear(6, 6), nn.Linear(6, 2), *others))


def assert_right(model, x, y, perturb, micro_batch, loss=SQUARE, n=200):
    losses = loss(model(x), y)
    losses.mean().backward()
    expected = gradients(model)
    value = ForwardGradient(
        model, loss, StandardBasis(n), Projection(), perturb, micro_batch=micro_batch
    )(x, y)
    torch.testing.assert_close(value, losses.detach().mean())
    assert relative_error(gradients(model), expected) <= 1e-9


ACTIVATIONS = [
    nn.LeakyReLU(inplace=True), nn.ELU(inplace=True), nn.SELU(inplace=True),
    nn.SiLU(inplace=True), nn.Hardswish(inplace=True), nn.Mish(inplace=True),
    nn.CELU(0.5, inplace=True), nn.RReLU(0.2, 0.2, inplace=True), nn.RReLU(inplace=True).eval(),
    nn.Hardtanh(-0.5, 0.5, inplace=True), nn.ReLU6(inplace=True),
    nn.Threshold(0.1, 0.2, inplace=True), nn.Hardsigmoid(inplace=True), nn.ReLU(inplace=True),
    nn.Dropout(0.0, inplace=True),
]  # fmt: skip


@BOTH
@SPLIT
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_activations_in_place_in_any_site(activation, perturb, micro_batch):
    def make():
        first = [nn.Conv2d(3, 2, 3), activation, nn.Conv2d(2, 2, 3), activation]
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(8, 4), activation, nn.Linear(4, 2))

    model = seeded(make)
    assert_right(model, data(5, 3, 6, 6), data(5, 2), perturb, micro_batch)


class InPlace(nn.Module):
    """Writes in place what autograd has to keep, by a parameter of its own."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.linspace(0.5, 2, 6))
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(self.function(self, x))


def scale(m, x):
    return x.mul_(m.weight)


def scale_and_write(m, x):
    z = torch.zeros_like(x.detach())
    z[:, :3] = x[:, :3] * m.weight[:3]
    z[:, 3:] += (x[:, 3:] * m.weight[3:]).tanh_()
    return F.silu(z, inplace=True)


def square_in_place(m, x):
    y = x * m.weight
    return y.pow_(2).mul_(y.detach().sign()).add_(x)


def write_rows(m, x):
    out = x.new_empty(x.shape)
    for i, row in enumerate(x):
        out[i] = row * m.weight
    return out


@SPLIT
@pytest.mark.parametrize("perturb", ["activations", "weights", "recompute"])
@pytest.mark.parametrize("function", [scale, scale_and_write, square_in_place, write_rows])
def test_writes_inside_a_site(function, perturb, micro_batch):
    def make():
        parts = nn.Linear(6, 6), InPlace(function), nn.Linear(6, 2)
        return Model(lambda m, x: m.parts[2](m.parts[1]((m.parts[0](x) * 1).view(-1, 6))), *parts)

    model = seeded(make)
    if perturb != "weights":
        sites = ["parts.0", "parts.1", "parts.2"]
        if perturb == "recompute" and function is scale:
            return  # writes into the input of a layer that is to run again
        perturb = Activations(sites=sites, recompute=perturb == "recompute")
    assert_right(model, data(5, 6), data(5, 2), perturb, micro_batch)


NODES = torch.tensor([0, 1, 2, 0, 1, 2])


def gather_messages(m, x):
    h = m.parts[0](x)
    total = torch.zeros(len(x), 3, dtype=x.dtype)
    total.index_add_(1, NODES, h.tanh())
    total.scatter_add_(1, NODES[:3].expand(len(x), 3), h[:, :3])
    total[:, 0] += h[:, 1]
    return m.parts[1](torch.cat([total, total.sin()], 1))


def fill_by_position(m, x):
    h = m.parts[0](x)
    out = torch.zeros(len(x), 6, dtype=x.dtype)
    for j in range(6):
        out[:, j] = h[:, j] * (out[:, j - 1].clone() if j else 1)
    return m.parts[1](out)


def accumulate(m, x):
    out = torch.zeros(len(x), 6, dtype=x.dtype)
    for _ in range(2):
        out += m.parts[0](x + out).tanh()
    return m.parts[1](out)


def grow_a_cache(m, x):
    cache = torch.tensor([], dtype=x.dtype)
    for j in range(3):
        new = m.parts[0](x + j).unsqueeze(1)
        cache = torch.cat([cache, new], -2)
    return m.parts[1](cache.softmax(1).sum(1) + cache[:, 0])


def write_into_the_input(m, x):
    x = x.clone()
    x[:, 3:] = m.parts[0](x.clone())[:, 3:]
    return m.parts[1](x)


def write_masked(m, x):
    h = m.parts[0](x)
    out = torch.full_like(x, 2.0)
    out[x > 0] = h[x > 0]
    return m.parts[1](out)


@BOTH
@SPLIT
@pytest.mark.parametrize(
    "function",
    [
        gather_messages, fill_by_position, accumulate, grow_a_cache, write_into_the_input,
        write_masked,
    ],
)  # fmt: skip
def test_tensors_made_inside_a_model(function, perturb, micro_batch):
    assert_right(layers(function), data(5, 6), data(5, 2), perturb, micro_batch)


def test_tensors_made_inside_a_model_in_lower_precision():
    model = layers(fill_by_position).float()
    x, y = data(5, 6).float(), data(5, 2).float()
    SQUARE(model(x), y).backward()
    expected = gradients(model)
    source = StandardBasis(40)
    ForwardGradient(model, SQUARE, source, Projection(), tangent_dtype=torch.bfloat16)(x, y)
    assert relative_error(gradients(model), expected) <= 0.05


def test_curvature_of_a_model_that_writes_into_zeros():
    model, x, y = layers(gather_messages), data(5, 6), data(5, 2)
    gradient = ForwardGradient(model, SQUARE, StandardBasis(40))
    gradient(x, y)
    direction = {name: p.grad.clone() for name, p in model.named_parameters()}

    def loss(t):
        moved = {name: p + t * direction[name] for name, p in model.named_parameters()}
        return SQUARE(torch.func.functional_call(model, moved, (x,)), y)

    zero = torch.zeros((), dtype=DTYPE)
    curvature = torch.func.grad(torch.func.grad(loss))(zero)
    torch.testing.assert_close(gradient.along(direction).curvature, curvature.detach())


@SPLIT
def test_the_first_state_of_a_recurrent_layer(micro_batch):
    def run(m, x):
        state = (torch.zeros(1, len(x), 4, dtype=DTYPE), torch.zeros(1, len(x), 4, dtype=DTYPE))
        return m.parts[1](m.parts[2](m.parts[0](x).view(-1, 2, 3), state)[0].flatten(1)[:, :6])

    model = layers(run, nn.LSTM(3, 4, batch_first=True))
    with pytest.warns(match="has no rule"):
        assert_right(model, data(5, 6), data(5, 2), "weights", micro_batch)


def test_a_loss_written_into_zeros():
    def loss(output, target):
        losses = torch.zeros(len(output), dtype=output.dtype)
        losses += (output - target).square().sum(1)
        return losses

    model = layers(lambda m, x: m.parts[1](m.parts[0](x).tanh()))
    assert_right(model, data(5, 6), data(5, 2), "activations", 2, loss=loss)


class Remembering(nn.Module):
    """Writes into a buffer and into an attribute."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.register_buffer("last", torch.zeros(6))
        self.cache = torch.zeros(9, 6, dtype=DTYPE)

    def forward(self, x):
        h = self.layer(x)
        self.last.detach_()
        self.cache.detach_()
        self.last.copy_(h[0])
        self.cache[: len(x)] = h
        return self.head(self.cache[: len(x)].tanh() * h + 0 * self.last)


@BOTH
@SPLIT
def test_what_a_model_keeps_keeps_no_tangents(perturb, micro_batch):
    model = seeded(Remembering)
    x, y = data(5, 6), data(5, 2)
    assert_right(model, x, y, perturb, micro_batch)
    for kept in (model.last, model.cache, model.cache[2:4]):
        assert type(kept) is torch.Tensor
    assert not any(isinstance(v, DualTensor) for v in model.buffers())


def by_requires_grad(m, x):
    h = m.parts[0](x).tanh()
    if h.requires_grad and not x.requires_grad:
        h = h * 2
    return m.parts[1](h)


def by_grad_fn(m, x):
    h = m.parts[0](x) * 1
    return m.parts[1](h if h.grad_fn is None or h.is_leaf else h.exp())


def by_grad_fn_without_gradients(m, x):
    h = m.parts[0](x)
    with torch.no_grad():
        s = h * 2
        doubled = 2 if h.requires_grad and not s.requires_grad and s.grad_fn is None else 1
    return m.parts[1](h * s * doubled)


def by_parameter(m, x):
    w = m.parts[0].weight
    is_parameter = w.requires_grad and w.is_leaf and w.grad_fn is None
    x = 2 * x if is_parameter and isinstance(w, nn.Parameter) else x
    return m.parts[1](m.parts[0](x).sin())


def by_new_zeros(m, x):
    h = m.parts[0](x)
    z = torch.zeros_like(h)
    factor = 1 if z.requires_grad else 3
    z += h
    return m.parts[1](z * factor * (2 if z.requires_grad else 1))


def retaining(m, x):
    h = m.parts[0](x)
    h.retain_grad()
    return m.parts[1](h.sin())


@BOTH
@SPLIT
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        by_requires_grad, by_grad_fn, by_grad_fn_without_gradients, by_parameter, by_new_zeros,
        retaining,
    ],
)  # fmt: skip
def test_a_model_that_asks_for_a_graph(function, normalized, perturb, micro_batch):
    """Where the batch is recorded first, the answers are the same."""
    norm = nn.BatchNorm1d(6).eval() if normalized else nn.Identity()
    model = layers(lambda m, x: function(m, m.parts[2](x)), norm)
    norm.requires_grad_(False)
    assert_right(model, data(5, 6), data(5, 2), perturb, micro_batch)


def test_statistics_are_counted_once_by_a_model_that_asks():
    models = [
        layers(lambda m, x: by_requires_grad(m, m.parts[2](x)), nn.BatchNorm1d(6)) for _ in "ab"
    ]
    models[0](data(5, 6))
    ForwardGradient(models[1], SQUARE, StandardBasis(20), micro_batch=2)(data(5, 6), data(5, 2))
    for name, value in models[0].named_buffers():
        torch.testing.assert_close(value, models[1].get_buffer(name))


def test_there_is_no_graph_to_walk_through():
    model = layers(lambda m, x: m.parts[1](m.parts[0](x) * len(m.parts[0](x).grad_fn.name())))
    with pytest.raises(AttributeError, match="`grad_fn` should be compared with None only"):
        ForwardGradient(model, SQUARE, StandardBasis(2), micro_batch=8)(data(5, 6), data(5, 2))


def test_hooks_of_activations_are_refused():
    def hooked(m, x):
        h = m.parts[0](x)
        if h.requires_grad:
            h.register_hook(lambda g: 2 * g)
        return m.parts[1](h)

    with pytest.raises(RuntimeError, match="`register_hook` should be called on parameters"):
        ForwardGradient(layers(hooked), SQUARE, StandardBasis(2))(data(5, 6), data(5, 2))


@torch.no_grad()
def traced():
    return torch.jit.trace(lambda x: x.sin() * 2, torch.ones(3, 4, dtype=DTYPE))


def scripted_function(x):
    return torch.tanh(x) * x


def scripted_with_dropout(x):
    return torch.dropout(x, 0.5, True)


FROZEN = seeded(lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.5)))
FROZEN.requires_grad_(False).eval()
TORCHSCRIPT = {
    "function": lambda: torch.jit.script(scripted_function),
    "trace": traced,
    "module": lambda: torch.jit.script(FROZEN),
    "traced module": lambda: torch.jit.trace(FROZEN, data(3, 6)),
}


@pytest.mark.filterwarnings("ignore:.*has no rule for tangents")
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
@BOTH
@SPLIT
@pytest.mark.parametrize("name", TORCHSCRIPT)
def test_torchscript_inside_a_model(name, perturb, micro_batch):
    inner = TORCHSCRIPT[name]()
    model = layers(lambda m, x: m.parts[1](inner(m.parts[0](x))))
    call = type(inner).__call__
    for _ in range(3):  # TorchScript changes its code as it runs
        assert_right(model, data(5, 6), data(5, 2), perturb, micro_batch)
    assert type(inner).__call__ is call


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")
def test_torchscript_that_is_no_function_of_the_sample_is_refused():
    inner = torch.jit.script(scripted_with_dropout)
    model = layers(lambda m, x: m.parts[1](inner(m.parts[0](x))))
    with pytest.raises(NotImplementedError, match="Found dropout in 'scripted_with_dropout'"):
        ForwardGradient(model, SQUARE, StandardBasis(2))(data(5, 6), data(5, 2))
    model = layers(lambda m, x: m.parts[2](m.parts[0](x)))
    model.parts.append(torch.jit.script(nn.Linear(6, 2)))
    with pytest.raises(TypeError, match=r"Found RecursiveScriptModule 'parts\.2'"):
        ForwardGradient(model, SQUARE)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@BOTH
@SPLIT
@pytest.mark.parametrize("kind", ["function", "module", "method", "model"])
def test_what_torch_compile_made_runs_as_it_was_written(kind, perturb, micro_batch):
    model = layers(lambda m, x: m.parts[1](m.parts[0](x).tanh()))
    if kind == "function":
        inner = torch.compile(lambda h: h.tanh() * h, backend="eager")
        model.function = lambda m, x: m.parts[1](inner(m.parts[0](x)))
    elif kind == "module":
        model.parts[1] = torch.compile(model.parts[1], backend="eager")
    elif kind == "method":
        model.parts[0].compile(backend="eager")
    else:
        model.compile(backend="eager")
    assert_right(model, data(5, 6), data(5, 2), perturb, micro_batch)


@SPLIT
@pytest.mark.parametrize("weighted", [False, True])
def test_labels_of_bytes(weighted, micro_batch):
    weight = torch.tensor([1.0, 2.0], dtype=DTYPE) if weighted else None
    model = layers(lambda m, x: m.parts[1](m.parts[0](x).tanh()))
    labels = torch.tensor([1, 0, 1, 1, 0], dtype=torch.uint8)
    assert_right(model, data(5, 6), labels, "activations", micro_batch, nn.CrossEntropyLoss(weight))
