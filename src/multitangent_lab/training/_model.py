"""The model that a configuration names, for its data."""

import inspect

from torch import nn

from multitangent_lab._errors import ConfigError
from multitangent_lab._factories import call_factory, find_factory
from multitangent_lab.config import TrainConfig
from multitangent_lab.data import Data, Text
from multitangent_lab.models import gpt


def language_model(config: TrainConfig, text: Text) -> nn.Module:
    """Returns the transformer `gpt` for a text."""
    return gpt(
        text.num_tokens,
        text.context,
        embedding=config.embedding,
        blocks=config.blocks,
        heads=config.heads,
    )


def own_model(reference: str, data: Data) -> nn.Module:
    """Returns the model that a factory of the user's own makes.

    Args:
        reference: `package.module:factory`. The factory is called without arguments, or with the
            data set if it needs an argument.
        data: The data set.

    Raises:
        ConfigError: The factory can not be called, or makes something else.
    """
    factory = find_factory("model", reference)
    model = call_factory("model", reference, *([data] if _needs_argument(factory) else []))
    if not isinstance(model, nn.Module):
        raise ConfigError(
            "`model` should name a function that returns a torch.nn.Module. Found that "
            f"{reference!r} returns {type(model).__name__}. Try `return torch.nn.Sequential(...)`."
        )
    return model


def _needs_argument(factory: object) -> bool:
    try:
        parameters = inspect.signature(factory).parameters.values()  # type: ignore[arg-type]
    except ValueError:  # written in C
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return any(p.default is p.empty and p.kind in positional for p in parameters)
