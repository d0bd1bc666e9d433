"""Legal code that is easy to get wrong: each case once gave, or could give, a wrong gradient."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models_for_tests import gradients, relative_error
from multitangent import Activations, ForwardGradient, Normal
from multitangent.dual import DualTensor, full_tangents, register_rule
from multitangent.engine import ForwardMode
from multitangent.tangents import StandardBasis

DTYPE = torch.float64


def check(model, loss, x, y, n, **kwargs):
    loss(model(x), y).backward()
    expected = gradients(model)
    ForwardGradient(model, loss, StandardBasis(n), **kwargs)(x, y)
    assert relative_error(gradients(model), expected) <= 1e-10


class Wrapped(nn.Module):
    def __init__(self, function, *modules):
        super().__init__()
        self.function = function
        self.modules_ = nn.ModuleList(modules)

    def forward(self, x):
        return self.function(x, *self.modules_)


def data(*shape):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return torch.randn(shape, dtype=DTYPE)


def linear(*sizes):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(*sizes, dtype=DTYPE)


@pytest.mark.parametrize("micro_batch", ["auto", 2])
def test_class_probabilities_of_sequences(micro_batch):
    model = Wrapped(lambda x, layer: layer(x).transpose(1, 2), linear(4, 5))
    target = data(3, 5, 6).softmax(1)
    check(model, nn.CrossEntropyLoss(), data(3, 6, 4), target, 30, micro_batch=micro_batch)


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h.type(torch.float64) * h.type(h.dtype),
        lambda h: h.mT @ h,
        lambda h: h.H.T + h.mH.mT,
        lambda h: torch.sum(input=h, dim=1, keepdim=True),
        lambda h: h.sum(axis=-1, keepdims=True) * h.mean(axis=0),
        lambda h: torch.mul(input=h, other=h) + torch.add(h, other=h),
        lambda h: h[:, None].expand(-1, 3, -1).norm(dim=1),
        lambda h: torch.logsumexp(h[None].expand(2, -1, -1), 0),
        lambda h: torch.empty_like(h).copy_(h * h) + torch.ones_like(h).mul_(h),
        lambda h: torch.zeros_like(h).add_(h).zero_() + h,
        lambda h: h[[0, 1]].sum(0) + h[()],
        lambda h: F.linear(h, h[0]),
        lambda h: h.permute(dims=(1, 0)),
        lambda h: h.unsqueeze(0).transpose(dim0=0, dim1=1),
        lambda h: h.diagonal().clone().mul_(2),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_spellings_of_functions(function, shared):
    tangents = data(4, 1, 3) if shared else data(4, 3, 3)
    x = DualTensor(data(3, 3), tangents)
    expected = torch.stack(
        [torch.func.jvp(lambda x: function(x * 1), (x.primal,), (t,))[1] for t in full_tangents(x)]
    )
    found = function(x * 1)
    torch.testing.assert_close(full_tangents(found), expected)


def write_through_a_cast(h):
    g = h.double()  # the same tensor
    g *= 2
    return h


def test_casts_to_the_same_type_are_the_same_tensor():
    x = DualTensor(data(3, 3), data(2, 3, 3))
    torch.testing.assert_close(write_through_a_cast(x * 1).tangents, 2 * x.tangents)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (torch.fft.fft, "Tangents should be real"),
        (lambda h: h.view(torch.int64), "Found torch.int64"),
        (lambda h: F.mse_loss(h, h, size_average=False), "Found the deprecated"),
    ],
)
@pytest.mark.filterwarnings("ignore:size_average and reduce args")
def test_what_would_lose_tangents_is_refused(function, message):
    with pytest.raises(NotImplementedError, match=message):
        function(DualTensor(data(3, 3), data(2, 3, 3)) * 1)


def test_an_output_written_in_place_is_not_the_last_sites():
    model = Wrapped(lambda x, a, b: b(a(x)).sigmoid_(), linear(3, 3), linear(3, 2))
    perturb = Activations(output="exact")
    gradient = ForwardGradient(model, nn.MSELoss(), StandardBasis(3), perturb=perturb)
    gradient(data(4, 3), data(4, 2))
    found = gradients(model)
    nn.MSELoss()(model(data(4, 3)), data(4, 2)).backward()
    assert relative_error(found, gradients(model)) < 1e-9


def test_parameters_do_not_share_the_memory_of_their_gradients():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(2, dtype=DTYPE)) for _ in range(2))
            self.scale = nn.Parameter(torch.ones(3, dtype=DTYPE))

        def forward(self, x):
            return x[:, :2] + (self.a + self.b) + x[:, :1] * self.scale.sum()

    model, x, y = Shifted(), data(4, 3), data(4, 2)
    gradient = ForwardGradient(model, nn.MSELoss(), StandardBasis(2))
    for _ in range(2):
        gradient(x, y)
    twice = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    nn.MSELoss()(model(x), y).backward()
    for parameter, found in zip(model.parameters(), twice, strict=True):
        torch.testing.assert_close(found, 2 * parameter.grad)


@pytest.mark.parametrize("recompute", [False, True])
def test_a_parameter_used_inside_another_site_is_pulled_there(recompute):
    class Borrowing(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.own = linear(3, 3)
            self.borrowed = [layer]

        def forward(self, x):
            return self.own(F.linear(x, self.borrowed[0].weight))

    first = linear(3, 3)
    model = nn.Sequential(first, Borrowing(first))
    options = Activations(recompute=recompute)
    check(model, nn.MSELoss(), data(4, 3), data(4, 3), 6, perturb=options)


@pytest.mark.parametrize("recompute", [False, True])
def test_one_activation_module_in_several_places(recompute):
    act = nn.Tanh()
    model = nn.Sequential(linear(3, 4), act, nn.Softplus(), act, linear(4, 2), act)
    check(model, nn.MSELoss(), data(5, 3), data(5, 2), 6, perturb=Activations(recompute=recompute))


def test_dropout_with_several_rows_a_sample_does_not_depend_on_the_split():
    def function(x, a, b):
        h = a(x).reshape(-1, 2)
        return b(F.dropout(h, 0.5).reshape(len(x), 4))

    model = Wrapped(function, linear(3, 4), linear(4, 2))
    found = []
    for micro_batch in (6, 2, 1):
        ForwardGradient(model, nn.MSELoss(), Normal(3), micro_batch=micro_batch)(
            data(6, 3), data(6, 2)
        )
        found.append(gradients(model))
    assert relative_error(found[1], found[0]) <= 1e-10
    assert relative_error(found[2], found[0]) <= 1e-10


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.filterwarnings("ignore:.*has no rule:multitangent.dual.FallbackWarning")
def test_final_states_of_recurrent_layers_stay_in_the_graph(kind):
    def run(x, layer, head):
        out, state = layer(x)
        return head(out[:, 0] + (state[0] if kind is nn.LSTM else state)[-1])

    torch.manual_seed(0)
    layer = kind(3, 4, num_layers=5, batch_first=True, dtype=DTYPE)  # as many as samples
    check(Wrapped(run, layer, linear(4, 2)), nn.MSELoss(), data(5, 3, 3), data(5, 2), 20)


@pytest.mark.parametrize("micro_batch", [1, 2, 5])
@pytest.mark.parametrize("share", ["batch", "sample"])
def test_diagnostics_of_any_split(share, micro_batch):
    model, options = linear(3, 2), Activations(share=share)
    gradient = ForwardGradient(
        model, nn.MSELoss(), Normal(2), perturb=options, micro_batch=micro_batch
    )
    gradient(data(5, 3), data(5, 2))
    assert gradient.diagnostics.gram.shape == ((2, 2) if share == "batch" else (5, 2, 2))
    assert gradient.diagnostics.jvps.shape == (2, 5)


@pytest.mark.parametrize("perturb", ["weights", "activations"])
def test_autocast(perturb):
    model = nn.Sequential(linear(3, 4), nn.ReLU(), linear(4, 2)).float()
    gradient = ForwardGradient(model, nn.MSELoss(), StandardBasis(26), perturb=perturb)
    x, y = data(6, 3).float(), data(6, 2).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            gradient(x, y)
    found = gradients(model)
    assert all(g.dtype == torch.float32 for g in found)
    for _ in range(2):
        nn.MSELoss()(model(x), y).backward()
    assert relative_error(found, gradients(model)) < 0.05  # bfloat16 has three digits


def test_jvps_of_low_precision_do_not_disable_the_projection():
    from multitangent import Projection

    tangents = torch.randn(9, 9, generator=torch.Generator().manual_seed(0))
    gradient = torch.ones(9)
    coefficients = Projection()(tangents @ tangents.T, (tangents @ gradient).bfloat16())
    assert (tangents.double().T @ coefficients - 1).norm() / 3 < 0.2


@pytest.mark.parametrize("training", [True, False])
def test_attention_of_pytorch_is_one_layer(training):
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True, dtype=DTYPE)
    model = Wrapped(lambda x, layer, head: head(layer(x).mean(1)), layer, linear(4, 2))
    check(model.train(training), nn.MSELoss(), data(3, 2, 4), data(3, 2), 8 * 4 + 10 + 2)


def test_rules_are_checked():
    def pick(x):
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(pick, (x,), x)
        return x

    register_rule(pick)(lambda out, x: x.tangents[0])
    with pytest.raises(ValueError, match=r"A rule should return tangents of shape \[K, \*\[3\]\]"):
        pick(DualTensor(data(3), data(2, 3)))


def time_first(x, first, head):
    """PyTorch's default layout of sequences, with rows of all steps one after another."""
    h = first(x).transpose(0, 1)  # [T, B, 4]
    rows = F.linear(h.reshape(-1, 4), torch.eye(4, dtype=DTYPE) + 0.5)
    h = F.dropout(rows.reshape(h.shape), 0.4)
    return head(h.transpose(0, 1).flatten(1))


@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_layouts_with_another_axis_first_do_not_depend_on_the_split(micro_batch):
    model = Wrapped(time_first, linear(3, 4), linear(12, 2))
    x, y = data(8, 3, 3), torch.arange(8) % 2
    x[:, 2] = 0  # padding, alike for all samples
    jvps = []
    for size in (8, micro_batch):
        gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(3), micro_batch=size)
        gradient(x, y)
        jvps.append(gradient.diagnostics.jvps)
    torch.testing.assert_close(*jvps, rtol=1e-9, atol=1e-12)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_layers_that_run_again_see_the_same_random_numbers():
    model = nn.Sequential(linear(3, 4), Noisy(), linear(4, 4), Noisy(), linear(4, 2))
    x, y = data(6, 3), torch.arange(6) % 2
    found = []
    for recompute in (False, True):
        options = Activations(recompute=recompute)
        ForwardGradient(model, nn.CrossEntropyLoss(), Normal(3), perturb=options)(x, y)
        found.append(gradients(model))
    assert relative_error(found[1], found[0]) <= 1e-10


def test_redrawn_tangents_of_a_batch_that_leaves_one_sample_over():
    model = nn.Sequential(linear(3, 4), nn.ReLU(), linear(4, 2))
    x, y = data(17, 3), torch.arange(17) % 2
    found = []
    for store in (True, False):
        options = Activations(share="sample")
        gradient = ForwardGradient(
            model, nn.CrossEntropyLoss(), Normal(3), perturb=options, store_tangents=store
        )
        gradient(x, y)
        found.append(gradients(model))
    assert relative_error(found[1], found[0]) <= 1e-10


def test_too_little_memory_halves_the_micro_batch(monkeypatch):
    """As on a GPU; running averages are updated once all the same."""
    model = nn.Sequential(linear(3, 4), nn.BatchNorm1d(4, dtype=DTYPE), linear(4, 2))
    x, y = data(8, 3), torch.arange(8) % 2
    gradient = ForwardGradient(model, nn.CrossEntropyLoss(), Normal(3))
    push = ForwardMode.__call__

    def limited(engine, run, tangents):
        result = push(engine, run, tangents)
        if engine.micro_batch > 2:
            raise torch.OutOfMemoryError("too little memory")
        return result

    monkeypatch.setattr(ForwardMode, "__call__", limited)
    with pytest.warns(UserWarning, match=r"micro_batch=.* does not fit the memory") as caught:
        gradient(x, y)
    assert [str(w.message).partition(" ")[0] for w in caught] == ["micro_batch=8", "micro_batch=4"]
    assert int(model[1].num_batches_tracked) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # remembered
        gradient(x, y)
