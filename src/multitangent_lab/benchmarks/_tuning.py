"""Memory and time of a step that tunes a language model of the shape of GPT-2, by method."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multitangent.aggregation import Projection
from multitangent.gradient import ForwardGradient, GradientEstimator, mezo
from multitangent.objective import LogitsLoss
from multitangent.perturbation import Activations
from multitangent.tangents import LowRank, Normal
from multitangent_lab.benchmarks._case import device_of
from multitangent_lab.benchmarks._peak import peak_mib
from multitangent_lab.benchmarks._timing import interleaved, ratio
from multitangent_lab.config import BenchConfig
from multitangent_lab.models import add_lora, gpt

_BATCH, _RANK, _COUNTS = 4, 8, (1, 4, 16)
_OTHERS = ("inference", "backpropagation", "checkpointed backpropagation")


@dataclass(frozen=True)
class _Method:
    """A way to take one step, with a number of samples and tangents at a time."""

    name: str
    micro_batch: int
    num_tangents: int | None = None
    tangents: str = ""

    def __str__(self) -> str:
        return " ".join(map(str, vars(self).values()))


def compare_tuning(config: BenchConfig) -> list[dict[str, Any]]:
    """One row for each method: the peak of a step in MiB, its time, and ratios to others.

    Ratios compare methods with the same micro-batch. Only steps of the whole batch at once are
    timed. A step leads from a batch to the gradients. The memory counts the parameters, the batch
    and the gradients. Only ``forward, first step`` is compared with backpropagation, for a few
    samples.
    """
    methods = _methods(config)
    peaks = {str(m): peak_mib(_run, _small(config), config, m) for m in methods}
    case = _make(config)
    whole = [method for method in methods if method.micro_batch == len(case.tokens)]
    times = interleaved(
        {str(m): case.step(m) for m in whole}, config.repeats, lambda: case.model.zero_grad()
    )
    return [_row(config, method, peaks, times) for method in methods]


def _methods(config: BenchConfig) -> list[_Method]:
    batch = config.batch or _BATCH
    drawn = "normal" if config.trained == "adapters" else "low rank"
    methods = []
    for size in (batch, 1)[: 1 + (batch > 1)]:
        methods += [_Method(name, size) for name in _OTHERS]
        methods += [_Method("MeZO", size, 1, "normal")]
        methods += [_Method("forward", size, count, drawn) for count in _COUNTS]
    methods += [
        _Method("forward, bfloat16 tangents", batch, _COUNTS[-1], drawn),
        _Method("forward, first step", batch, 1, drawn),
        _Method("forward, activations", batch, 4, "normal"),
    ]
    return methods


def _row(
    config: BenchConfig,
    method: _Method,
    peaks: dict[str, float],
    times: dict[str, list[float]],
) -> dict[str, Any]:
    own = str(method)
    others = {_word(name): str(_Method(name, method.micro_batch)) for name in _OTHERS}
    row: dict[str, Any] = {"trained": config.trained, **vars(method)}
    row["peak_mib"] = round(peaks[own], 1)
    for word, other in others.items():
        row[f"peak_to_{word}"] = round(peaks[own] / peaks[other], 3)
    row["ms"] = round(median(times[own]), 1) if own in times else None
    for word, other in others.items():
        row[f"time_to_{word}"] = ratio(times, own, other) if own in times else None
    return row


def _word(name: str) -> str:
    return name.split()[0]


@dataclass(frozen=True)
class _Case:
    """A language model with some trained parameters, and a batch of random tokens."""

    model: nn.Sequential
    tokens: Tensor
    labels: Tensor

    def step(self, method: _Method) -> Callable[[], object]:
        """One step of a method."""
        if method.name in _OTHERS:
            run = (self._infer, self._backpropagate, self._checkpoint)[_OTHERS.index(method.name)]
            return lambda: run(method.micro_batch)
        if method.name == "forward, first step":
            return lambda: self._gradient(method)(self.tokens, self.labels)
        gradient = self._gradient(method)
        return lambda: gradient(self.tokens, self.labels)

    def _gradient(self, method: _Method) -> GradientEstimator:
        size, count = method.micro_batch, method.num_tangents or 1
        if method.name == "MeZO":
            return mezo(self.model, LogitsLoss(), micro_batch=size, verify="parts")
        options: dict[str, Any] = {"micro_batch": size, "verify": "parts"}
        if method.name == "forward, first step":
            options["verify"] = "first"
        if method.name == "forward, bfloat16 tangents":
            options["tangent_dtype"] = torch.bfloat16
        source = LowRank(count) if method.tangents == "low rank" else Normal(count)
        perturb: Any = "weights"
        if method.name == "forward, activations":
            perturb = Activations(output="exact", recompute=True)
            options["store_tangents"] = False
        return ForwardGradient(self.model, LogitsLoss(), source, Projection(), perturb, **options)

    def _infer(self, size: int) -> None:
        with torch.no_grad():
            for x, y in self._parts(size):
                LogitsLoss()(self.model(x), y)

    def _backpropagate(self, size: int) -> None:
        for x, y in self._parts(size):
            self._differentiate(self.model(x), y)

    def _checkpoint(self, size: int) -> None:
        """Backpropagation that runs every block again, in place of keeping what it computed."""
        for x, y in self._parts(size):
            *blocks, last = self.model.children()
            block, *head = last.children()
            for part in (*blocks, block):
                x = checkpoint(part, x, use_reentrant=False)
            self._differentiate(nn.Sequential(*head)(x), y)

    def _differentiate(self, logits: Tensor, labels: Tensor) -> None:
        (LogitsLoss()(logits, labels) * (len(labels) / len(self.labels))).backward()

    def _parts(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        tokens, labels = (torch.split(value, size) for value in (self.tokens, self.labels))
        yield from zip(tokens, labels, strict=True)


def _make(config: BenchConfig) -> _Case:
    vocabulary, context, width, blocks = config.language_model
    device = device_of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        heads = max(width // 64, 1)
        model = gpt(vocabulary, context, embedding=width, blocks=blocks, heads=heads, tied=True)
        if config.trained == "adapters":
            add_lora(model, _RANK)
        tokens, labels = torch.randint(vocabulary, (2, config.batch or _BATCH, context))
    return _Case(model.to(device), tokens.to(device), labels.to(device))


def _small(config: BenchConfig) -> BenchConfig:
    return replace(config, language_model=(50, 16, 16, 2))


def _run(config: BenchConfig, method: _Method) -> None:
    _make(config).step(method)()
