"""Building blocks of models: each keeps the shape of what it gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from multitangent_lab.fuzz._draw import table

D = 4  # features of a vector or a token, rows and columns of an image
C = 2  # channels of an image


class Fn(nn.Module):
    """A module from a function of itself, `m`, and its input, `x`.

    Args:
        function: Called with both.
        parts: Modules, as ``m[0]``, ``m[1]``, ...
        values: What else the module has: parameters, tensors, which become buffers, plain values.
    """

    def __init__(self, function: Callable[..., Any], *parts: nn.Module, **values: Any) -> None:
        super().__init__()
        self.function = function
        self.parts = nn.ModuleList(parts)
        for name, value in values.items():
            if type(value) is Tensor:
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def __getitem__(self, index: int) -> nn.Module:
        return self.parts[index]

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


class Reversed(torch.autograd.Function):
    """The identity, whose gradient has the other sign."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -gradient


class Spike(torch.autograd.Function):
    """A step, with the slope of a sigmoid."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        s = ctx.saved_tensors[0].sigmoid()
        return gradient * s * (1 - s)


def checkpointed(function: Callable[..., Any], x: Tensor) -> Any:
    return checkpoint(function, x, use_reentrant=False)


off = torch.no_grad()  # a decorator


def linear() -> nn.Module:
    return nn.Linear(D, D)


def frozen() -> nn.Module:
    return linear().requires_grad_(False)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def evaluated(module: nn.Module) -> nn.Module:
    """In evaluation mode, with running statistics of its own."""
    for buffer in module.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return module.eval()


def unrolled(m: Any, x: Tensor) -> Tensor:
    """A recurrent cell, one token after another."""
    states = [x.new_zeros(x.shape[0], D)]
    for token in x.unbind(1):
        states.append(m[0](token, states[-1]))
    return torch.stack(states[1:], 1)


def written(m: Any, x: Tensor) -> Tensor:
    """A write into one column."""
    y = m[0](x).clone()
    y[..., 0] = x[..., 1] ** 2
    return y


# For tensors of any shape.
ANYWHERE = table(
    """
nn.{CELU ELU GELU Hardsigmoid Hardswish Hardtanh Identity LeakyReLU LogSigmoid Mish PReLU ReLU
  ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink}()
nn.{CELU ELU Hardsigmoid Hardswish Hardtanh LeakyReLU Mish ReLU ReLU6 SELU SiLU}(inplace=True)
nn.Dropout(0.4)
nn.Dropout(0.4).eval()
nn.Sequential(nn.Dropout(0.4), nn.PReLU())
Fn(lambda m, x: x * x.detach().sigmoid())
Fn(lambda m, x: x * off(torch.tanh)(x))
Fn(lambda m, x: Reversed.apply(x))
Fn(lambda m, x: x + Spike.apply(x))
Fn(lambda m, x: x + (x.round() - x).detach())
Fn(lambda m, x: x * m.w, w=parameter(1))
Fn(lambda m, x: x.clamp(-0.5, 0.5))
Fn(lambda m, x: x.clone().mul_(2).add_(1))
Fn(lambda m, x: torch.zeros_like(x).add_(x).sub_(0.1))
Fn(lambda m, x: 2 * x if x.requires_grad else -x)
Fn(lambda m, x: checkpointed(torch.tanh, x))
""",
    "r",
    globals(),
)
# The last axis has D features.
FEATURES = table(
    """
linear()
frozen()
nn.Linear(D, D, bias=False)
nn.LayerNorm(D)
nn.RMSNorm(D)
nn.Sequential(nn.Linear(D, 3), nn.Tanh(), nn.Linear(3, D))
nn.utils.parametrizations.weight_norm(linear())
Fn(lambda m, x: F.glu(m[0](x), -1), nn.Linear(D, 2 * D))
Fn(lambda m, x: m[0](x, x.sin()), nn.Bilinear(D, D, D))
Fn(lambda m, x: (m[0](x).softmax(-1)[..., None] * torch.stack([m[1](x), x], -2)).sum(-2),
  nn.Linear(D, 2), linear())
Fn(lambda m, x: torch.where(m[0](x).argmax(-1, keepdim=True) > 0, m[1](x), x), linear(), linear())
Fn(lambda m, x: m[0](x) + m[2](m[1](x)), frozen(), nn.Linear(D, 1), nn.Linear(1, D))
Fn(lambda m, x: x + m[0](x.argmax(-1)), nn.Embedding(D, D))
Fn(lambda m, x: m[0](torch.tanh(m[0](x))), linear())
Fn(lambda m, x: m[0](m[1](x)), *[linear()] * 3)
Fn(lambda m, x: F.linear(torch.tanh(m[0](x)), m[0].weight.T), linear())
Fn(lambda m, x: F.linear(torch.tanh(m[0](x)), weight=m[0].weight), linear())
Fn(lambda m, x: m[0](x) + torch.stack([m[0].bias, m[0].bias]).sum(0), linear())
Fn(lambda m, x: x * m.w + m.b, w=parameter(D), b=parameter(D))
Fn(lambda m, x: (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1))
Fn(lambda m, x: F.normalize(m[0](x), dim=-1), linear())
Fn(lambda m, x: torch.cat([m[0](x[..., :2]), x[..., 2:]], -1), nn.Linear(2, 2))
Fn(lambda m, x: m[0](x).cumsum(-1), linear())
Fn(lambda m, x: m[0](x).sort(-1).values, linear())
Fn(lambda m, x: x * off(m[0])(x), linear())
Fn(written, linear())
""",
    "r",
    globals(),
)
VECTORS = table(
    """
nn.BatchNorm1d(D)
nn.BatchNorm1d(D, track_running_stats=False)
evaluated(nn.BatchNorm1d(D))
Fn(lambda m, x: m[0](x, m[0](x, x)), nn.GRUCell(D, D))
Fn(lambda m, x: m[0](x, m[0](x))[0], nn.LSTMCell(D, D))
Fn(lambda m, x: m[0](x[x[:, 0].argsort()])[x[:, 0].argsort().argsort()], linear())
""",
    "r",
    globals(),
)
SEQUENCES = table(
    """
Fn(lambda m, x: m[0](x, x, x)[0], nn.MultiheadAttention(D, 2, batch_first=True))
Fn(lambda m, x: m[0](x, x, x, need_weights=False)[0], nn.MultiheadAttention(D, 2, batch_first=True))
Fn(lambda m, x: F.scaled_dot_product_attention(m[0](x), x, x, is_causal=True), linear())
Fn(lambda m, x: (m[0](x) @ x.mT / 2).softmax(-1) @ x, linear())
nn.TransformerEncoderLayer(D, 2, 5, dropout=0.0, batch_first=True, norm_first=r.chance(0.5))
Fn(lambda m, x: m[0](x)[0], nn.{GRU(D,D,batch_first=True) RNN(D,D,batch_first=True)
  LSTM(D,D//2,batch_first=True,bidirectional=True)})
Fn(lambda m, x: m[0](x.transpose(0, 1))[0].transpose(0, 1), nn.GRU(D, D))
Fn(lambda m, x: m[0](x.transpose(0, 1)).transpose(0, 1), linear())
Fn(lambda m, x: F.dropout(x.transpose(0, 1), 0.4).transpose(0, 1))
Fn(unrolled, nn.GRUCell(D, D))
Fn(lambda m, x: m[0](x.mT).mT, nn.Conv1d(D, D, 3, padding=1))
Fn(lambda m, x: x + m[0](torch.arange(x.shape[1])), nn.Embedding(4, D))
Fn(lambda m, x: x + m.w[: x.shape[1]], w=parameter(4, D))
Fn(lambda m, x: x + m[0](x.mean(1, keepdim=True)), linear())
Fn(lambda m, x: x.masked_fill(x[..., :1] > 0.5, 0.0))
Fn(lambda m, x: m[0](x.reshape(-1, D)).view(x.shape), linear())
Fn(lambda m, x: x.flip(1))
""",
    "r",
    globals(),
)
IMAGES = table(
    """
nn.Conv2d(C, C, 3, padding=1, padding_mode=r.choice(["zeros", "circular", "reflect"]))
nn.Conv2d(C, C, 3, padding="same", groups=C)
nn.Sequential(nn.Conv2d(C, 3, 2, stride=2), nn.ConvTranspose2d(3, C, 2, stride=2))
nn.BatchNorm2d(C, momentum=r.choice([0.1, None]))
evaluated(nn.BatchNorm2d(C))
nn.GroupNorm(1, C)
nn.InstanceNorm2d(C, affine=True)
nn.InstanceNorm2d(C, track_running_stats=True)
nn.{Max Avg}Pool2d(3, 1, 1)
nn.Sequential(nn.LPPool2d(2, 2), nn.Upsample(scale_factor=2))
nn.Sequential(nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear"))
nn.PReLU(C)
nn.LocalResponseNorm(2)
nn.Dropout2d(0.4)
linear()
Fn(lambda m, x: x * m[0](x.mean((2, 3))).sigmoid()[..., None, None], nn.Linear(C, C))
Fn(lambda m, x: F.fold(m[0](F.unfold(x, 2, stride=2).mT).mT, (D, D), 2, stride=2), nn.Linear(8, 8))
""",
    "r",
    globals(),
)
FAMILIES = {
    "vectors": (FEATURES, VECTORS, ANYWHERE),
    "sequences": (SEQUENCES, SEQUENCES, FEATURES, ANYWHERE),
    "images": (IMAGES, IMAGES, ANYWHERE),
}

# What is put around a block `f`.
AROUND = table(
    """
Fn(lambda m, x: x + m[0](x), f)
Fn(lambda m, x: m[0](x).add_(x), f)
Fn(lambda m, x: m[0](m[0](x)), f)
Fn(lambda m, x: x * torch.sigmoid(m[0](x)), f)
Fn(lambda m, x: torch.maximum(x, m[0](x)), f)
Fn(lambda m, x: dict(y=(m[0](x), 1))["y"][0], f)
""",
    "f",
    globals(),
)
AGAIN = table("Fn(lambda m, x: checkpointed(m[0], x), f)", "f", globals())


def _count(m: Any, x: Tensor) -> Tensor:
    m.n += 1
    return x / m.n


def _average(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        m.mean.lerp_(x.flatten(0, -2).mean(0), 0.3)
    return x - m.mean


def _replaced(m: Any, x: Tensor) -> Tensor:
    m.mean = 0.7 * m.mean + 0.3 * x.detach().flatten(0, -2).mean(0)
    return x - m.mean


def _initialized(m: Any, x: Tensor) -> Tensor:
    if m.n == 0:
        m.mean.copy_(x.detach().flatten(0, -2).mean(0))
        m.n += 1
    return x - m.mean


def _kept(m: Any, x: Tensor) -> Tensor:
    m.state = torch.tanh(x if m.state is None else x + m.state).detach()
    return x + m.state


def _summed(m: Any, x: Tensor) -> Tensor:
    m.total += float(x.detach().sum())
    return x


def _largest(m: Any, x: Tensor) -> Tensor:
    """Fake quantisation, whose range is the largest value so far."""
    m.mean.copy_(torch.maximum(m.mean, x.detach().abs().amax()))
    return x.clamp(-0.8 * m.mean, 0.8 * m.mean)


def _forked(m: Any, x: Tensor) -> Tensor:
    """The same random numbers every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return x * torch.rand(D)


# What keeps a state between steps.
STATEFUL = table(
    """
Fn(_count, n={0 torch.tensor(0)})
Fn({_average _replaced _largest}, mean=torch.zeros(D))
Fn(_initialized, n=0, mean=torch.zeros(D))
Fn(_kept, state=None)
Fn(_summed, total=0.0)
Fn(_forked)
nn.utils.parametrizations.spectral_norm(linear())
Fn(lambda m, x: m[0](x.reshape(-1, D)).reshape(x.shape), nn.BatchNorm1d(D, momentum=None))
Fn(lambda m, x: x + m[0](x.argmax(-1)), nn.Embedding(D, D, max_norm=1.0))
""",
    "r",
    globals(),
)
# What draws random numbers.
RANDOM = table(
    """
Fn(lambda m, x: x * torch.rand(x.shape))
Fn(lambda m, x: x + 0.3 * torch.randn_like(x))
Fn(lambda m, x: x * torch.empty_like(x).normal_())
Fn(lambda m, x: x * torch.rand(D))
Fn(lambda m, x: x * torch.bernoulli(torch.full_like(x, 0.7)))
Fn(lambda m, x: x * torch.empty(len(x), *[1] * (x.ndim - 1)).bernoulli_(0.7))
Fn(lambda m, x: x * F.gumbel_softmax(x))
Fn(lambda m, x: x + torch.distributions.Normal(x, 0.3).rsample())
Fn(lambda m, x: x * torch.multinomial(torch.ones(D), 1))
Fn(lambda m, x: x[..., torch.randperm(D)])
Fn(lambda m, x: x * 2 if torch.rand(()) < 0.5 else x)
Fn(lambda m, x: F.dropout(x, 0.4))
nn.{AlphaDropout(0.3) FeatureAlphaDropout(0.3) RReLU()}
""",
    "r",
    globals(),
)


def needs_simulation(block: str) -> bool:
    """Whether plain PyTorch cannot tell what is right.

    It draws other random numbers, and differentiates through the statistics of a batch.
    """
    return block in RANDOM or "Dropout" in block or "dropout(" in block or "BatchNorm" in block
