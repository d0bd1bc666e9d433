"""Models that need something of the user: the message that says so, and that its advice works."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_for_tests import relative_error
from multitangent import ForwardGradient, SimulatedGradient
from multitangent.tangents import Normal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tf = pytest.importorskip("transformers")
    tf.logging.set_verbosity_error()

B, T, V, D = 3, 8, 11, 4
COMMON = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 6,
}  # fmt: skip
BERT = COMMON | {
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": T,
}  # fmt: skip
GROUPS = dict.fromkeys(("q", "k", "v", "post_attention", "intermediate", "output"), 1)
MIXTRAL = COMMON | {
    "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1,
}  # fmt: skip


def xlnet() -> nn.Module:
    config = tf.XLNetConfig(vocab_size=V, d_model=D, n_layer=2, n_head=2, d_inner=6, dropout=0.0)
    return tf.XLNetLMHeadModel(config)


def squeezebert() -> nn.Module:
    groups = {f"{name}_groups": count for name, count in GROUPS.items()}
    config = tf.SqueezeBertConfig(**BERT, embedding_size=D, **groups)
    return tf.SqueezeBertForMaskedLM(config)


def fnet() -> nn.Module:
    options = {k: v for k, v in BERT.items() if k not in ("num_attention_heads",)}
    del options["attention_probs_dropout_prob"]
    return tf.FNetForMaskedLM(tf.FNetConfig(**options, type_vocab_size=2))


def reformer() -> nn.Module:
    config = tf.ReformerConfig(
        vocab_size=V, hidden_size=D, num_attention_heads=2, attention_head_size=2,
        feed_forward_size=6, attn_layers=["local", "local"], axial_pos_embds=False,
        max_position_embeddings=T, local_attn_chunk_length=4, hidden_dropout_prob=0.0,
        local_attention_probs_dropout_prob=0.0, is_decoder=True,
    )  # fmt: skip
    return tf.ReformerModelWithLMHead(config)


def mixtral(**options: Any) -> nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**MIXTRAL, **options))


def funnel() -> nn.Module:
    config = tf.FunnelConfig(
        vocab_size=V, block_sizes=[1, 1], d_model=D, n_head=2, d_head=2, d_inner=6,
        hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0,
    )  # fmt: skip
    return tf.FunnelForMaskedLM(config)


def loss(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.mT, target, reduction="none").mean(1)


def made(make: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokens, target = torch.randint(3, V, (2, B, T))
        return make().double().train(), {"input_ids": tokens}, target


def taken(model: nn.Module) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize(
    ("make", "perturb", "error", "message"),
    [
        # Time comes before the samples in all of its blocks.
        (xlnet, "activations", ValueError, r"returns shape \[8, 3, 4\].*`perturb='weights'`"),
        # It calls `layer.forward(...)`, which no hook sees.
        (squeezebert, "activations", ValueError, r"module\.forward.*`perturb='weights'`"),
        # It mixes tokens by a Fourier transform.
        (fnet, "weights", NotImplementedError, "Tangents should be real.*view_as_real"),
        # A reversible network with a backward of its own.
        (reformer, "weights", NotImplementedError, "bypasses them"),
        # Not of this library: PyTorch's kernel takes no double precision.
        (mixtral, "weights", RuntimeError, "Expected mat_a to be Float32"),
    ],
    ids=["xlnet", "squeezebert", "fnet", "reformer", "mixtral"],
)
def test_the_message_that_a_user_gets(
    make: Any, perturb: Any, error: type[Exception], message: str
) -> None:
    model, inputs, target = made(make)
    with pytest.raises(error, match=message):
        ForwardGradient(model, loss, Normal(2), perturb=perturb)(inputs, target)


@pytest.mark.parametrize(
    ("make", "perturb"),
    [
        (xlnet, "weights"),
        (squeezebert, "weights"),
        (lambda: mixtral(experts_implementation="eager"), "activations"),
        (funnel, "activations"),  # its blocks are lists of layers
    ],
    ids=["xlnet", "squeezebert", "mixtral", "funnel"],
)
def test_what_helps(make: Any, perturb: Any) -> None:
    model, inputs, target = made(make)
    ForwardGradient(model, loss, Normal(2), perturb=perturb)(inputs, target)
    found = taken(model)
    SimulatedGradient(model, loss, Normal(2), perturb=perturb)(inputs, target)
    single = type(model).__name__.startswith("Mixtral")  # its normalisation
    assert relative_error(found, taken(model)) < (1e-5 if single else 1e-8)


def test_blocks_that_are_lists_of_layers() -> None:
    model, inputs, target = made(funnel)
    gradient = ForwardGradient(model, loss, Normal(1))
    gradient(inputs, target)
    blocks = ["funnel.encoder.blocks.0.0", "funnel.encoder.blocks.1.0"]
    decoder = ["funnel.decoder.layers.0", "funnel.decoder.layers.1"]
    assert list(gradient.sites) == blocks + decoder
