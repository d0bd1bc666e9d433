"""Adapters of `peft` around models of `transformers`, unchanged: what is trainable is trained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_for_tests import relative_error
from multitangent import Activations, ForwardGradient, Projection, SimulatedGradient
from multitangent.dual import DualTensor
from multitangent.gradient import GradientEstimator
from multitangent.tangents import LowRank, Normal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tf = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    tf.logging.set_verbosity_error()

# Of names in `transformers` that `peft` still uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

B, T, V, D = 3, 5, 11, 4
LANGUAGE = {"task_type": "CAUSAL_LM"}
TWO = {"num_virtual_tokens": 2} | LANGUAGE
# GPT-2 has its weights transposed.
GPT2 = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} | LANGUAGE
OPT = {"target_modules": ["q_proj", "fc2"]} | LANGUAGE
RANK_TWO = {"r": 2, "init_lora_weights": False}


def gpt2(layers: int = 2) -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=V, n_positions=T + 2, n_embd=D, n_layer=layers, n_head=2, n_inner=6,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


def opt() -> nn.Module:
    """A model of linear layers that computes in double precision throughout."""
    config = tf.OPTConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, ffn_dim=6, num_attention_heads=2,
        max_position_embeddings=T + 2, word_embed_proj_dim=D, dropout=0.0,
    )  # fmt: skip
    return tf.OPTForCausalLM(config)


def llama() -> nn.Module:
    config = tf.LlamaConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=6, num_key_value_heads=1,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


Adapter = tuple[Callable[[], nn.Module], Callable[[], Any]]

IN_BLOCKS: dict[str, Adapter] = {
    "lora": (gpt2, lambda: peft.LoraConfig(**RANK_TWO, **GPT2)),
    "lora-llama": (llama, lambda: peft.LoraConfig(**RANK_TWO, **LANGUAGE)),
    "dora": (gpt2, lambda: peft.LoraConfig(**RANK_TWO, **GPT2, use_dora=True)),
    "ia3": (gpt2, lambda: peft.IA3Config(**GPT2, feedforward_modules=["c_fc"])),
    "vera": (
        gpt2,
        lambda: peft.VeraConfig(
            r=2, target_modules=["c_attn"], fan_in_fan_out=True, d_initial=0.3, **LANGUAGE
        ),
    ),
    "loha": (opt, lambda: peft.LoHaConfig(r=2, **OPT)),
    "lokr": (opt, lambda: peft.LoKrConfig(r=2, **OPT)),
    "adalora": (
        gpt2,
        lambda: peft.AdaLoraConfig(
            init_r=3, target_r=2, total_step=10, init_lora_weights=False, **GPT2
        ),
    ),
}
# Trained vectors among the tokens, or among the keys and values of every block.
PROMPTS: dict[str, Adapter] = {
    "prompt": (gpt2, lambda: peft.PromptTuningConfig(**TWO)),
    "p-tuning": (gpt2, lambda: peft.PromptEncoderConfig(**TWO, encoder_hidden_size=3)),
    "prefix": (gpt2, lambda: peft.PrefixTuningConfig(**TWO)),
    "prefix-projection": (
        gpt2,
        lambda: peft.PrefixTuningConfig(**TWO, prefix_projection=True, encoder_hidden_size=3),
    ),
}
ADAPTERS = IN_BLOCKS | PROMPTS
SINGLE = {"lora-llama"}  # its normalisation computes in single precision


def language_loss(output: Any, target: Tensor) -> Tensor:
    """The mean over a sample's tokens, without those of a prompt in front of them."""
    logits = output.logits[:, -target.shape[1] :]
    return F.cross_entropy(logits.mT, target, reduction="none").mean(1)


def made(name: str, perturb: str) -> tuple[nn.Module, dict[str, Tensor], Tensor, Any]:
    """A model with an adapter, whose weights are not what adapters begin with; a batch."""
    base, config = ADAPTERS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(base(), config()).double()
        for parameter in trainable(model):
            parameter.data.add_(0.3 * torch.randn_like(parameter))
        inputs, target = {"input_ids": torch.randint(V, (B, T))}, torch.randint(V, (B, T))
    if perturb == "activations" and name in ("prompt", "p-tuning"):
        # The prompt is one for all samples: the first place that has one of each is a block.
        return model, inputs, target, Activations(sites=["base_model.transformer.h.0"])
    return model, inputs, target, perturb


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def taken(model: nn.Module) -> list[Tensor]:
    """The gradients of what is trainable, taken away from the model."""
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable(model)]
    model.zero_grad()
    return found


PERTURBED = pytest.mark.parametrize("perturb", ["activations", "weights"])


@PERTURBED
@pytest.mark.parametrize("name", ADAPTERS)
def test_as_many_tangents_as_dimensions_give_backpropagation(name: str, perturb: str) -> None:
    model, inputs, target, perturbation = made(name, perturb)
    language_loss(model(**inputs), target).mean().backward()
    right = taken(model)
    gradient = ForwardGradient(model, language_loss, Normal(1), perturb=perturbation)
    gradient(inputs, target)
    n = sum(size or 0 for size in gradient.sites.values())
    if perturb == "weights":
        assert n == sum(p.numel() for p in trainable(model))
    model.zero_grad()
    full = ForwardGradient(model, language_loss, Normal(n + 20), Projection(), perturb=perturbation)
    full(inputs, target)
    assert relative_error(taken(model), right) < (1e-5 if name in SINGLE else 1e-8)


@PERTURBED
@pytest.mark.parametrize("name", ADAPTERS)
def test_forward_equals_simulated(name: str, perturb: str) -> None:
    model, inputs, target, perturbation = made(name, perturb)
    found = []
    for kind in (ForwardGradient, SimulatedGradient):
        kind(model, language_loss, Normal(3), perturb=perturbation)(inputs, target)
        found.append(taken(model))
    assert relative_error(*found) < (1e-5 if name in SINGLE else 1e-8)


@pytest.mark.parametrize("name", ADAPTERS)
def test_factors_of_tangents(name: str) -> None:
    """Tangents of low rank, for adapters that are matrices and for those that are vectors."""
    model, inputs, target, _ = made(name, "weights")
    found = []
    for kind in (ForwardGradient, SimulatedGradient):
        kind(model, language_loss, LowRank(4), perturb="weights")(inputs, target)
        found.append(taken(model))
    assert relative_error(*found) < (1e-5 if name in SINGLE else 1e-8)


@PERTURBED
@pytest.mark.parametrize("kind", ["lora", "adalora", "loha"])
def test_dropout_inside_adapters(kind: str, perturb: str) -> None:
    """Every kind of gradient sees the same masks, which change from step to step."""
    base, _ = ADAPTERS[kind]
    config = {
        "lora": lambda: peft.LoraConfig(**RANK_TWO, **GPT2, lora_dropout=0.5),
        "adalora": lambda: peft.AdaLoraConfig(
            init_r=3, total_step=10, init_lora_weights=False, lora_dropout=0.5, **GPT2
        ),
        "loha": lambda: peft.LoHaConfig(r=2, init_weights=False, rank_dropout=0.5, **OPT),
    }[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = peft.get_peft_model(base(), config()).double().train()
        inputs, target = {"input_ids": torch.randint(V, (B, T))}, torch.randint(V, (B, T))
    gradients: list[GradientEstimator] = [
        estimator(model, language_loss, Normal(3), perturb=perturb)
        for estimator in (ForwardGradient, SimulatedGradient)
    ]
    losses = []
    for _step in range(2):
        values, found = [], []
        for gradient in gradients:
            values.append(gradient(inputs, target))
            found.append(taken(model))
        assert relative_error(*found) < 1e-8
        torch.testing.assert_close(*values, rtol=1e-12, atol=0)
        losses.append(values[0])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_sites_are_the_blocks_of_the_base_model(name: str) -> None:
    model, inputs, target, _ = made(name, "activations")
    gradient = ForwardGradient(model, language_loss, Normal(1))
    gradient(inputs, target)
    assert len(gradient.sites) == 2 and set(gradient.sites.values()) == {T * D}


@pytest.mark.parametrize("name", ["prompt", "p-tuning"])
def test_a_prompt_that_all_samples_share_is_a_clear_error(name: str) -> None:
    model, inputs, target, _ = made(name, "weights")
    with pytest.raises(
        ValueError,
        match=r"Found none: 'prompt_encoder.*' returns shape \[1, 2, .*"
        r"`Activations\(sites=\['base_model.transformer.h.0'\]",
    ):
        ForwardGradient(model, language_loss)(inputs, target)


@contextmanager
def modules_with_tangents(model: nn.Module) -> Iterator[set[str]]:
    """The names of the modules that dual tensors enter or leave."""
    found: set[str] = set()

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            values = torch.utils._pytree.tree_leaves((args, kwargs, output))
            if any(isinstance(value, DualTensor) for value in values):
                found.add(name)

        return hook

    handles = [
        module.register_forward_hook(note(name), with_kwargs=True)
        for name, module in model.named_modules()
    ]
    yield found
    for handle in handles:
        handle.remove()


@PERTURBED
@pytest.mark.parametrize("micro_batch", [1, B])
def test_tangents_begin_where_the_first_trainable_part_sits(perturb: str, micro_batch: int) -> None:
    config = peft.LoraConfig(**RANK_TWO, **GPT2, layers_to_transform=[2], layers_pattern="h")
    model = peft.get_peft_model(gpt2(layers=4), config)
    inputs, target = {"input_ids": torch.randint(V, (B, T))}, torch.randint(V, (B, T))
    gradient = ForwardGradient(
        model, language_loss, Normal(2), perturb=perturb, micro_batch=micro_batch, verify=False
    )
    with modules_with_tangents(model) as found:
        gradient(inputs, target)
    blocks = {int(name.split(".h.")[1].split(".")[0]) for name in found if ".h." in name}
    assert blocks == {2, 3}
    assert not any(name.endswith(("wte", "wpe")) for name in found)
