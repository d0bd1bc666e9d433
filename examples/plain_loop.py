"""A plain loop: a language model of `transformers` learns without a backward pass."""

import inspect
import textwrap

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions as Output

from multitangent import ForwardGradient, Normal, Projection


def language_loss(output: Output, labels: Tensor) -> Tensor:
    """One loss for every sample, ``[B]``: the mean over the tokens that follow others."""
    losses = F.cross_entropy(output.logits[:, :-1].mT, labels[:, 1:], reduction="none")
    return losses.mean(1)


def windows(length: int = 32) -> Tensor:
    """The source of a module of Python as tokens, one for every byte: ``[windows, length]``."""
    tokens = torch.tensor(list(inspect.getsource(textwrap).encode()))
    return tokens.unfold(0, length, length)


def main() -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    gradient = ForwardGradient(model, language_loss, Normal(16), Projection())
    data = windows()
    for step in range(41):
        batch = data[torch.randint(len(data), (16,))]
        optimizer.zero_grad()
        loss = gradient({"input_ids": batch}, batch)  # fills .grad, in place of loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"step {step:2d}  loss {loss:.3f}")


if __name__ == "__main__":
    main()
