"""Losses that a model computes by itself, and their form for each sample."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models_for_tests import linear, relative_error
from multitangent import ForwardGradient, Projection, SimulatedGradient
from multitangent.objective import LogitsLoss
from multitangent.tangents import LowRank, Normal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tf = pytest.importorskip("transformers")

V, T = 7, 5
EXACT = 1e-5  # `transformers` takes the loss of a language model in single precision


def language_model(seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny GPT-2, and tokens some of which are padding that does not count."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tf.GPT2Config(
            vocab_size=V, n_positions=T, n_embd=4, n_layer=2, n_head=2, n_inner=4,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
        model = tf.GPT2LMHeadModel(config).double()
        tokens = torch.randint(V, (4, T))
    mask = torch.arange(T) < torch.tensor([[5], [2], [4], [3]])
    labels = torch.where(mask, tokens, -100)
    return model, {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


def classifier() -> tuple[nn.Module, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = tf.BertConfig(
            vocab_size=V, hidden_size=4, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=4, max_position_embeddings=T, num_labels=3,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        model = tf.BertForSequenceClassification(config).double()
    return model, {"input_ids": torch.arange(20).reshape(4, T) % V, "labels": torch.arange(4) % 3}


def own_loss(output: Any, target: Any) -> Tensor:
    return output.loss


def right(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
    model = copy.deepcopy(model)
    loss = model(**batch).loss
    loss.backward()
    return loss.detach().double(), [p.grad for p in model.parameters() if p.grad is not None]


def taken(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("make", [language_model, classifier])
def test_one_number_for_the_batch_is_enough_for_weights(make: Any) -> None:
    model, batch = make()
    loss, expected = right(model, batch)
    count = sum(p.numel() for p in model.parameters())
    gradient = ForwardGradient(model, own_loss, Normal(count + 9), Projection(), "weights")
    assert abs(gradient(batch) - loss) < EXACT
    found = [p.grad for p in model.parameters() if p.grad.any()]
    assert relative_error(found, [g for g in expected if g.any()]) < EXACT


@pytest.mark.parametrize("micro_batch", ["auto", 1, 2])
@pytest.mark.parametrize("source", [Normal(3), LowRank(3)], ids=repr)
def test_it_is_never_split(source: Any, micro_batch: Any) -> None:
    """The mean over the tokens of a part is not the mean over those of the batch."""
    model, batch = language_model()
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ForwardGradient(model, own_loss, source, perturb="weights", micro_batch=micro_batch)(batch)
    SimulatedGradient(other, own_loss, source, perturb="weights")(batch)
    assert relative_error(taken(model), taken(other)) < EXACT


@pytest.mark.parametrize("perturb", ["activations", "weights"])
@pytest.mark.parametrize("micro_batch", [1, 3, 4])
@pytest.mark.parametrize(("make", "shift"), [(language_model, True), (classifier, False)])
def test_losses_of_samples_have_the_model_s_own_mean(
    make: Any, shift: bool, micro_batch: int, perturb: Any
) -> None:
    model, batch = make()
    loss, expected = right(model, batch)
    labels = batch.pop("labels")
    gradient = ForwardGradient(model, LogitsLoss(shift=shift), Normal(1))
    gradient(batch, labels)
    sizes = gradient.sites.values() if perturb == "activations" else map(torch.numel, taken(model))
    model.zero_grad()
    gradient = ForwardGradient(
        model, LogitsLoss(shift=shift), Normal(sum(sizes) + 20), Projection(), perturb,
        micro_batch=micro_batch,
    )  # fmt: skip
    assert abs(gradient(batch, labels) - loss) < EXACT
    found = [p.grad for p in model.parameters() if p.grad.any()]
    assert relative_error(found, [g for g in expected if g.any()]) < EXACT


def test_activations_need_a_loss_for_each_sample() -> None:
    model, batch = language_model()
    with pytest.raises(ValueError, match=r"one number per sample.*LogitsLoss"):
        ForwardGradient(model, own_loss)(batch)


def test_an_output_without_logits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"should get logits.*Found tuple.*Try"):
        LogitsLoss()((torch.ones(2, 3),), torch.ones(2).long())


def test_logits_may_be_a_tensor() -> None:
    model, x, y = (
        linear(4, 3),
        torch.ones(5, 4, dtype=torch.float64),
        torch.tensor([0, 1, 2, -100, 1]),
    )
    expected = nn.CrossEntropyLoss()(model(x), y)
    value = ForwardGradient(model, LogitsLoss())(x, y)
    torch.testing.assert_close(value, expected.detach())
