"""Frozen layers of int8 weights below adapters, exact against the same with dequantised weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models_for_tests import relative_error
from multitangent import ForwardGradient, Mean, Projection
from multitangent.dual import register_linear_module
from multitangent.gradient import GradientEstimator
from multitangent.tangents import LowRank, Normal

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    tf = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    tf.logging.set_verbosity_error()

# Of names in `transformers` that `peft` still uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

B, T, V, D = 3, 5, 11, 8
SEED = 0
RANK_TWO = {"r": 2, "init_lora_weights": False, "task_type": "CAUSAL_LM"}


class Int8(nn.Module):
    """The weights of a linear layer as int8, with a scale for each output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight = layer.weight.detach()
        if not isinstance(layer, nn.Linear):  # as GPT-2 has them
            weight = weight.mT
        scale = weight.abs().amax(1) / 127
        self.register_buffer(
            "weight", (weight / scale[:, None]).round().to(torch.int8).contiguous()
        )
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return out if self.bias is None else out + self.bias

    def dequantised(self) -> Tensor:
        return self.weight.to(self.scale.dtype) * self.scale[:, None]


class Packed(Int8):
    """The same by a kernel that has no derivative."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        out = out.reshape(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class Declared(Int8):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


register_linear_module(Declared)
register_linear_module(Packed, transposed=lambda module, g: g @ module.dequantised().to(g.dtype))


def gpt2() -> nn.Module:
    config = tf.GPT2Config(
        vocab_size=V, n_positions=T, n_embd=D, n_layer=2, n_head=2, n_inner=16,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = tf.LlamaConfig(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=16, num_key_value_heads=1,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config)


BASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "llama": (llama, {"target_modules": ["q_proj", "v_proj", "up_proj"]}),
}


def quantised(name: str, kind: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """A model with LoRA, whose frozen linear layers are of another kind."""
    base, options = BASES[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = peft.LoraConfig(**RANK_TWO, **options)
        model: nn.Module = peft.get_peft_model(base(), config).eval()
        for module in model.modules():
            if isinstance(bias := getattr(module, "bias", None), Tensor):
                bias.data.add_(torch.randn_like(bias))
    for block in (m for m in model.modules() if isinstance(m, nn.ModuleList)):
        replace(block, kind)
    return model


def replace(model: nn.Module, kind: Callable[[nn.Module], nn.Module]) -> None:
    """Frozen linear layers by others; what adapters consist of stays."""
    for name, module in model.named_children():
        is_frozen = not any(p.requires_grad for p in module.parameters())
        if type(module).__name__ in ("Linear", "Conv1D") and is_frozen:
            setattr(model, name, kind(module))
        else:
            replace(module, kind)


def dequantised(model: nn.Module) -> nn.Module:
    """The same numbers in ordinary linear layers."""
    other = copy.deepcopy(model)

    def linear(layer: Int8) -> nn.Module:
        out_features, in_features = layer.weight.shape
        plain = nn.Linear(in_features, out_features, bias=layer.bias is not None)
        plain.weight.data = layer.dequantised()
        if layer.bias is not None:
            plain.bias.data = layer.bias
        return plain.requires_grad_(False)

    def visit(module: nn.Module) -> None:
        for name, child in module.named_children():
            if isinstance(child, Int8):
                setattr(module, name, linear(child))
            else:
                visit(child)

    visit(other)
    return other


def language_loss(output: Any, target: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.mT, target, reduction="none").mean(1)


def batch() -> tuple[dict[str, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(SEED)
    tokens, labels = torch.randint(V, (2, B, T), generator=generator)
    return {"input_ids": tokens}, labels


def gradients(
    model: nn.Module, inputs: dict[str, Tensor], target: Tensor, **options: Any
) -> list[Tensor]:
    """A forward gradient, verified unless `options` say otherwise.

    It is a mean: a projection would divide by small eigenvalues, and enlarge the rounding.
    """
    model.zero_grad()
    options = {"tangents": Normal(3), "aggregator": Mean()} | options
    gradient: GradientEstimator = ForwardGradient(model, language_loss, **options)
    gradient(inputs, target)
    return trained(model)


def trained(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.requires_grad]
    assert found and all(gradient is not None for gradient in found)
    return found


PERTURBED = pytest.mark.parametrize("perturb", ["activations", "weights"])
KINDS = pytest.mark.parametrize("kind", [Declared, Packed])
# Llama's normalisation computes in single precision; so does the kernel.
PRECISION = {"gpt2": 1e-10, "llama": 1e-6}


def test_layers_are_replaced():
    for name in BASES:
        model = quantised(name, Packed)
        inside = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
        kinds = [type(m).__name__ for block in inside for m in block.modules()]
        assert kinds.count("Packed") == {"gpt2": 8, "llama": 14}[name]
        assert "Conv1D" not in kinds


@PERTURBED
@KINDS
@pytest.mark.parametrize("name", BASES)
def test_forward_gradients_of_single_precision(name, kind, perturb):
    model, (inputs, target) = quantised(name, kind), batch()
    found = [
        gradients(each, inputs, target, perturb=perturb) for each in (model, dequantised(model))
    ]
    assert relative_error(*found) < 1e-6


@PERTURBED
@pytest.mark.parametrize("name", BASES)
def test_forward_gradients_of_double_precision(name, perturb):
    model, (inputs, target) = quantised(name, Declared).double(), batch()
    found = [
        gradients(each, inputs, target, perturb=perturb) for each in (model, dequantised(model))
    ]
    assert relative_error(*found) < PRECISION[name]


@PERTURBED
@KINDS
@pytest.mark.parametrize("options", [{"micro_batch": 1}, {"store_tangents": False}])
def test_parts_of_the_batch_and_tangents_that_are_drawn_again(options, kind, perturb):
    model, (inputs, target) = quantised("llama", kind), batch()
    found = [
        gradients(each, inputs, target, perturb=perturb, **options)
        for each in (model, dequantised(model))
    ]
    assert relative_error(*found) < 1e-6


@KINDS
def test_tangents_in_factors(kind):
    model, (inputs, target) = quantised("gpt2", kind), batch()
    found = [
        gradients(each, inputs, target, perturb="weights", tangents=LowRank(4))
        for each in (model, dequantised(model))
    ]
    assert relative_error(*found) < 1e-6


@KINDS
def test_tangents_of_half_precision(kind):
    model, (inputs, target) = quantised("gpt2", kind), batch()
    found = [
        gradients(each, inputs, target, perturb="weights", tangent_dtype=torch.bfloat16)
        for each in (model, dequantised(model))
    ]
    assert relative_error(*found) < 0.1


@PERTURBED
def test_as_many_tangents_as_dimensions_give_backpropagation(perturb):
    model, (inputs, target) = quantised("gpt2", Declared).double(), batch()
    plain = dequantised(model)
    language_loss(plain(**inputs), target).mean().backward()
    found = gradients(
        model, inputs, target, tangents=Normal(400), aggregator=Projection(), perturb=perturb
    )
    assert relative_error(found, trained(plain)) < 1e-8


def test_backpropagation_passes_through_the_kernel():
    model, (inputs, target) = quantised("gpt2", Packed), batch()
    plain = dequantised(model)
    for each in (model, plain):
        language_loss(each(**inputs), target).mean().backward()
    assert relative_error(trained(model), trained(plain)) < 1e-6
