"""Laws of the sources of guesses, over one table of them."""

from __future__ import annotations

import copy

import pytest
import torch
from guess_laws import LOSS, gradient_blocks, same_training, trained
from torch import nn

import multitangent
from models_for_tests import build, gradients, relative_error
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
    SimulatedGradient,
)
from multitangent.gradient import step
from multitangent.tangents import Needs, Normalized, RunningMean, ScaledByRMS
from pairwise import pairwise

WITH_GUESSES = [
    Feedback(), Feedback(3, step_size=1.0, gated=False), LocalLoss(),
    LocalLoss(2, learning_rate=0.1), RunningMean(), RunningMean(2, decay=0.5), OwnValue(),
    OwnValue(2),
]  # fmt: skip


MIXTURES = [
    *(Normal(2) + source for source in WITH_GUESSES),
    Feedback(2) + Normal(2),  # missing rows that are not the last
    Rademacher(1) + LocalLoss(2) + Normalized(RunningMean()) + Normal(1) + Feedback(),
    ScaledByRMS(Normal(2), decay=0.5) + Feedback(),
]


PERTURBATIONS = [
    Activations(),
    Activations(share="sample"),
    Activations(output="exact"),
    Activations(share="sample", output="exact", recompute=True),
]


SIMULATED = pairwise(
    MIXTURES,
    ["mlp", "cnn", "attention", "norms", "dropout"],
    PERTURBATIONS,
    [Projection(), ControlVariate(0.5), Mean()],
)


@pytest.mark.parametrize(("source", "name", "perturb", "aggregator"), SIMULATED)
def test_equals_the_simulation(source, name, perturb, aggregator):
    model, x, y, _ = build(name)
    rest = source, aggregator, perturb
    real, simulated = (ForwardGradient, *rest, {}), (SimulatedGradient, *rest, {})
    assert same_training(model, real, simulated, x, y)


SPLIT = pairwise(
    MIXTURES,
    PERTURBATIONS,
    [{"micro_batch": 1}, {"micro_batch": 4}, {"store_tangents": False}],
)


@pytest.mark.parametrize(("source", "perturb", "options"), SPLIT)
def test_neither_the_split_nor_the_store_changes_anything(source, perturb, options):
    model, x, y, _ = build("attention")
    rest = ForwardGradient, source, ControlVariate(), perturb
    assert same_training(model, (*rest, {}), (*rest, options), x, y)


@pytest.mark.parametrize("source", MIXTURES, ids=repr)
def test_a_saved_state_goes_on(source):
    model, x, y, _ = build("mlp")
    whole = copy.deepcopy(model)
    trained(ForwardGradient(whole, LOSS, source, ControlVariate()), x, y, 6)
    first = ForwardGradient(model, LOSS, source, ControlVariate())
    trained(first, x, y, 3)
    state = copy.deepcopy(first.state_dict())
    trained(first, x, y, 1)  # after the state was taken: it must not have part in this
    second_model = build("mlp")[0]
    trained(ForwardGradient(second_model, LOSS, source, ControlVariate()), x, y, 3)
    second = ForwardGradient(second_model, LOSS, source, ControlVariate())
    second.load_state_dict(state)
    before = repr(state)
    trained(second, x, y, 3)
    assert repr(state) == before  # what was loaded is a copy
    found, expected = ([p.detach() for p in m.parameters()] for m in (second_model, whole))
    assert relative_error(found, expected) <= 1e-12


@pytest.mark.parametrize("source", WITH_GUESSES, ids=repr)
def test_a_description_has_no_memory(source):
    assert eval(repr(source), {type(source).__name__: type(source)}) == source
    assert source.guesses == (True,) * source.num_tangents
    assert (Normal(2) + source).guesses == (False,) * 2 + source.guesses
    model, x, y, _ = build("mlp")
    mixture = Normal(2) + source
    one, other = (ForwardGradient(copy.deepcopy(model), LOSS, mixture) for _ in range(2))
    trained(one, x, y, 3)
    trained(other, x, y, 1)
    fresh = ForwardGradient(model, LOSS, mixture)
    trained(fresh, x, y, 1)
    assert relative_error(gradients(model), gradients(other.model)) == 0


def test_rows_of_later_sites_are_not_carried_before_them():
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(1) + LocalLoss(5))
    gradient(x, y)
    counts = [len(block.rows()) for block in gradient_blocks(gradient, x, y)]
    assert counts == list(range(2, 2 + len(counts)))


BAD = [
    (lambda: Feedback(0), "`num_tangents` should be an integer of at least 1"),
    (lambda: Feedback(step_size=1.5), "`step_size` should be above 0 and at most 1"),
    (lambda: LocalLoss(learning_rate=0.0), "`learning_rate` should be above 0"),
    (lambda: LocalLoss(pool=0), "`pool` should be at least 1"),
    (lambda: ScaledByRMS(Normal(2), decay=1.0), "`decay` should be at least 0 and below 1"),
    (lambda: ScaledByRMS(Normal(2), spread=0.0), "`spread` should be above 0 and at most 1"),
    (lambda: RunningMean(decay=1.0), "`decay` should be at least 0 and below 1"),
    (lambda: ControlVariate(0.0), "`gain` should be 'auto', or above 0 and at most 1"),
    (lambda: ControlVariate("most"), "`gain` should be 'auto', .* Found 'most'"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("source", [Feedback(), LocalLoss()], ids=repr)
def test_weights_have_no_output_error(source):
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(2) + source, perturb="weights")
    with pytest.raises(ValueError, match="should be among the tangents of activations"):
        gradient(x, y)


def test_sources_that_learn_are_drawn_for_a_gradient():
    with pytest.raises(RuntimeError, match="should be drawn from after `init"):
        multitangent.forward_gradient(torch.sum, torch.ones(3), Normal(2) + RunningMean())


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return {"logits": self.layer(x)}


def test_an_output_that_is_no_tensor():
    def loss(output, target):
        return nn.functional.cross_entropy(output["logits"], target, reduction="none")

    gradient = ForwardGradient(TwoOutputs(), loss, Normal(2) + Feedback())
    with pytest.raises(ValueError, match=r"should return one tensor.* Found dict"):
        gradient(torch.ones(2, 4), torch.tensor([0, 1]))


def test_compiled_steps_are_left_out_where_more_than_tensors_is_learned():
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(2) + LocalLoss(), compile=True)
    with pytest.warns(UserWarning, match="has learned, which is not made of tensors alone"):
        gradient(x, y)


@pytest.mark.parametrize("source", [Normal(2), Normal(2) + OwnValue(), Normal(2) + LocalLoss()])
@pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
def test_the_output_is_differentiated_only_for_those_who_ask(source, kind):
    """`LocalLoss` asks in its first step, for the output's shape."""
    model, x, y, _ = build("mlp")
    gradient = kind(model, LOSS, source, perturb=Activations(output="exact"))
    gradient(x, y)
    found = step(*gradient.prepare(x, y))
    assert found.observation is None or found.observation.output_tangents is None
    assert not found.tangents.needs & Needs.OUTPUT


def test_tangents_that_are_not_stored_are_drawn_again_only_for_those_who_ask():
    drawn = []

    class Counted(Normal):
        def draw(self, request):
            drawn.append(request.site)
            return super().draw(request)

    counts = []
    for source in (Counted(2), ScaledByRMS(Counted(2))):
        model, x, y, _ = build("mlp")
        drawn.clear()
        ForwardGradient(model, LOSS, source, perturb="weights", store_tangents=False)(x, y)
        counts.append(len(drawn))
    assert counts[0] == counts[1]
