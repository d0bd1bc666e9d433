"""Models of `transformers`, built from small configurations, unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_for_tests import relative_error
from multitangent import ForwardGradient, Projection, SimulatedGradient
from multitangent.tangents import Normal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tf = pytest.importorskip("transformers")
    tf.logging.set_verbosity_error()

B, T, V, D = 3, 5, 11, 4
COMMON = {
    "vocab_size": V, "hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 6,
}  # fmt: skip
ONE_GROUP = COMMON | {"num_key_value_heads": 1}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CLASSES = {"num_labels": 3}
IMAGES = {key: COMMON[key] for key in COMMON if key != "vocab_size"} | CLASSES
SMALL_IMAGES = IMAGES | {"image_size": 4, "patch_size": 2}


def of_tokens(output: Any, target: Tensor) -> Tensor:
    """Language modelling: the mean over a sample's tokens."""
    return F.cross_entropy(output.logits.mT, target, reduction="none").mean(1)


def of_class(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, target % 3, reduction="none")


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(V, (B, T))}


def masked_tokens() -> dict[str, Tensor]:
    return tokens() | {"attention_mask": (torch.arange(T) < torch.tensor([[5], [3], [4]])).long()}


def both_tokens() -> dict[str, Tensor]:
    return tokens() | {"decoder_input_ids": torch.randint(V, (B, T))}


def images(size: int = 4) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(B, 3, size, size)}


def larger_images() -> dict[str, Tensor]:
    return images(16)


def sounds() -> dict[str, Tensor]:
    return {"input_features": torch.randn(B, 4, 8)}


Case = tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], Any]


def causal(name: str, **options: Any) -> Case:
    return lambda: _model(f"{name}ForCausalLM", f"{name}Config", options), tokens, of_tokens


def classifier(name: str, kind: str, inputs: Any, **options: Any) -> Case:
    return (
        lambda: _model(f"{name}For{kind}Classification", f"{name}Config", options),
        inputs,
        of_class,
    )


def _model(model: str, config: str, options: dict[str, Any]) -> nn.Module:
    return getattr(tf, model)(getattr(tf, config)(**options))


MODELS: dict[str, Case] = {
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(
                vocab_size=V, n_positions=T, n_embd=D, n_layer=2, n_head=2, n_inner=6,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        ),
        tokens,
        of_tokens,
    ),
    "llama": causal("Llama", **ONE_GROUP),
    "qwen": causal("Qwen2", **ONE_GROUP),
    "gemma": causal("Gemma", **ONE_GROUP, head_dim=2),
    "gpt-neox": causal("GPTNeoX", **COMMON),
    "opt": causal(
        "OPT", vocab_size=V, hidden_size=D, num_hidden_layers=2, ffn_dim=6, num_attention_heads=2,
        max_position_embeddings=T, word_embed_proj_dim=D, dropout=0.0,
    ),
    "mamba": causal("Mamba", vocab_size=V, hidden_size=D, num_hidden_layers=2, state_size=2),
    "bert": classifier(
        "Bert", "Sequence", masked_tokens, **COMMON, **CLASSES, **NO_DROPOUT,
        max_position_embeddings=T,
    ),
    "roberta": classifier(
        "Roberta", "Sequence", masked_tokens, **COMMON, **CLASSES, **NO_DROPOUT,
        max_position_embeddings=T + 2, pad_token_id=1,
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(
                vocab_size=V, d_model=D, d_kv=2, d_ff=6, num_layers=2, num_heads=2,
                dropout_rate=0.0,
            )
        ),
        both_tokens,
        of_tokens,
    ),
    "vit": classifier("ViT", "Image", images, **SMALL_IMAGES),
    "deit": classifier("DeiT", "Image", images, **SMALL_IMAGES),
    "beit": classifier("Beit", "Image", images, **SMALL_IMAGES, drop_path_rate=0.0),
    "swin": classifier(
        "Swin", "Image", larger_images, image_size=16, patch_size=4, embed_dim=4, depths=[1, 1],
        num_heads=[1, 2], window_size=2, drop_path_rate=0.0, **CLASSES,
    ),
    "whisper": classifier(
        "Whisper", "Audio", sounds, d_model=D, encoder_layers=2, encoder_attention_heads=2,
        encoder_ffn_dim=6, num_mel_bins=4, max_source_positions=4, classifier_proj_size=4,
        dropout=0.0, **CLASSES,
    ),
}  # fmt: skip
# Their normalisation computes in single precision, whatever the model's type.
SINGLE = {"llama", "qwen", "gemma", "t5", "mamba"}


def made(
    name: str, attention: str | None = None
) -> tuple[nn.Module, dict[str, Tensor], Tensor, Any]:
    make, inputs, loss = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().double()
        batch = {k: v.double() if v.is_floating_point() else v for k, v in inputs().items()}
        target = torch.randint(V, (B, T) if loss is of_tokens else (B,))
    if attention is not None:
        model.set_attn_implementation(attention)
    return model, batch, target, loss


def right(model: nn.Module, batch: dict[str, Tensor], target: Tensor, loss: Any) -> list[Tensor]:
    """The gradients of backpropagation, taken away from the model."""
    loss(model(**batch), target).mean().backward()
    return taken(model)


def taken(model: nn.Module) -> list[Tensor]:
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    model.zero_grad()
    return found


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", MODELS)
def test_as_many_tangents_as_dimensions_give_backpropagation(name: str, mode: str) -> None:
    model, batch, target, loss = made(name)
    model.train(mode == "train")
    expected = right(model, batch, target, loss)
    ForwardGradient(model, loss, Normal(1))(batch, target)
    gradient = ForwardGradient(model, loss, Normal(1))
    gradient(batch, target)
    count = sum(size or 0 for size in gradient.sites.values())
    model.zero_grad()
    ForwardGradient(model, loss, Normal(count + 20), Projection())(batch, target)
    assert relative_error(taken(model), expected) < (1e-5 if name in SINGLE else 1e-8)


@pytest.mark.parametrize("perturb", ["activations", "weights"])
@pytest.mark.parametrize("name", MODELS)
def test_forward_equals_simulated(name: str, perturb: str) -> None:
    model, batch, target, loss = made(name)
    ForwardGradient(model, loss, Normal(3), perturb=perturb)(batch, target)
    found = taken(model)
    SimulatedGradient(model, loss, Normal(3), perturb=perturb)(batch, target)
    assert relative_error(found, taken(model)) < (1e-5 if name in SINGLE else 1e-8)


@pytest.mark.parametrize("perturb", ["activations", "weights"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert", "vit", "whisper"])
def test_every_attention(name: str, attention: str, perturb: str) -> None:
    """Kernels of attention differ in rounding alone."""
    found = []
    for implementation in (attention, None):
        model, batch, target, loss = made(name, implementation)
        ForwardGradient(model, loss, Normal(3), perturb=perturb)(batch, target)
        found.append(taken(model))
    assert relative_error(*found) < (1e-5 if name in SINGLE else 1e-8)


@pytest.mark.parametrize("perturb", ["activations", "weights"])
@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert", "t5", "vit"])
def test_checkpointing_that_the_user_switches_on_changes_nothing(name: str, perturb: str) -> None:
    found = []
    for checkpointing in (False, True):
        model, batch, target, loss = made(name)
        model.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another name, and of caches that it switches off
            if checkpointing:
                model.gradient_checkpointing_enable()
            ForwardGradient(model, loss, Normal(3), perturb=perturb)(batch, target)
        found.append(taken(model))
    assert relative_error(*found) < 1e-8
