"""Gradients whose random numbers come from a counter-based generator."""

from __future__ import annotations

import shutil
import warnings

import pytest
import torch
from torch import nn

from models_for_tests import build, gradients, relative_error
from multitangent import Activations, ForwardGradient, Normal, Projection, Rademacher
from multitangent.tangents import LowRank, Stream, TangentSource

LOSS = nn.CrossEntropyLoss()
OWN = Activations(share="sample", output="exact")
PERTURBATIONS = ["activations", OWN, "weights"]


def taken(source: TangentSource, perturb, name="dropout", steps=1, **options) -> list[torch.Tensor]:
    """The gradients of the last of some steps."""
    model, x, y, _ = build(name)
    gradient = ForwardGradient(
        model, LOSS, source, Projection(), perturb, generator="philox", **options
    )
    for _ in range(steps):
        model.zero_grad()
        gradient(x, y)
    return gradients(model)


@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=str)
@pytest.mark.parametrize("source", [Normal, Rademacher])
def test_as_many_tangents_as_dimensions_give_the_true_gradient(source, perturb):
    model, x, y, n = build("mlp")
    count = n + 60 if perturb != "weights" else sum(p.numel() for p in model.parameters()) + 60
    found = taken(source(count), perturb, "mlp")
    LOSS(model(x), y).backward()
    assert relative_error(found, gradients(model)) < 1e-8


@pytest.mark.parametrize("perturb", PERTURBATIONS, ids=str)
def test_neither_parts_nor_storage_change_the_step(perturb):
    whole = taken(Normal(3) + Rademacher(2), perturb)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for options in ({"micro_batch": 2}, {"store_tangents": False}):
            parts = taken(Normal(3) + Rademacher(2), perturb, **options)
            assert relative_error(parts, whole) < 1e-10


def test_steps_sites_and_summands_draw_other_numbers():
    first, second = taken(Normal(2), OWN), taken(Normal(2), OWN, steps=2)
    assert relative_error(first, second) > 1e-3
    one, two = (Stream(0, step, "philox") for step in (0, 1))
    assert one.fold_in("x") != two.fold_in("x")
    factors = taken(LowRank(3), "weights", "mlp"), taken(Normal(3), "weights", "mlp")
    assert relative_error(*factors) > 1e-3


@pytest.mark.filterwarnings("ignore:.*deprecated")
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a compiler")
def test_a_compiled_step_draws_the_same():
    warnings.filterwarnings("error", "`compile=True` is left out")
    plain, compiled = (taken(Normal(4), OWN, steps=3, compile=compile) for compile in (False, True))
    assert relative_error(compiled, plain) < 1e-8


def test_a_state_belongs_to_its_generator():
    model, *_ = build("mlp")
    state = ForwardGradient(model, LOSS, Normal(2)).state_dict()
    with pytest.raises(ValueError, match=r"generator='philox'\. Found 'torch'"):
        ForwardGradient(model, LOSS, Normal(2), generator="philox").load_state_dict(state)
    with pytest.raises(ValueError, match="`generator` should be 'torch' or 'philox'"):
        ForwardGradient(model, LOSS, generator="numpy")


def test_an_assessment_draws_several_times():
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(2), generator="philox")
    found = gradient.assess(x, y, repeats=20)
    assert found.cosine_of_mean > found.cosine
