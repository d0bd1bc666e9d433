"""`transformers.Trainer`: a subclass whose training step has no backward pass."""

import inspect
import tempfile
import textwrap

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from multitangent import ForwardGradient, Normal, Projection


class ForwardTrainer(Trainer):
    """Trains a language model; padding has the label -100. Accumulation and clipping work."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.args.fp16 or self.args.n_gpu > 1:
            raise ValueError("`args` should have one device, and no fp16. Try bf16=True.")
        self.gradient = ForwardGradient(self.model, self.sample_losses, Normal(16), Projection())

    def sample_losses(self, output, labels: Tensor) -> Tensor:
        """Losses ``[B]`` whose mean is this batch's part of the mean over all tokens of a step."""
        losses = F.cross_entropy(output.logits[:, :-1].mT, labels[:, 1:], reduction="none")
        return losses.sum(1) * self.samples / self.tokens

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        model.train()
        inputs = self._prepare_inputs(inputs)
        labels = inputs.pop("labels")
        # The number of tokens is that of all batches of a step, whose gradients add up.
        self.samples, self.tokens = len(labels), num_items_in_batch
        with self.compute_loss_context_manager():
            return self.gradient(inputs, labels)


def main() -> None:
    torch.manual_seed(0)
    tokens = torch.tensor(list(inspect.getsource(textwrap).encode())).unfold(0, 32, 32)
    config = GPT2Config(
        vocab_size=128, n_positions=32, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=40, learning_rate=0.003, per_device_train_batch_size=8,
            gradient_accumulation_steps=2, logging_steps=10, report_to="none", use_cpu=True,
            save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        data = [{"input_ids": window, "labels": window} for window in tokens]
        ForwardTrainer(model, arguments, train_dataset=data).train()


if __name__ == "__main__":
    main()
