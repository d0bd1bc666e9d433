"""Small models: the gradient of as many tangents as there are dimensions is backpropagation's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from multitangent import Activations, ForwardGradient, Normal, Projection, SimulatedGradient
from multitangent.gradient import GradientEstimator
from multitangent.tangents import StandardBasis, TangentSource
from multitangent_lab.fuzz._blocks import AGAIN, AROUND, FAMILIES, C, D, needs_simulation
from multitangent_lab.fuzz._comparison import Case, Values
from multitangent_lab.fuzz._draw import Draw, Table, table

CLASSES = 3


def focal(output: Tensor, target: Tensor) -> Tensor:
    loss = F.cross_entropy(output, target, reduction="none")
    return (1 - torch.exp(-loss)) ** 2 * loss


class Focal(nn.CrossEntropyLoss):
    """A loss module with a forward of its own."""

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        loss = focal(output, target)
        return {"mean": loss.mean(), "sum": loss.sum()}.get(self.reduction, loss)


def weighted(output: Tensor, target: Tensor) -> Tensor:
    with torch.no_grad():
        weight = (output - target).abs().mean(1)
    return weight * (output - target).square().sum(1)


# Losses by what they compare with; `how` is a reduction, `w` has a weight for each class.
LOSSES = {
    "labels": table(
        """
nn.CrossEntropyLoss(reduction=how)
nn.CrossEntropyLoss(w, reduction=how)
nn.CrossEntropyLoss(label_smoothing=0.1)
nn.CrossEntropyLoss(ignore_index=1)
nn.MultiMarginLoss()
Focal()
focal
""",
        "how, w",
        globals(),
    ),
    "rates": table(
        """
nn.{BCEWithLogitsLoss HuberLoss L1Loss MSELoss SmoothL1Loss PoissonNLLLoss}(reduction=how)
nn.BCEWithLogitsLoss(pos_weight=w)
nn.KLDivLoss(reduction="batchmean")
nn.MultiLabelSoftMarginLoss()
nn.CrossEntropyLoss()
weighted
lambda output, target: (output - target).square().sum(1)
""",
        "how, w",
        globals(),
    ),
    "signs": table("nn.{SoftMarginLoss HingeEmbeddingLoss}(reduction=how)", "how, w", globals()),
}


def _target(kind: str, batch: int) -> Tensor:
    if kind == "labels":
        return torch.randint(CLASSES, (batch,))
    rates = torch.rand(batch, CLASSES)
    return rates if kind == "rates" else rates.round() * 2 - 1


class Model(nn.Module):
    """Blocks one after another, then a linear layer.

    Args:
        blocks: The blocks.
        features: The size of what the last of them returns, for one sample.
        embedding: What makes vectors of tokens, if the input is tokens.
        copies: Whether the blocks get a copy of the input, which they can write into.
    """

    def __init__(
        self, blocks: list[nn.Module], features: int, embedding: nn.Module | None, copies: bool
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.copies = copies
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(features, CLASSES)

    def forward(self, x: Tensor, scale: Tensor | float = 1.0) -> Tensor:
        x = x.clone() if self.copies else x
        x = x if self.embedding is None else self.embedding(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(1) * scale)

    def layers(self) -> list[str]:
        """The names of what holds trainable parameters."""
        names = [f"blocks.{i}" for i in range(len(self.blocks))] + ["embedding", "head"]
        modules = dict(self.named_modules())
        return [
            name
            for name in names
            if name in modules and any(p.requires_grad for p in modules[name].parameters())
        ]


@dataclass
class Problem:
    """A model, its loss, a batch, and how to take a gradient.

    Attributes:
        blocks: The names of what it is made of.
        settings: Shapes and options, in words.
        model: The model, which is only copied.
        loss: The loss.
        batches: Inputs and targets, one for every step.
        options: Arguments of a gradient.
        is_basis: Whether the tangents are the standard basis.
        simulated: Whether the right gradient is the simulated one, not plain backpropagation.
    """

    blocks: tuple[str, ...]
    settings: str
    model: Model
    loss: Callable[[Any, Any], Tensor]
    batches: list[tuple[Any, Tensor]]
    options: dict[str, Any]
    is_basis: bool
    simulated: bool

    @property
    def tolerance(self) -> float:
        """Independent random tangents lose some digits."""
        return 1e-7 if self.is_basis else 1e-5

    def gradient(self, model: nn.Module) -> GradientEstimator:
        """The forward gradient, exact by its number of tangents."""
        return ForwardGradient(model, self.loss, self._tangents(), Projection(), **self.options)

    def oracle(self, model: nn.Module) -> GradientEstimator | None:
        """The simulation, where plain backpropagation sees something else."""
        if not self.simulated:
            return None
        return SimulatedGradient(model, self.loss, self._tangents(), Projection(), **self.options)

    def step(self, model: nn.Module, gradient: GradientEstimator | None, i: int) -> Tensor:
        """The loss of batch i, whose gradient is added; without an estimator by plain PyTorch."""
        inputs, target = copy.deepcopy(self.batches[i])
        if gradient is not None:
            return gradient(inputs, target)
        losses = self.loss(call(model, inputs), target)
        if losses.ndim:  # stand for their mean, which is one of samples
            losses = losses.flatten(1).mean(1).mean()
        torch.autograd.backward(losses)
        return losses.detach()

    def _tangents(self) -> TangentSource:
        count = _dimension(self.model, self.batches[0][0], self.options["perturb"])
        return StandardBasis(count) if self.is_basis else Normal(count + 20)


def draw_problem(r: Draw, first: Table | None = None, steps: int = 1) -> Problem:
    """A model of one to four blocks, one of them from the table `first`, and what goes with it."""
    family = r.choice(list(FAMILIES if first is None else ("vectors", "sequences")))
    batch, tokens = r.randint(2, 5), r.choice([2, 3, 4])
    shape = {"vectors": (D,), "sequences": (tokens, D), "images": (C, D, D)}[family]
    names, blocks = [], []
    for i in range(r.choice([1, 1, 2, 3, 4])):
        tables = FAMILIES[family] if first is None or i > 0 else (first,)
        name = r.name(*tables)
        block = next(t[name] for t in tables if name in t)(r)
        names.append(name)
        if r.chance(0.25):
            around = {**AROUND, **AGAIN} if first is None else AROUND
            names.append(r.name(around))
            block = around[names[-1]](block)
        blocks.append(block)
    r.shuffle(blocks)
    with_tokens = family == "sequences" and r.chance(0.2)
    # A row of exact zeros, all equal, would be rounding noise after a step.
    padding = r.choice([None, 0]) if steps == 1 else None
    embedding = nn.Embedding(5, D, padding_idx=padding) if with_tokens else None
    copies = r.chance(0.5) or not r.allows("input written into")
    model = Model(blocks, torch.Size(shape).numel(), embedding, copies)
    kind = r.choice(list(LOSSES))
    loss = r.name(LOSSES[kind])
    form = r.choice(["tensor", "tuple", "dictionary"])

    def draw_batch() -> tuple[Any, Tensor]:
        x = torch.randint(5, (batch, tokens)) if with_tokens else r.tensor(batch, *shape)
        scale = torch.rand(batch, 1) + 0.5
        inputs = {"tensor": x, "tuple": (x, scale), "dictionary": {"x": x, "scale": scale}}
        return inputs[form], _target(kind, batch)

    layers = model.layers()
    activations = Activations(
        r.choice([None, layers]),
        r.choice(["batch", "sample"]),
        r.choice(["perturbed", "exact"]) if len(layers) > 1 else "perturbed",
        recompute=r.chance(0.3),
    )
    options = {
        "perturb": r.choice(["weights", activations]),
        "micro_batch": r.choice(["auto", 1, 2, batch]),
        "store_tangents": r.chance(0.7),
    }
    return Problem(
        (*names, loss),
        f"{form} {[batch, *shape]}, tokens {with_tokens}, copied {copies}, {options}",
        model,
        LOSSES[kind][loss](r.choice(["mean", "sum", "none"]), torch.tensor([1.0, 2.0, 0.5])),
        [draw_batch() for _ in range(steps)],
        options,
        r.chance(0.7),
        any(needs_simulation(name) for name in names),
    )


def _dimension(model: nn.Module, inputs: Any, perturb: Any) -> int:
    """At least the number of perturbed values: of weights, or of one sample's activations."""
    if perturb == "weights":
        return sum(p.numel() for p in model.parameters())
    sizes: list[int] = []

    def count(module: nn.Module, _: Any, output: Any) -> None:
        leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]
        sizes.append(sum(-(-t.numel() // t.shape[0]) for t in leaves))

    tried = copy.deepcopy(model)
    for name, module in tried.named_modules():
        is_layer = next(module.parameters(recurse=False), None) is not None
        if is_layer if perturb.sites is None else name in perturb.sites:
            module.register_forward_hook(count)
    call(tried, copy.deepcopy(inputs))
    return sum(sizes)


def call(model: nn.Module, inputs: Any) -> Any:
    """The output of a model."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def state_of(model: nn.Module) -> Values:
    """Gradients, buffers, numbers among the attributes, and whether all tensors are ordinary."""
    values: Values = {}
    kept: list[Any] = []
    for name, p in model.named_parameters():
        values[f"gradient of {name}"] = torch.zeros_like(p) if p.grad is None else p.grad.clone()
    for name, module in model.named_modules():
        state = {**vars(module), **module._buffers}
        kept += [*state.values(), *module._parameters.values()]
        for key, value in state.items():
            if isinstance(value, Tensor | float | int) and key != "training":
                values[f"{name}.{key}"] = torch.as_tensor(value).detach().clone().double()
    ordinary = all(type(v) in (Tensor, nn.Parameter) for v in kept if isinstance(v, Tensor))
    values["all tensors are ordinary"] = torch.tensor(float(ordinary))
    return values


def draw_modules(r: Draw) -> Case:
    """One step of a model."""
    problem = draw_problem(r)

    def run(make: Callable[[nn.Module], GradientEstimator | None]) -> Values:
        model = copy.deepcopy(problem.model)
        loss = problem.step(model, make(model), 0)
        return {"loss": loss, **state_of(model)}

    return Case(
        problem.blocks,
        problem.settings,
        lambda: run(problem.oracle),
        lambda: run(problem.gradient),
        problem.tolerance,
    )
