"""The model that a configuration names, with a batch and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from multitangent_lab._errors import ConfigError
from multitangent_lab._factories import call_factory
from multitangent_lab.checkup._checkpoint import load_checkpoint, random_inputs, random_target
from multitangent_lab.config import DoctorConfig
from multitangent_lab.data import next_token_loss, own_data
from multitangent_lab.models import build_model, gpt
from multitangent_lab.training import own_model

_IMAGES = {"fc": (1, 28, 28), "resnet18": (3, 32, 32), "vit": (1, 28, 28)}
_CLASSES = 10
_TOKENS = 96


@dataclass(frozen=True)
class Case:
    """A model, a batch and a loss."""

    model: nn.Module
    inputs: Any
    target: Any
    loss: Callable[[Any, Any], Tensor]


def make_case(config: DoctorConfig, device: torch.device) -> Case:
    """Returns the model, batch and loss that the doctor looks at.

    Raises:
        ConfigError: There is no such model, or its function returns no batch and loss.

    Examples:
        >>> case = make_case(DoctorConfig("gpt", batch_size=2, context=8), torch.device("cpu"))
        >>> case.inputs.shape
        torch.Size([2, 8])
    """
    case = _case(config)
    inputs, target = pytree.tree_map_only(
        Tensor, lambda value: value.to(device), (case.inputs, case.target)
    )
    return Case(case.model.to(device), inputs, target, case.loss)


def _case(config: DoctorConfig) -> Case:
    count, name = config.batch_size, config.model
    if name in _IMAGES:
        network = build_model(name, _IMAGES[name], _CLASSES, width=config.width)
        images, classes = torch.randn(count, *_IMAGES[name]), torch.randint(_CLASSES, (count,))
        return Case(network, images, classes, nn.CrossEntropyLoss())
    if name == "gpt":
        tokens, following = torch.randint(_TOKENS, (2, count, config.context))
        return Case(gpt(_TOKENS, config.context), tokens, following, next_token_loss)
    if ":" in name:
        return _own_case(config)
    if Path(name).is_dir():
        model = load_checkpoint(Path(name)).train()
        inputs = random_inputs(model, count, config.context)
        return Case(model, inputs, *random_target(model, inputs))
    choices = [*_IMAGES, "gpt"]
    close = get_close_matches(name.lower(), choices, n=1) or choices
    raise ConfigError(
        f"`model` should be one of {', '.join(choices)}, package.module:factory, or a folder with "
        f"a checkpoint of transformers. Found {name!r}. Try {close[0]!r}."
    )


def _own_case(config: DoctorConfig) -> Case:
    if config.data is not None:
        data = own_data(call_factory("data", config.data))
        inputs, target = data.train[torch.arange(min(config.batch_size, len(data.train)))]
        return Case(own_model(config.model, data), inputs, target, data.loss)
    found = call_factory("model", config.model)
    match found:
        case nn.Module() as model, (inputs, target), loss if callable(loss):
            return Case(model, inputs, target, loss)
    kinds = ", ".join(type(part).__name__ for part in found) if isinstance(found, tuple) else ""
    shown = f"a {type(found).__name__}" + (f" of {kinds}" if kinds else "")
    shown = "a model alone" if isinstance(found, nn.Module) else shown
    raise ConfigError(
        "`model` should name a function that returns a model, a batch and a loss. Found that "
        f"{config.model!r} returns {shown}. Try `return model, (inputs, target), "
        "torch.nn.CrossEntropyLoss()`, or --data with your own data."
    )
