"""A checkpoint of transformers in a folder, with random inputs of its kind."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from multitangent_lab._errors import ConfigError

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TRY = "Try package.module:factory, whose function returns a model, a batch and a loss."


def load_checkpoint(folder: Path) -> nn.Module:
    """Returns the model that ``config.json`` describes, with random weights if there are none.

    Nothing is downloaded, and no code of the checkpoint is run.

    Raises:
        ConfigError: `transformers` is not installed, or does not know the model.
    """
    try:
        library = import_module("transformers")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"`model` should be a checkpoint of transformers. Found {str(folder)!r}, but "
            "transformers is not installed. Try: pip install transformers"
        ) from error
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    try:
        config = library.AutoConfig.from_pretrained(folder, local_files_only=True)
        kind = getattr(library, (config.architectures or [""])[0], None)
        if kind is None:
            raise ValueError(
                "config.json names no class of transformers as `architectures`, such as "
                '["GPT2LMHeadModel"]'
            )
        if any(found for pattern in _WEIGHTS for found in folder.glob(pattern)):
            return kind.from_pretrained(folder, local_files_only=True)
        return kind(config)
    except Exception as error:  # whatever the library raises for a file that is not right
        raise ConfigError(
            "`model` should be a folder with a checkpoint of transformers. Found "
            f"{str(folder)!r}: {str(error).rstrip('.')}. {_TRY}"
        ) from error


def random_inputs(model: Any, count: int, context: int) -> dict[str, Tensor]:
    """Returns random tokens or images, as the model takes them.

    Args:
        model: A model of transformers.
        count: The number of samples.
        context: The number of tokens.

    Raises:
        ConfigError: The model takes something else.
    """
    config, name = model.config, model.main_input_name
    if name == "input_ids":
        words = config.get_text_config()
        length = min(context, getattr(words, "max_position_embeddings", None) or context)
        names = ["input_ids", *["decoder_input_ids"] * config.is_encoder_decoder]
        return {name: torch.randint(words.vocab_size, (count, length)) for name in names}
    if name == "pixel_values" and hasattr(config, "image_size"):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        channels = getattr(config, "num_channels", 3)
        return {name: torch.randn(count, channels, height, width, dtype=model.dtype)}
    raise ConfigError(
        f"`model` should be a checkpoint that takes tokens or images. Found one that takes {name}. "
        f"{_TRY}"
    )


def random_target(
    model: nn.Module, inputs: dict[str, Tensor]
) -> tuple[Tensor, Callable[[Any, Tensor], Tensor]]:
    """Returns random classes, for every token or every sample, and their cross-entropy.

    Raises:
        ConfigError: The model does not run on the inputs, or returns no logits.
    """
    try:
        with torch.no_grad():
            logits = getattr(model(**inputs), "logits", None)
    except Exception as error:  # whatever the model raises
        raise ConfigError(
            f"`model` should be a checkpoint that runs on random {', '.join(inputs)}. Found that "
            f"{type(model).__name__} raises {type(error).__name__}: {str(error).rstrip('.')}. "
            f"{_TRY}"
        ) from error
    if logits is None:
        raise ConfigError(
            "`model` should be a checkpoint of a model with a head, which returns logits. Found "
            f"{type(model).__name__}, which returns none. {_TRY}"
        )
    return torch.randint(logits.shape[-1], logits.shape[:-1]), _cross_entropy


def _cross_entropy(output: Any, target: Tensor) -> Tensor:
    """The mean of each sample, ``[B]``."""
    losses = F.cross_entropy(output.logits.movedim(-1, 1), target, reduction="none")
    return losses.reshape(len(target), -1).mean(1)
