"""A cell that tunes a language model to another kind of text by adapters, with one gradient."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from math import cos, isfinite, pi
from pathlib import Path
from time import process_time
from typing import Any, Literal

import torch
from filelock import FileLock
from torch import Tensor, nn

from multitangent import ControlVariate, ForwardGradient, NonFiniteError, Normal
from multitangent.gradient import mezo
from multitangent.tangents import RunningMean
from multitangent_lab._texts import text_hash
from multitangent_lab.data import Windows, data_directory, load_text, next_token_loss
from multitangent_lab.experiments._experiment import Context
from multitangent_lab.experiments._store import Cell, OutOfTimeError, Row
from multitangent_lab.models import add_lora, gpt
from multitangent_lab.training import AGGREGATORS, Backpropagation, Gradient

Method = Literal["backpropagation", "mezo", "single", "mean", "projection"]
Optimizer = Literal["sgd", "adam"]

SOURCE_FILE = Path("text", "kjv.txt")  # in the folder of the data


@dataclass(frozen=True)
class Base(Cell):
    """A model of bytes, trained by backpropagation on `SOURCE_FILE`.

    Args:
        width: D.
        blocks: How many blocks.
        context: T.
        steps: Steps of AdamW, of 16 windows each.
    """

    width: int = 64
    blocks: int = 4
    context: int = 64
    steps: int = 3000


@dataclass(frozen=True)
class Tuning(Cell):
    """A base model tuned to Python's standard library, with a budget of forward passes.

    Args:
        method: How the gradient is obtained; `"mean"` and `"projection"` push several tangents.
        num_tangents: K.
        guess: Whether the last of the K tangents is the running mean of the gradients so far. Then
            `"mean"` takes the part along it exactly, and the mean of the others for the rest.
        optimizer: `"sgd"`, without momentum, or `"adam"`.
        learning_rate: Of the optimiser, constant.
        seed: Of the adapters, the order of the data and the tangents.
        budget: Forward passes in all; see `passes_per_step`.
        batch_size: Windows of a step.
        rank: Of the adapters.
        points: How often the model is validated, beside the start.
        validation: The number of windows of a validation.
        width: Of the base model, as are the settings below.
        blocks: Of the base model.
        context: Of the base model.
        base_steps: Of the base model.
    """

    method: Method
    num_tangents: int
    guess: bool
    optimizer: Optimizer
    learning_rate: float
    seed: int
    budget: int = 2000
    batch_size: int = 8
    rank: int = 4
    points: int = 12
    validation: int = 128
    width: int = Base.width
    blocks: int = Base.blocks
    context: int = Base.context
    base_steps: int = Base.steps

    @property
    def base(self) -> Base:
        """The model that is tuned."""
        return Base(self.width, self.blocks, self.context, self.base_steps)


def passes_per_step(method: Method, num_tangents: int) -> int:
    """What a step costs in forward passes of its batch, counted by operations.

    Each tangent costs as much as the values, because both go through the same product in a layer.
    The two runs of finite differences are two forward passes. A backward pass counts as two.

    Examples:
        >>> passes_per_step("mezo", 1), passes_per_step("single", 1), passes_per_step("mean", 16)
        (2, 2, 17)
        >>> passes_per_step("backpropagation", 1)
        3
    """
    if method == "backpropagation":
        return 3
    return 2 if method == "mezo" else 1 + num_tangents


def run(cell: Tuning, context: Context) -> list[Row]:
    """One row at the start, and one whenever a further share of the forward passes is spent.

    A run ends if its loss is no longer finite or has doubled, and says so in `diverged`. The
    seconds are the processor time of the steps alone. With one thread, this is their time on a
    machine that does nothing else.
    """
    context.store.obtain(cell.base, lambda base: _base_row(base, context))
    model = tuned_model(cell, context)
    text = load_text(level="byte", context=cell.context)
    validation = _spread(text.validation, cell.validation)
    gradient, optimizer = gradient_of(cell, model), _optimizer(cell, model)
    batches = _batches(text.train, cell.batch_size, cell.seed)
    cost = passes_per_step(cell.method, cell.num_tangents)
    steps = max(cell.budget // cost, 1)
    ends = {-(-steps * i // cell.points) for i in range(1, cell.points + 1)}
    first = mean_loss(model, validation)
    points: list[Row] = [{"step": 0, "passes": 0, "seconds": 0.0, "validation_loss": first}]
    seconds, diverged = 0.0, False
    for step in range(1, steps + 1):
        begun = process_time()
        finite = _take_step(gradient, optimizer, *next(batches))
        seconds += process_time() - begun
        if step in ends or not finite:
            loss = mean_loss(model, validation) if finite else None
            spent = {"step": step, "passes": step * cost, "seconds": round(seconds, 2)}
            points.append(spent | {"validation_loss": loss})
            diverged = loss is None or not loss < 2 * first
            if diverged:
                break
            if context.late():
                raise OutOfTimeError
    return [asdict(cell) | point | {"diverged": diverged} for point in points]


def gradient_of(cell: Tuning, model: nn.Module) -> Gradient:
    """The gradient of the adapters that a cell names."""
    if cell.method == "backpropagation":
        return Backpropagation(model, next_token_loss)
    if cell.method == "mezo":
        return mezo(model, next_token_loss, seed=cell.seed)
    aggregator, tangents = AGGREGATORS[cell.method], Normal(cell.num_tangents)
    if cell.guess:
        source = Normal(cell.num_tangents - 1) + RunningMean()
        if cell.method == "mean":
            aggregator = ControlVariate(gain=1.0)
        return ForwardGradient(
            model, next_token_loss, source, aggregator, "weights", seed=cell.seed
        )
    return ForwardGradient(model, next_token_loss, tangents, aggregator, "weights", seed=cell.seed)


def _optimizer(cell: Tuning, model: nn.Module) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kind = torch.optim.SGD if cell.optimizer == "sgd" else torch.optim.Adam
    return kind(trainable, lr=cell.learning_rate)


def _take_step(
    gradient: Gradient, optimizer: torch.optim.Optimizer, inputs: Tensor, targets: Tensor
) -> bool:
    """Take one step, and return whether the loss was finite."""
    optimizer.zero_grad()
    try:
        loss = gradient(inputs, targets)
    except NonFiniteError:
        return False
    optimizer.step()
    return isfinite(loss.item())


def _batches(windows: Windows, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows drawn with replacement, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield windows[torch.randint(len(windows), (size,), generator=generator)]


def _spread(windows: Windows, count: int) -> tuple[Tensor, Tensor]:
    """At most `count` windows, spread evenly over a text."""
    return windows[torch.linspace(0, len(windows) - 1, min(count, len(windows))).long()]


@torch.no_grad()
def mean_loss(model: nn.Module, windows: tuple[Tensor, Tensor]) -> float:
    """The mean loss per token, in nats."""
    inputs, targets = (torch.split(part, 32) for part in windows)
    losses = [next_token_loss(model(x), y) for x, y in zip(inputs, targets, strict=True)]
    return float(torch.cat(losses).mean())


def tuned_model(cell: Tuning, context: Context) -> nn.Module:
    """The base model with adapters that have no effect yet."""
    model = _base_model(cell.base, context)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cell.seed)
        return add_lora(model, cell.rank)


def _base_model(base: Base, context: Context) -> nn.Module:
    """The trained model, from the folder that is needed only while cells run.

    If it is not there, it is trained again. The weights depend on the cell alone.
    """
    path = context.store.work_folder / f"base-{base.key}.pt"
    model = _new_model(base)
    with FileLock(path.with_suffix(".lock")):
        if not path.exists():
            _train(model, base, _source_file(context))
            partial = path.with_suffix(".partial")
            torch.save(model.state_dict(), partial)
            os.replace(partial, path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _new_model(base: Base) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return gpt(256, base.context, embedding=base.width, blocks=base.blocks)


def _train(model: nn.Module, base: Base, path: Path) -> None:
    """Train a model by AdamW, with a learning rate that falls to zero."""
    text = load_text(path, level="byte", context=base.context)
    gradient = Backpropagation(model, next_token_loss)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    fall = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * (1 + cos(pi * step / base.steps)) / 2
    )
    batches = _batches(text.train, 16, seed=0)
    for _ in range(base.steps):
        _take_step(gradient, optimizer, *next(batches))
        fall.step()


def _source_file(context: Context) -> Path:
    return data_directory(context.data_dir) / SOURCE_FILE


def _base_row(base: Base, context: Context) -> list[Row]:
    """How good the base model is on both texts."""
    model = _base_model(base, context)
    row: dict[str, Any] = asdict(base)
    for name, path in {"source": _source_file(context), "target": None}.items():
        text = load_text(path, level="byte", context=base.context)
        row[f"{name}_loss"] = mean_loss(model, _spread(text.validation, Tuning.validation))
        row[f"{name}_sha256"] = text_hash(path)
    return [row]
