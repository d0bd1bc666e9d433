"""`peft`: LoRA tunes a model that fits for inference, with tangents of low rank."""

import inspect
import textwrap

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast as Output

from multitangent import ForwardGradient, Projection
from multitangent.tangents import LowRank


def language_loss(output: Output, labels: Tensor) -> Tensor:
    """One loss for every sample, ``[B]``: the mean over the tokens that follow others."""
    losses = F.cross_entropy(output.logits[:, :-1].mT, labels[:, 1:], reduction="none")
    return losses.mean(1)


def main() -> None:
    torch.manual_seed(0)
    tokens = torch.tensor(list(inspect.getsource(textwrap).encode())).unfold(0, 32, 32)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.1,
    )  # fmt: skip
    base = LlamaForCausalLM(config)  # with real weights: from_pretrained(folder)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.02)
    # Only what is trainable is perturbed: the adapters. The base model is frozen.
    gradient = ForwardGradient(model, language_loss, LowRank(16), Projection(), perturb="weights")
    losses = []
    for step in range(1, 51):
        batch = tokens[torch.randint(len(tokens), (16,))]
        optimizer.zero_grad()
        losses.append(gradient({"input_ids": batch}, batch))  # fills .grad of the adapters
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step}  loss {sum(losses[-10:]) / 10:.3f}")


if __name__ == "__main__":
    main()
