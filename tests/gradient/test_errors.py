"""Bad input: each mistake has an error of its own, which says what to do."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from multitangent import (
    Activations,
    ForwardGradient,
    Normal,
    Projection,
    SimulatedGradient,
    Weights,
    forward_gradient,
)
from multitangent.tangents import TangentSource

LOSS = nn.CrossEntropyLoss()


def model():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def batch(size=5):
    return torch.ones(size, 3), torch.zeros(size, dtype=torch.int64)


class Behind(nn.Module):
    """Something happens behind the last site."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x):
        return 2 * self.layer(x)


class Detaching(Behind):
    def forward(self, x):
        return self.layer(x).detach()


class Reducing(Behind):
    def forward(self, x):
        return self.layer(x.mean(0)).expand(len(x), 2)


class Integer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.count = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)

    def forward(self, x):
        return self.layer(x)


class FunctionalBatchNorm(Behind):
    """Statistics of the batch that no module announces."""

    def forward(self, x):
        return nn.functional.batch_norm(self.layer(x), None, None, training=True)


class Wrong(TangentSource):
    """Says two tangents and draws one."""

    num_tangents = 2

    def draw(self, request):
        return torch.ones(1, 1, *request.shape)


def frozen():
    return model().requires_grad_(False)


def build(module, loss=LOSS, **kwargs):
    return lambda: ForwardGradient(module, loss, Normal(2), **kwargs)


def step(module, loss=LOSS, inputs=None, target=None, **kwargs):
    def call():
        x, y = batch()
        gradient = ForwardGradient(module, loss, Normal(2), **kwargs)
        return gradient(x if inputs is None else inputs, y if target is None else target)

    return call


def in_inference_mode():
    with torch.inference_mode():
        step(model())()


def function_in_inference_mode():
    with torch.inference_mode():
        forward_gradient(torch.sum, torch.ones(2))


ERRORS = {
    "unknown site": (build(model(), perturb=Activations(sites=["5"])), ValueError, "Found '5'"),
    "nested sites": (
        build(nn.Sequential(model(), nn.Linear(2, 2)), perturb=Activations(["0", "0.2", "1"])),
        ValueError, "inside one another.*'0' and '0.2'",
    ),
    "outside weights": (build(model(), perturb=Weights(["0.weight"])), ValueError, "0.bias, 2.we"),
    "unknown parameter": (build(model(), perturb=Weights(["w"])), ValueError, "Found 'w'"),
    "integer parameter": (
        build(Integer(), perturb=Weights(["layer.weight", "layer.bias", "count"])),
        TypeError, "Found count of torch.int64",
    ),
    "nothing to train": (build(frozen()), ValueError, "should have trainable parameters"),
    "no weights": (build(frozen(), perturb="weights"), ValueError, "should have trainable"),
    "unknown perturbation": (build(model(), perturb="biases"), ValueError, "Found 'biases'"),
    "unknown share": (lambda: Activations(share="all"), ValueError, "`share` should be one of"),
    "unknown output": (lambda: Activations(output="x"), ValueError, "`output` should be one of"),
    "sites as text": (build(model(), perturb=Activations("0")), ValueError, "the text '0'"),
    "number as tangents": (
        lambda: ForwardGradient(model(), LOSS, 16), TypeError, "`tangents` should be.*Found 16"
    ),
    "class as aggregator": (
        lambda: forward_gradient(torch.sum, torch.ones(3), Normal(2), Projection), TypeError,
        "`aggregator` should be of type Aggregator",
    ),
    "source of another shape": (
        lambda: ForwardGradient(model(), LOSS, Wrong())(*batch()), ValueError,
        r"`draw` of .* shape \[2, 1, 4\] of torch.float32.* Found \[1, 1, 4\]",
    ),
    "micro-batch": (build(model(), micro_batch=0), ValueError, "`micro_batch` should be 'auto'"),
    "scalar loss": (
        step(model(), nn.functional.cross_entropy), ValueError, r"one number per sample.*shape \[\]"
    ),
    "loss of another size": (
        step(model(), lambda out, y: out.flatten()), ValueError, "Found 10 numbers for 5 samples"
    ),
    "no tensor as loss": (step(model(), lambda out, y: 1.0), ValueError, "Found 1.0"),
    "detached": (step(Detaching()), RuntimeError, "losses without derivatives"),
    "no batch axis": (step(Reducing()), ValueError, "should have outputs that depend on the samp"),
    "operations behind the last site": (
        step(Behind(), perturb=Activations(output="exact", recompute=True)), ValueError,
        "operations behind it",
    ),
    "empty batch": (step(model(), inputs=torch.ones(0, 3)), ValueError, r"of shape \[0, 3\]"),
    "no tensor": (step(model(), inputs="x"), ValueError, "Found a str"),
    "not finite": (
        step(model(), inputs=torch.full((5, 3), float("nan"))), ValueError, "`jvps` should be fin"
    ),
    "statistics": (
        lambda: SimulatedGradient(model(), nn.CrossEntropyLoss(), statistics="none"),
        ValueError, r"`statistics` should be one of \['frozen', 'coupled'\]. Found 'none'",
    ),
    "inference mode": (in_inference_mode, RuntimeError, "outside torch.inference_mode"),
    "function in inference mode": (function_in_inference_mode, RuntimeError, "inference_mode"),
    "function not scalar": (
        lambda: forward_gradient(torch.sin, torch.ones(3)), ValueError, r"`f`.*scalar.*shape \[3\]"
    ),
    "function of integers": (
        lambda: forward_gradient(torch.sum, torch.ones(3, dtype=torch.int64)), TypeError, "int64"
    ),
    "function of a number": (lambda: forward_gradient(torch.sum, 3.0), TypeError, "Found float"),
    "function not finite": (
        lambda: forward_gradient(lambda x: x.sum() / 0, torch.ones(3)), ValueError, "Found inf"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    call, error, message = ERRORS[name]
    with pytest.raises(error, match=f"(?s){message}"):
        call()


def test_recomputation_notices_a_changed_input():
    class Changing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            h = self.first(x)
            out = self.second(h)
            h.add_(1)
            return out

    gradient = ForwardGradient(
        Changing(), LOSS, Normal(2), perturb=Activations(recompute=True), verify=False
    )
    with pytest.raises(RuntimeError, match="changed in place after the layer ran"):
        gradient(*batch())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": lambda x: x}, "`model` should be a torch.nn.Module. Found <function"),
        ({"model": nn.Linear}, "`model` should be a torch.nn.Module. Found <class"),
        (
            {"model": torch.compile(model(), backend="eager")},
            r"`model` should be a plain module.* torch\.compile",
        ),
        ({"loss": nn.CrossEntropyLoss}, "`loss` should be a function or loss module. Found <class"),
        ({"seed": "a"}, "`seed` should be an integer. Found 'a'"),
        ({"store_tangents": "no"}, "`store_tangents` should be True or False. Found 'no'"),
        ({"compile": 1}, "`compile` should be True or False. Found 1"),
        ({"tangent_dtype": "bfloat16"}, "`tangent_dtype` should be a floating torch.dtype"),
        ({"tangent_dtype": torch.int32}, "`tangent_dtype` should be a floating torch.dtype"),
        ({"tangents": 3}, "`tangents` should be of type TangentSource. Found 3"),
    ],
)
def test_arguments_of_another_kind(arguments, message):
    with pytest.raises(TypeError, match=message):
        ForwardGradient(**{"model": model(), "loss": LOSS} | arguments)


@pytest.mark.parametrize("convert", [lambda x: x.numpy(), lambda x: x.__array__()])
def test_a_model_that_leaves_pytorch(convert):
    class Leaving(Behind):
        def forward(self, x):
            return torch.as_tensor(convert(self.layer(x)))

    with pytest.raises(RuntimeError, match=r"Found a conversion to an array. Try `.detach\(\)`"):
        ForwardGradient(Leaving(), LOSS, micro_batch=5)(*batch())


def test_a_model_for_batches_of_one_size_only():
    class OfFive(Behind):
        def forward(self, x):
            return self.layer(x + torch.ones(5, 1))

    gradient = ForwardGradient(OfFive(), LOSS)
    assert gradient(*batch()).isfinite()
