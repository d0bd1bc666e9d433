"""What is measured: a model, a batch of its shape, and ways to take a gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from multitangent.aggregation import Projection
from multitangent.gradient import ForwardGradient, GradientEstimator
from multitangent.perturbation import Activations
from multitangent.tangents import Normal
from multitangent_lab.benchmarks._baselines import PythonLoop, VmapJvp
from multitangent_lab.config import BenchConfig
from multitangent_lab.models import build_model

BATCH = {"fc": 64, "resnet18": 128, "vit": 64}
IMAGES = {"fc": (1, 28, 28), "resnet18": (3, 32, 32), "vit": (1, 28, 28)}


@dataclass(frozen=True)
class Case:
    """A model, its loss and a batch of random images and labels."""

    model: nn.Module
    loss: nn.Module
    x: Tensor
    y: Tensor

    def backpropagation(self) -> None:
        """One step of backpropagation."""
        self.loss(self.model(self.x), self.y).backward()

    def forward(self) -> None:
        """One forward pass that records nothing."""
        with torch.no_grad():
            self.loss(self.model(self.x), self.y)

    def step(self, gradient: GradientEstimator) -> Callable[[], object]:
        """One step of an estimator."""
        return lambda: gradient(self.x, self.y)


def make_case(config: BenchConfig) -> Case:
    """The model and batch of a configuration, in training mode, on its device."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = config.tf32
    shape = IMAGES[config.model]
    device = device_of(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = build_model(config.model, shape, width=config.width)
        batch = config.batch or BATCH[config.model]
        x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    return Case(model.to(device), nn.CrossEntropyLoss(), x.to(device), y.to(device))


def device_of(config: BenchConfig) -> torch.device:
    """The device that a configuration asks for."""
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)


def make_gradient(
    config: BenchConfig,
    case: Case,
    kind: type[GradientEstimator] = ForwardGradient,
    **options: Any,
) -> GradientEstimator:
    """An estimator with the tangents of a configuration; `options` come on top."""
    if kind is ForwardGradient:
        dtype = None if config.tangent_dtype == "float32" else torch.bfloat16
        options = {"tangent_dtype": dtype, "compile": config.compile} | options
    else:
        options = {"verify": False} | options  # what is there to compare with
    perturb = options.pop("perturb", Activations(share=config.share))
    return kind(
        case.model,
        case.loss,
        Normal(config.num_tangents),
        Projection(),
        perturb,
        config.seed,
        **options,
    )


def baselines(config: BenchConfig, case: Case) -> dict[str, GradientEstimator]:
    """The same step as a user would write it with what PyTorch offers."""
    return {
        "python_loop": make_gradient(config, case, PythonLoop),
        "vmap_jvp": make_gradient(config, case, VmapJvp),
    }


def gradient_of(case: Case) -> Tensor:
    """The gradient of all parameters as one vector, in float64."""
    gradients = [p.grad.flatten() for p in case.model.parameters() if p.grad is not None]
    return torch.cat(gradients).double()
