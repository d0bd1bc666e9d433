"""The net beneath: with the mend of a known fault taken out, the comparison still finds it."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models_for_tests import OfParts, data, gradients, linears, relative_error
from multitangent import Activations, ForwardGradient, Projection, VerificationError
from multitangent.dual import DualTensor, primal, tangents
from multitangent.engine import Trial
from multitangent.tangents import StandardBasis

DTYPE = torch.float64
SQUARE = nn.MSELoss()


def two(function):
    return OfParts(function, *linears((3, 4), (4, 4)))


def nothing(*args, **kwargs):
    return contextlib.nullcontext()


# The mends: what is replaced, and by what.


def no_grad_is_overlooked(monkeypatch):
    monkeypatch.setattr(
        "multitangent.objective._batch_mode.BatchMode._constant",
        lambda self, func, args, kwargs: self._result(func, (), args, kwargs),
    )


def backwards_are_overlooked(monkeypatch):
    monkeypatch.setattr("multitangent.objective._objective.foreign_functions", nothing)


def every_first_axis_is_the_batch(monkeypatch):
    monkeypatch.setattr(
        "multitangent.gradient._estimator.run_few", lambda *args: Trial(6, is_plain=True)
    )


def what_follows_the_last_site_is_forgotten(monkeypatch):
    monkeypatch.setattr(
        "multitangent.perturbation._pullback.LocalPullback.end", lambda self, losses, watched: None
    )


def kept_tensors_stay(monkeypatch):
    monkeypatch.setattr("multitangent.objective._objective.release", lambda modules: None)
    monkeypatch.setattr("multitangent.dual._dual_tensor.check_sweep", lambda sweep: None)


def stand_ins_stay(monkeypatch):
    @contextlib.contextmanager
    def replaced(model, values):
        for name, value in values.items():
            owner, _, last = name.rpartition(".")
            delattr(model.get_submodule(owner), last)
            setattr(model.get_submodule(owner), last, value)
        yield

    monkeypatch.setattr("multitangent.objective._objective.replaced", replaced)


def as_it_is(monkeypatch):
    pass


def wrong_at_zero(monkeypatch):
    monkeypatch.setitem(
        registry(), torch.relu, lambda out, x: tangents(x) * (primal(x) >= 0).to(out.dtype)
    )


def products_are_forgotten(monkeypatch):
    monkeypatch.setitem(
        registry(), torch.Tensor.scatter_reduce, lambda out, x, *args, **kwargs: 0 * tangents(x)
    )


def hooks_run_twice(monkeypatch):
    def run_again(visit):
        args, kwargs = visit.inputs
        return dict(zip(visit.outputs, [visit.site.modules[0](*args, **kwargs)], strict=True))

    register = nn.Module.register_forward_pre_hook
    monkeypatch.setattr("multitangent.perturbation._pullback._run_again", run_again)
    monkeypatch.setattr(  # behind the hooks of the user, in place of before them
        nn.Module,
        "register_forward_pre_hook",
        lambda module, hook, *, prepend=False, with_kwargs=False: register(
            module, hook, with_kwargs=with_kwargs
        ),
    )


def registry():
    import importlib

    return importlib.import_module("multitangent.dual._registry").RULES


class Reversed(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, gradient):
        return -gradient

    @staticmethod
    def jvp(ctx, tangent):
        return tangent


class Positions(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(9, 4), nn.Embedding(6, 4)
        self.head = nn.Linear(4, 4)
        self.to(DTYPE)

    def forward(self, x):
        words = self.embedding((10 * x[:, :1].abs()).long() % 9)
        return self.head(torch.tanh(words + self.positions(torch.arange(6)))).mean(1)


class Keeping(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.kept = linears((3, 4))[0], None

    def forward(self, x):
        out = self.layer(x)
        self.kept = out
        return out


def with_target(parts, x):
    h = parts[0](x)
    with torch.no_grad():
        target = h * 1
    return parts[1](h * target)


def sorted_and_back(parts, x):
    order = x.sum(1).argsort()
    return parts[1](torch.tanh(parts[0](x[order])[order.argsort()]))


def tied(parts, x):
    return F.linear(parts[1](torch.tanh(parts[0](x))), weight=parts[1].weight)


def dead(parts, x):
    h = parts[0](x)
    return parts[1](torch.relu(h - h.detach()))


def scattered(parts, x):
    h = parts[0](x)
    return parts[1](h.scatter_reduce(1, torch.zeros(len(h), 4, dtype=torch.long), h, "prod"))


def hooked():
    model = two(lambda p, x: p[1](torch.tanh(p[0](x))))
    model.parts[1].register_forward_pre_hook(lambda module, args: (2 * args[0],))
    return model


def interacting(parts, x):
    h = parts[0](x)
    return parts[1](h * h.mean(0))


FAULTS = {
    "1 no_grad": (no_grad_is_overlooked, lambda: two(with_target), {}),
    "2 backward of one's own": (
        backwards_are_overlooked,
        lambda: two(lambda p, x: p[1](Reversed.apply(p[0](x)))),
        {},
    ),
    "4 positions": (every_first_axis_is_the_batch, Positions, {}),
    "5 rows in another order": (as_it_is, lambda: two(sorted_and_back), {}),
    "10 kept tensors": (kept_tensors_stay, Keeping, {}),
    "14 samples interact": (as_it_is, lambda: two(interacting), {}),
    "15 kinks": (wrong_at_zero, lambda: two(dead), {}),
    "16 scattered products": (products_are_forgotten, lambda: two(scattered), {}),
    "22 hooks run twice": (hooks_run_twice, hooked, {"perturb": Activations(recompute=True)}),
    "21 parameters elsewhere": (what_follows_the_last_site_is_forgotten, lambda: two(tied), {}),
    "25 stand-ins stay": (
        stand_ins_stay,
        lambda: two(lambda p, x: p[1](p[0](x))),
        {"perturb": "weights"},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_without_its_mend_is_found(monkeypatch, name):
    take_out, make, options = FAULTS[name]
    take_out(monkeypatch)
    model = make()
    gradient = ForwardGradient(model, SQUARE, StandardBasis(60), Projection(), **options)
    with pytest.raises(VerificationError, match=r"(?s)should.*Found.*Try"):
        gradient(data(6, 3), data(6, 4))
    assert all(p.grad is None for p in model.parameters())


def test_parameters_of_a_loss_are_found(monkeypatch):
    what_follows_the_last_site_is_forgotten(monkeypatch)
    temperature = nn.Parameter(torch.tensor(2.0, dtype=DTYPE))
    gradient = ForwardGradient(
        linears((3, 4))[0], lambda out, y: ((out * temperature - y) ** 2).mean(1)
    )
    with pytest.raises(VerificationError, match=r"a tensor of shape \[\]"):
        gradient(data(6, 3), data(6, 4))


def test_it_names_the_first_module_that_differs():
    def run(parts, x):
        h = torch.tanh(parts[1](torch.tanh(parts[0](x))))
        return parts[2](h - h.mean(0))

    model = OfParts(run, *linears((3, 4), (4, 4), (4, 4)))
    with pytest.raises(VerificationError, match=r"between 'parts\.1' and 'parts\.2'"):
        ForwardGradient(model, SQUARE)(data(6, 3), data(6, 4))


# Faults of a split: the batch is then not split, which gives the right gradient.


def random_numbers_differ(monkeypatch):
    import importlib

    module = importlib.import_module("multitangent.objective._batch_mode")
    for function in module.RANDOM:
        monkeypatch.delitem(getattr(module, "_SPECIAL"), function)  # noqa: B009


def state_is_not_put_back(monkeypatch):
    monkeypatch.setattr("multitangent.objective.Change.undone", nothing)
    monkeypatch.setattr("multitangent.objective.Change.kept", nothing)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.runs = linears((3, 4))[0], 0

    def forward(self, x):
        self.runs += 1
        return self.layer(x) / self.runs


class Running(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = linears((3, 4))[0]
        self.norm = nn.InstanceNorm1d(4, track_running_stats=True, dtype=DTYPE)

    def forward(self, x):
        h = self.layer(x)
        self.norm(h[:, :, None] * torch.arange(3))
        return h


def every_run_updates(monkeypatch):
    state_is_not_put_back(monkeypatch)
    monkeypatch.setattr(
        "multitangent.objective._batch_norm.Normalization.instance_norm",
        lambda self, func, *args, **kwargs: func(*args, **kwargs),
    )


SPLITS = {
    "3 random numbers": (
        random_numbers_differ,
        lambda: two(lambda p, x: p[1](p[0](x) * torch.rand(len(x), 1, dtype=DTYPE))),
    ),
    "8 counters": (state_is_not_put_back, Counting),
    "13 running averages": (every_run_updates, Running),
    "14 samples interact": (as_it_is, lambda: two(interacting)),
}


@pytest.mark.parametrize("perturb", ["activations", "weights"])
@pytest.mark.parametrize("name", SPLITS)
def test_a_split_without_its_mend_is_found(monkeypatch, name, perturb):
    take_out, make = SPLITS[name]
    found = []
    for micro_batch in (6, 2):
        if micro_batch == 2:
            take_out(monkeypatch)
        model = make()
        gradient = ForwardGradient(
            model, SQUARE, StandardBasis(60), perturb=perturb, micro_batch=micro_batch
        )
        expectation = (
            pytest.warns(UserWarning, match="splits what belongs together")
            if micro_batch == 2
            else nothing()
        )
        if name.startswith("14") and perturb == "activations":
            refuses = pytest.raises(VerificationError, match=r"between 'parts\.0' and 'parts\.1'")
            with warnings.catch_warnings(action="ignore"), refuses:
                gradient(data(6, 3), data(6, 4))
            continue
        with expectation:
            gradient(data(6, 3), data(6, 4))
        found.append(gradients(model) + [b.clone() for b in model.buffers()])
    if found:
        assert relative_error(*found) <= 1e-12


# What else it promises.


def test_nothing_of_it_stays():
    class Writing(nn.Module):
        """Counts, draws, and writes into a parameter at its first batch."""

        def __init__(self):
            super().__init__()
            self.layer, self.seen = linears((3, 4))[0], []
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            if not self.seen:
                self.layer.bias.data.copy_(-self.layer(x).detach().mean(0))
            self.seen.append(len(x))
            self.count += 1
            return self.layer(x) + torch.rand(len(x), 1, dtype=DTYPE)

    model, plain = Writing(), Writing()
    before = torch.get_rng_state()
    ForwardGradient(model, SQUARE, StandardBasis(9))(data(6, 3), data(6, 4))
    assert torch.equal(before, torch.get_rng_state())
    plain(data(6, 3))
    assert model.seen == plain.seen == [6]
    assert model.count == 1
    torch.testing.assert_close(model.layer.bias, plain.layer.bias)


def count_runs(verify, steps):
    model = two(lambda p, x: p[1](torch.tanh(p[0](x))))
    runs = []
    model.parts[0].register_forward_hook(lambda *_: runs.append(1))
    gradient = ForwardGradient(model, SQUARE, StandardBasis(30), verify=verify)
    counts = []
    for size in steps:
        runs.clear()
        gradient(data(size, 3), data(size, 4))
        counts.append(len(runs))
    return counts


def test_it_happens_once_for_every_kind_of_batch():
    first, second, other, again = count_runs("first", (6, 6, 5, 6))
    assert second == again == 1
    assert first == other > 3
    assert count_runs(False, (6, 6)) == [2, 1]  # a trial for the size of the micro-batch
    many, always = count_runs("always", (6, 6))
    assert many == always + 1


def test_another_mode_is_another_kind():
    model = OfParts(lambda p, x: p[1](p[0](x)), *linears((3, 4)), nn.Dropout())
    gradient = ForwardGradient(model, SQUARE, StandardBasis(9))
    gradient(data(6, 3), data(6, 4))
    model.eval()
    model.function = lambda p, x: p[0](x) - p[0](x).mean(0)
    with pytest.raises(VerificationError, match=r"between 'parts\.0#1' and the loss"):
        gradient(data(6, 3), data(6, 4))


def test_it_can_be_left_out():
    model = two(interacting)
    ForwardGradient(model, SQUARE, verify=False)(data(6, 3), data(6, 4))
    with pytest.raises(ValueError, match="`verify` should be 'first', 'always', 'parts' or False"):
        ForwardGradient(model, SQUARE, verify=True)


def test_a_loss_module_that_reduces_in_its_own_way_is_refused():
    class Focal(nn.CrossEntropyLoss):
        def forward(self, input, target):
            losses = super().forward(input, target)
            return losses if self.reduction == "none" else (losses**2).mean()

    with pytest.raises(VerificationError, match=r"`loss` should be the mean .* reduction='none'"):
        ForwardGradient(linears((3, 4))[0], Focal())(data(6, 3), torch.tensor([0, 1, 2, 3, 0, 1]))


def test_what_backpropagation_can_not_differentiate_goes_on_with_a_warning():
    def loss(out, y):
        if type(out) is not DualTensor:
            raise RuntimeError("no backward")
        return (out - y).square().mean(1)

    with pytest.warns(UserWarning, match=r"`verify` could not compare.*RuntimeError: no backward"):
        ForwardGradient(linears((3, 4))[0], loss, perturb="weights")(data(6, 3), data(6, 4))


def test_a_leaf_that_the_model_makes_itself_is_nobodys():
    """Such as the positions of a T5 that checkpoints its blocks."""

    def forward(parts, x):
        scale = torch.ones(1, dtype=x.dtype)
        scale.requires_grad = True
        return parts[1](torch.tanh(parts[0](x)) * scale)

    model = OfParts(forward, *linears((4, 4), (4, 4)))
    ForwardGradient(model, nn.MSELoss())(data(4, 4), data(4, 4))
    assert all(p.grad is not None for p in model.parameters())


def test_the_model_runs_once_with_nobody_looking_on(monkeypatch):
    """A branch on whether a value needs a gradient, behind a layer that needs none."""

    def forward(parts, x):
        with torch.no_grad():
            h = parts[0](x)
        h = parts[1](h)
        return parts[2](2 * h if h.requires_grad else -h)

    frozen = linears((4, 4), (4, 4), (4, 4))
    frozen[1].requires_grad_(False)
    model = OfParts(forward, *frozen)
    monkeypatch.setattr(
        "multitangent.perturbation._activation_run.ActivationRun.is_perturbed",
        lambda self, name, value: True,
    )
    gradient = ForwardGradient(model, nn.MSELoss(), perturb=Activations(["parts.1", "parts.2"]))
    with pytest.raises(VerificationError, match="should give the same losses"):
        gradient(data(4, 4), data(4, 4))


def test_what_depends_on_nothing_trained_is_not_perturbed():
    def forward(parts, x):
        h = parts[0](x)
        return parts[1](2 * h if h.requires_grad else -h)

    first, last = linears((4, 4), (4, 4))
    model = OfParts(forward, first.requires_grad_(False), last)
    gradient = ForwardGradient(model, nn.MSELoss(), perturb=Activations(["parts.0", "parts.1"]))
    value = gradient(data(4, 4), data(4, 4))
    torch.testing.assert_close(value, nn.MSELoss()(model(data(4, 4)), data(4, 4)).detach())
    assert gradient.sites == {"parts.1": 4}
