"""Configuration of the benchmarks, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional, Suppress


@dataclass(frozen=True)
class BenchConfig:
    """Measure speed and memory, as ratios within one run."""

    measure: Positional[
        Literal["step", "push", "memory", "tangents", "cosine", "statistics", "guesses", "tuning"]
    ] = "step"
    """step: the time of the whole step, from batch to gradients. push: of the sweep alone. memory:
    the peak of a step. tangents: time and memory against K. cosine: what the time buys, the squared
    cosine with the true gradient. statistics: how far frozen batch statistics are from coupled.
    guesses: time and operations of a step with guesses among the tangents. tuning: memory and time
    of a step that tunes a language model of the shape of GPT-2 (124 million parameters, 256 tokens,
    4 samples)."""
    model: Literal["fc", "resnet18", "vit"] = "fc"
    """The paper's networks: fully-connected and vision transformer on MNIST's shapes, ResNet18 on
    those of CIFAR-10."""
    width: int = 256
    """Width of the hidden layers of fc."""
    batch: int | None = None
    """Samples per step; by default 64, and 128 for resnet18."""
    num_tangents: int = 16
    """Tangents per step, K."""
    share: Literal["batch", "sample"] = "batch"
    """Whether the samples of a batch share their tangents."""
    compile: bool = False
    """Whether the forward gradient's step is compiled."""
    tangent_dtype: Literal["float32", "bfloat16"] = "float32"
    """The type in which tangents are carried."""
    keep_memory: bool = False
    """Whether the process keeps freed memory, all methods alike."""
    tf32: bool = False
    """Whether a GPU may round products to TF32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: on the GPU if there is one."""
    repeats: int = 20
    """Rounds of which the median is taken; every round runs each method once."""
    seed: int = 0
    """Seed of weights, data and tangents."""
    out: Path | None = None
    """File for the result as JSON, and for curves its CSV and PNG beside it."""
    trained: Literal["adapters", "all"] = "adapters"
    """What tuning trains: LoRA adapters of rank 8, or all weights."""
    language_model: Suppress[tuple[int, int, int, int]] = (50257, 256, 768, 12)
    """Possible tokens, tokens per sample, width and blocks of the model that is tuned."""
    counts: Suppress[tuple[int, ...]] = (1, 2, 4, 8, 16, 32)
    """Numbers of tangents of the curves."""
