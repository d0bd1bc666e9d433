"""Random choices that a seed fixes, tables of building blocks, and those that wait for a mend."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Table = Mapping[str, Callable[..., Any]]

# Building blocks that are wrong or unclear today. The command draws them with `--pending` alone.
PENDING: set[str] = {
    # Random numbers in parts of a batch
    "Fn(lambda m, x: x * torch.rand(x.shape))",
    "Fn(lambda m, x: x + 0.3 * torch.randn_like(x))",
    "Fn(lambda m, x: x * torch.empty_like(x).normal_())",
    "Fn(lambda m, x: x * torch.rand(D))",
    "Fn(lambda m, x: x * torch.bernoulli(torch.full_like(x, 0.7)))",
    "Fn(lambda m, x: x * torch.empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(0.7))",
    "Fn(lambda m, x: x * F.gumbel_softmax(x))",
    "Fn(lambda m, x: x + torch.distributions.Normal(x, 0.3).rsample())",
    "Fn(lambda m, x: x * torch.multinomial(torch.ones(D), 1))",
    "Fn(lambda m, x: x[..., torch.randperm(D)])",
    "Fn(lambda m, x: x * 2 if torch.rand(()) < 0.5 else x)",
    "nn.AlphaDropout(0.3)",
    "nn.FeatureAlphaDropout(0.3)",
    "Fn(lambda m, x: F.dropout(x.transpose(0, 1), 0.4).transpose(0, 1))",
    # A first axis that is the batch's size by chance
    "Fn(lambda m, x: x + m[0](torch.arange(x.shape[1])), nn.Embedding(4, D))",
    # Samples in another order
    "Fn(lambda m, x: m[0](x[x[:, 0].argsort()])[x[:, 0].argsort().argsort()], linear())",
    # `requires_grad_` inside of a model, and branches on `requires_grad`
    "x.requires_grad_()",
    "Fn(lambda m, x: 2 * x if x.requires_grad else -x)",
    # States and inputs that a step changes several times
    "Fn(_count, n=0)",
    "Fn(_count, n=torch.tensor(0))",
    "Fn(_average, mean=torch.zeros(D))",
    "Fn(_replaced, mean=torch.zeros(D))",
    "Fn(_largest, mean=torch.zeros(D))",
    "Fn(_initialized, n=0, mean=torch.zeros(D))",
    "Fn(_kept, state=None)",
    "Fn(_summed, total=0.0)",
    "nn.utils.parametrizations.spectral_norm(linear())",
    "nn.InstanceNorm2d(C, track_running_stats=True)",
    "input written into",
    # Kinks
    "torch.fmax(x, y)",
    "torch.fmin(x, y)",
    "torch.atan2(x, y)",
    "torch.xlogy(x, y)",
    "torch.special.entr(x)",
    "x.atan2_(y)",
    "x.abs() ** x.abs()",
    "r.choice([0.0, 1.0, 2.0]) ** x",
    "F.lp_pool1d(x, 2.0, 2)",
    "F.prelu(x, fit(y, 1))",
    "nn.PReLU()",
    "nn.PReLU(C)",
    "nn.Sequential(nn.Dropout(0.4), nn.PReLU())",
    "nn.Sequential(nn.LPPool2d(2, 2), nn.Upsample(scale_factor=2))",
    *(
        f"x.scatter_reduce(-1, torch.zeros(x.shape).long(), like(x, y), {how})"
        for how in ('"prod"', '"amin"', '"amax"')
    ),
    # A loss module with a forward of its own
    "Focal()",
    # Parameters between sites, by keyword, in a list or behind a view
    "Fn(lambda m, x: F.linear(torch.tanh(m[0](x)), m[0].weight.T), linear())",
    "Fn(lambda m, x: F.linear(torch.tanh(m[0](x)), weight=m[0].weight), linear())",
    "Fn(lambda m, x: m[0](x) + torch.stack([m[0].bias, m[0].bias]).sum(0), linear())",
    # Views by functions without a rule
    'wrote(x, torch.einsum("...ij->...ji", x).mul_(2))',
    "wrote(z := torch.zeros_like(x), z.diagonal(0, 0, -1).copy_(fit(y, 1)))",
    # Ordinary tensors beside those that carry tangents, other spellings, 0-d tensors
    "torch.cat([torch.tensor([]), x], -1)",
    "x.expand_as(y)",
    "x.reshape_as(y)",
    "x.view_as(y)",
    "x.type_as(y)",
    "torch.where(condition=x > 0, input=x, other=y)",
    "F.cross_entropy(x, like(x, y).softmax(1))",
    "x.diagonal_scatter(fit(y, min(x.shape)))",
    "x.__setitem__(0, y[None, None])",
    "0-d",
    "no tangents",
    "x.round_()",
    "x.zero_()",
    # A write into an element of an expanded tensor
    "x.unsqueeze(-1).expand(*x.shape, 3)",
    # Functions without a forward formula
    "F.rrelu(x)",
    "nn.RReLU()",
    "torch.cdist(x, y)",
    "F.embedding_bag(r.rows(x)[None], x)",
    "F.grid_sample(x, fit(y, x.shape[0], 2, 2, 2).tanh(), align_corners=False)",
    "F.multi_margin_loss(x.log_softmax(1), r.rows(x, x.shape[0], 1))",
    "F.ctc_loss(fit(x, 4, 2, 3).log_softmax(-1), torch.ones(2, 1).long(), [4, 4], [1, 1])",
    "nn.MultiMarginLoss()",
    "nn.utils.parametrizations.weight_norm(linear())",
    # Batch normalisation of a plain function, whose statistics are held constant
    "F.batch_norm(x, None, None, fit(y, x.shape[1]), training=True)",
    # Checkpointing around a site and a frozen layer: an error of PyTorch's
    "Fn(lambda m, x: checkpointed(m[0], x), f)",
}


def table(text: str, arguments: str, names: dict[str, Any]) -> Table:
    """Building blocks by their own text: one a line, or several that differ in ``{one two}``.

    Args:
        text: Python expressions; lines that begin with a space go on with the one before.
        arguments: What the expressions are functions of.
        names: What else the expressions use, beside `torch`, `nn` and `F`.

    Examples:
        >>> table("abs({x -x})", "x", {})["abs(-x)"](3)
        3
    """
    lines = re.sub(r"\n +", " ", text.strip()).splitlines()
    blocks = [
        line.replace(f"{{{found[1]}}}", one) if found else line
        for line in lines
        for found in [re.search(r"{(.*)}", line)]
        for one in (found[1].split() if found else [""])
    ]
    names = {"torch": torch, "nn": nn, "F": F, **names}
    return {block: eval(f"lambda {arguments}: {block}", names) for block in blocks}


class Draw(Random):
    """Random choices: two with the same seed make the same ones.

    Attributes:
        pending: Whether building blocks that are pending are drawn too.
    """

    pending = False

    def allows(self, block: str) -> bool:
        """Whether a building block may be drawn."""
        return self.pending or block not in PENDING

    def name(self, *tables: Mapping[str, Any]) -> str:
        """The name of a building block of one of these tables."""
        names = [name for table in tables for name in table]
        while not self.allows(name := self.choice(names)):
            pass
        return name

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random() < probability

    def axis(self, x: Tensor) -> int:
        """One of the axes of a tensor, counted from either end."""
        return self.randrange(-x.ndim, x.ndim) if x.ndim else 0

    def rows(self, x: Tensor, count: int = 3, axis: int = 0) -> Tensor:
        """Positions along an axis, some of them twice."""
        return torch.tensor([self.randrange(x.shape[axis]) for _ in range(count)])

    def mask(self, shape: Sequence[int]) -> Tensor:
        """True and false in equal parts."""
        size = torch.Size(shape).numel()
        return torch.tensor([self.chance(0.5) for _ in range(size)]).reshape(shape)

    def tensor(self, *shape: int) -> Tensor:
        """Normal numbers; one tensor in four is rounded, and so has exact zeros and ties."""
        x = torch.randn(shape)
        return x.mul(2).round().div(2) if self.chance(0.25) else x
