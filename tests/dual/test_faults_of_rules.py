"""Derivatives where a function has a kink, a tie or a zero: backpropagation's, everywhere."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from multitangent.dual import DualTensor

K = 3
INF = math.inf


def points(*values):
    return torch.tensor(values, dtype=torch.float64)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


LINE = points(-6, -3, -2, -1, -0.5, 0, 0, 0.5, 1, 2, 3, 6)
ZEROS = torch.zeros(3, 4, dtype=torch.float64)
TIES = points([-1, 0, 0, 2], [1, 1, 0, -1], [3, 3, 3, 3])
OTHER = points([-1, 0, 1, 2], [1, 0, 0, -1], [3, 2, 3, 4])  # agrees with TIES in places
IMAGE = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
IMAGE[0, 0, :2], IMAGE[1, 1, 2] = 1, -1
CHOICE = torch.tensor([[0, 0, 1], [1, 1, 1], [3, 0, 0]])
WORDS = torch.tensor([[0, 2, 2], [3, 3, 1]])
TABLE = random(5, 3)
LOGITS = random(5, 3, 4)
LABELS = torch.tensor([[1, 2], [1, 1], [2, 3]])
GRID = torch.rand(2, 3, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
SIGNS = torch.tensor([1, -1, 1])
RELEVANT = torch.tensor([[0, 1, -1, 0], [1, -1, 0, 0], [2, 3, 1, -1]])
NORMS = (1, 2, 3, 0.5, INF)


def fixed(function, *last, **options):
    """A function whose last arguments are given."""
    return lambda *args, **kwargs: function(*args, *last, **options, **kwargs)


def named(functions, *args):
    return {f"{f.__name__}{i}": (f, *args) for i, f in enumerate(functions)}


ACTIVATIONS = named(
    (
        F.relu, F.relu6, F.hardtanh, F.hardswish, F.hardsigmoid, F.hardshrink, F.softshrink,
        F.leaky_relu, F.celu, torch.celu, F.elu, F.selu, torch.selu, F.mish, F.silu, F.softsign,
        F.tanhshrink, F.logsigmoid, F.gelu, F.softplus, F.glu, torch.abs, torch.frac,
        torch.sinc,
        lambda x: F.threshold(x, 0.5, 1.0),
        lambda x: F.elu(x, 0.0),
        lambda x: F.leaky_relu(x, -0.3),
        lambda x: torch.logit(x / 12 + 0.5, 0.25),
        lambda x: x.clamp(-1, 3),
        lambda x: x.clamp(1, 0),
        lambda x: torch.clamp_min(x, 0),
        lambda x: x.clamp_max(3),
        lambda x: x.clip(-1, 3),
        lambda x: torch.heaviside(x.detach(), points(0.5)) * x,
        lambda x: torch.fmod(x, 1.0),
        lambda x: x % 2,
        lambda x: torch.nan_to_num(torch.where(x > 0, x, INF)),
        lambda x: torch.where(x > 0, x, x * 0),
        lambda x: torch.relu(x).sqrt(),
        lambda x: torch.relu(x) ** 0.5,
        lambda x: torch.relu(x) ** points(0.5),
    ),
    LINE,
)  # fmt: skip
PAIRS = named(
    (
        torch.fmax, torch.fmin, torch.maximum, torch.minimum, torch.max, torch.min, torch.atan2,
        torch.hypot, torch.copysign, F.prelu, torch.clamp, torch.clamp_min,
        lambda x, y: torch.clamp(x, y, y),
        lambda x, y: torch.remainder(x, y + 4),
        lambda x, y: torch.fmod(x, y + 4),
        lambda x, y: torch.xlogy(x, y.abs()),
        lambda x, y: torch.special.xlog1py(x, y.abs()),
    ),
    TIES,
    OTHER,
)  # fmt: skip
PAIRS |= {f"{name} of zeros": (f, ZEROS, ZEROS) for name, (f, *_) in PAIRS.items() if f != F.prelu}
PAIRS |= {
    f"prelu {len(weight)}": (F.prelu, TIES, weight)
    for weight in (points(0.25), points(0.25, 0.1, 0, -1))
}
del PAIRS["prelu9"]
POWERS = {
    "0 ** y": (lambda y: torch.zeros_like(y) ** y, points(0, 1, 2, 0.5)),
    "number ** y": (lambda y: 0.0**y, points(0, 1, 2, 0.5)),
    "x ** x": (lambda x: x**x, points(0, 1, 2, 0)),
    "x ** y": (lambda x, y: x**y, points(0, 0, 0, 1, 2), points(0, 1, 2, 0, 0)),
    "negative ** y": (lambda x, y: x**y, points(-1, -2, -2), points(2, 3, 0)),
    "x ** tensor": (lambda x: x ** points(0, 1, 2, 0), points(0, 0, 0, 2)),
    "float power": (lambda x: torch.float_power(x, 0), points(0, 1)),
    **{f"x ** {p}": (lambda x, p=p: x**p, points(0, 1, 2)) for p in (0, 1, 2, 3, 2.5)},
}
CHOICES = named(
    (
        torch.max, torch.min, torch.median, torch.nanmedian, torch.amax, torch.amin,
        torch.aminmax, torch.msort,
        lambda x: torch.quantile(x, 0.3, 1),
        lambda x: x.max(1)[0],
        lambda x: x.max(dim=0, keepdim=True).values,
        lambda x: x.min(-1).values,
        lambda x: x.median(1)[0],
        lambda x: x.mode(1)[0],
        lambda x: x.sort(1)[0],
        lambda x: torch.sort(x, descending=True, stable=True)[0],
        lambda x: x.topk(2, 1)[0],
        lambda x: torch.topk(x, k=2)[0],
        lambda x: x.kthvalue(2, 1)[0],
        lambda x: x.cummax(1)[0],
        lambda x: torch.cummin(x, dim=0)[0],
        lambda x: x.amax(1),
        lambda x: x.amin((0, 1), keepdim=True),
        lambda x: torch.amax(x, axis=1, keepdims=True),
        lambda x: torch.std(x + x.cos(), axis=0),
        lambda x: torch.linalg.norm(x, dim=1),
        lambda x: torch.max(x, axis=0).values,
        lambda x: torch.topk(x.T, k=2, dim=0).values,
        lambda x: torch.aminmax(x, dim=1),
    ),
    TIES,
)  # fmt: skip
POOLS = named(
    (
        lambda x: F.max_pool2d(x, 2),
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: F.adaptive_max_pool2d(x, 3),
        lambda x: F.lp_pool2d(x, 2.0, 2),
        lambda x: F.lp_pool2d(x, 3.0, 2, stride=1, ceil_mode=True),
        lambda x: F.lp_pool2d(x, 1.0, (2, 1)),
        lambda x: F.lp_pool1d(x[:, 0], 2.0, 2),
        lambda x: F.lp_pool3d(x[None], 2.0, 2),
        lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2),
        lambda x: F.local_response_norm(x, 2),
    ),
    IMAGE,
)
NORMED = {
    f"{name} {p} of {label}": (lambda x, f=f, p=p: f(x, p), x)
    for label, x in (("zeros", ZEROS), ("ties", TIES))
    for p in NORMS
    for name, f in {
        "vector norm": lambda x, p: torch.linalg.vector_norm(x, p, dim=1),
        "norm": lambda x, p: x.norm(p, 1, keepdim=True),
        "norm of all": lambda x, p: torch.norm(x, p),
        "dist": lambda x, p: torch.dist(x, OTHER, p),
        "normalize": lambda x, p: F.normalize(x, p),
        "renorm": lambda x, p: torch.renorm(x, 2 if p == INF else p, 0, 1.0),
        "pairwise distance": lambda x, p: F.pairwise_distance(x, x, p),
        "cdist": lambda x, p: torch.cdist(x, OTHER, p),
        "cdist of equal points": lambda x, p: torch.cdist(x, x, p),
        "cdist of batches": lambda x, p: torch.cdist(torch.stack([x, x + 1]), OTHER[None, :2], p),
        "pdist": lambda x, p: F.pdist(torch.cat([x, x]), p),
        "std": lambda x, p: torch.std(x, 1),
        "var": lambda x, p: x.var(0, correction=0, keepdim=True),
        "std of all": lambda x, p: x.std(),
        "std mean": lambda x, p: torch.std_mean(x, 1),
        "var mean": lambda x, p: torch.var_mean(x),
        "prod": lambda x, p: x.prod(1),
        "prod of all": lambda x, p: x.prod(),
        "cumprod": lambda x, p: x.cumprod(1),
        "matrix norm": lambda x, p: torch.linalg.matrix_norm(x),
        "cosine": lambda x, p: F.cosine_similarity(x, OTHER),
        "cosine of equal vectors": lambda x, p: F.cosine_similarity(x, x, dim=0),
        "cosines": lambda x, p: F.cosine_similarity(x[:, None], OTHER[None], dim=-1),
        "logsumexp": lambda x, p: x.logsumexp(1),
    }.items()
    if p == 2 or name in ("vector norm", "norm", "norm of all", "dist", "normalize", "renorm",
                          "pairwise distance", "cdist", "cdist of equal points", "pdist")
}  # fmt: skip
INFINITIES = {
    "logsumexp": (lambda x: torch.logsumexp(x, 1), points([-INF, -INF], [-INF, 1])),
    "softmax": (lambda x: torch.softmax(x, 1), points([-INF, 0, 1])),
    "log softmax": (lambda x: torch.log_softmax(x, 1)[:, 1:], points([-INF, 0, 1])),
    "logaddexp": (torch.logaddexp, points(-INF, 0), points(1, 1)),
}
REDUCTIONS = ("none", "mean", "sum")
LOSSES = {
    f"{name} {reduction}": (lambda *x, f=f, r=reduction: f(*x, reduction=r), *args)
    for reduction in REDUCTIONS
    for name, (f, *args) in {
        "l1": (F.l1_loss, TIES, OTHER),
        "smooth l1": (F.smooth_l1_loss, TIES, OTHER),
        "smooth l1 beta": (fixed(F.smooth_l1_loss, beta=0), TIES, OTHER),
        "huber": (F.huber_loss, TIES, OTHER),
        "mse": (F.mse_loss, TIES, OTHER),
        "bce": (F.binary_cross_entropy, points(0.1, 0.9, 0.5), points(0, 1, 1)),
        "bce of a target": (F.binary_cross_entropy, points(0.2, 0.3), points(0, 1)),
        "bce with logits": (F.binary_cross_entropy_with_logits, TIES, OTHER),
        "kl": (F.kl_div, TIES, OTHER.abs()),
        "poisson": (F.poisson_nll_loss, TIES, OTHER),
        "gaussian": (F.gaussian_nll_loss, TIES, OTHER, ZEROS),
        "hinge": (F.hinge_embedding_loss, TIES, OTHER.sign() + (OTHER == 0)),
        "margin ranking": (F.margin_ranking_loss, TIES[:, 0], OTHER[:, 1], points(1, -1, 1)),
        "soft margin": (fixed(F.soft_margin_loss, OTHER), TIES),
        "multi margin": (fixed(F.multi_margin_loss, WORDS[0]), TIES),
        "multi margin squared": (
            fixed(F.multi_margin_loss, WORDS[0], p=2, weight=points(1, 2, 3, 4)), TIES,
        ),
        "multi label margin": (fixed(F.multilabel_margin_loss, RELEVANT), TIES),
        "multi label soft margin": (F.multilabel_soft_margin_loss, TIES, (OTHER > 0).double()),
        "triplet": (F.triplet_margin_loss, TIES, OTHER, ZEROS),
        "triplet of equal points": (F.triplet_margin_loss, TIES, TIES, TIES),
        "triplet by distance": (F.triplet_margin_with_distance_loss, TIES, OTHER, TIES),
        "cosine embedding": (fixed(F.cosine_embedding_loss, SIGNS), TIES, OTHER),
        "nll": (fixed(F.nll_loss, WORDS[0]), TIES),
        "nll of pixels": (fixed(F.nll_loss, SIGNS[None] + 1), TIES.T[None]),
        "ctc": (
            fixed(F.ctc_loss, LABELS, (5, 4, 5), (2, 1, 2)), LOGITS.log_softmax(-1),
        ),
    }.items()
}  # fmt: skip
GROUPS = {
    f"{function.__qualname__} {place[0]} {reduce} {include} {label}": (
        lambda x, y, f=function, place=place, r=reduce, i=include: f(
            x, *place, y, r, include_self=i
        ),
        TIES,
        source[cut],
    )
    for function, cut, *place in (
        (torch.scatter_reduce, (slice(3), slice(3)), 1, CHOICE),
        (Tensor.scatter_reduce, (slice(1), slice(2)), 0, CHOICE[:1, :2]),
        (torch.index_reduce, (slice(3), slice(4)), 0, SIGNS + 1),
    )
    for reduce in ("sum", "prod", "mean", "amin", "amax")
    for include in (True, False)
    for label, source in (("ties", TIES), ("others", OTHER))
    if (function, reduce) != (torch.index_reduce, "sum")
}  # fmt: skip
GROUPS |= {
    "products of zeros": (
        lambda x, y: x.scatter_reduce(0, torch.tensor([0, 0, 1, 1]), y, "prod"),
        points(0, 1), points(5, 2, 0, 0),
    ),
    **{
        f"segments {reduce}": (
            lambda x, r=reduce: torch.segment_reduce(x, r, lengths=torch.tensor([1, 2])), TIES,
        )
        for reduce in ("max", "min", "sum", "mean", "prod")
    },
}  # fmt: skip
OTHERS = {
    **{
        f"grid sample {mode} {padding}": (
            lambda x, g, m=mode, p=padding: F.grid_sample(x, g, m, p, align_corners=False),
            random(2, 2, 4, 4), 2.4 * GRID - 1.2,
        )
        for mode in ("bilinear", "nearest", "bicubic")
        for padding in ("zeros", "border", "reflection")
    },
    "grid sample 3d": (
        fixed(F.grid_sample, align_corners=True), random(2, 2, 3, 3, 3), random(2, 1, 2, 2, 3),
    ),
    **{
        f"bags {mode} {padding}": (
            lambda w, m=mode, p=padding: F.embedding_bag(WORDS, w, mode=m, padding_idx=p), TABLE,
        )
        for mode in ("sum", "mean", "max")
        for padding in (None, 2)
    },
    "bags of ties": (lambda w: F.embedding_bag(WORDS, w, mode="max"), 0 * TABLE),
    "bags with offsets": (
        lambda w: F.embedding_bag(WORDS.flatten(), w, torch.tensor([0, 2, 2]), mode="mean"), TABLE,
    ),
    "empty bags": (
        lambda w: F.embedding_bag(WORDS.flatten(), w, torch.tensor([0, 2, 2]), mode="max"), TABLE,
    ),
    "weighted bags": (
        lambda w, s: F.embedding_bag(WORDS, w, mode="sum", per_sample_weights=s),
        TABLE, random(2, 3),
    ),
    "padding": (lambda w: F.embedding(WORDS, w, padding_idx=-3), TABLE),
    "longest rows": (lambda w: F.embedding(WORDS, w * 1, max_norm=1e3), TABLE),
    "sparse rows": (lambda w: F.embedding(WORDS, w * 1, sparse=True), TABLE),
    "soft rows": (lambda w: F.embedding(WORDS, torch.softmax(w, 0)), TABLE),
    **{
        f"weight norm {dim}": (
            lambda v, g, d=dim: torch._weight_norm(v, g, d), random(3, 4), random(*shape, seed=1),
        )
        for dim, shape in ((0, (3, 1)), (1, (1, 4)))
    },
    "fake quantisation": (
        lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 0, -10, 10), TIES.float(),
    ),
    "by channel": (
        lambda x: torch.fake_quantize_per_channel_affine(
            x, torch.ones(4), torch.zeros(4, dtype=torch.int32), 1, -2, 2
        ),
        TIES.float(),
    ),
    "meshgrid": (
        lambda x, y: torch.meshgrid(x, y, indexing="ij"), points(1, 2), points(3, 4, 5),
    ),
    "grids of products": (torch.cartesian_prod, points(1, 2), points(3, 4, 5)),
    "masked scatter": (lambda x, s: x.masked_scatter(TIES > 0, s), TIES, OTHER),
    "bilinear": (F.bilinear, TIES, OTHER, random(2, 4, 4)),
    "unfold": (lambda x: F.unfold(x, 2), IMAGE),
    "bicubic": (lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"), IMAGE),
    "triplet of rows": (fixed(F.triplet_margin_loss, OTHER, ZEROS[:1], reduction="none"), TIES),
}  # fmt: skip
CALLS = {
    f"{group}: {name}": call
    for group, table in {
        "activation": ACTIVATIONS, "pair": PAIRS, "power": POWERS, "choice": CHOICES,
        "pool": POOLS, "norm": NORMED, "infinity": INFINITIES, "loss": LOSSES, "group": GROUPS,
        "other": OTHERS,
    }.items()
    for name, call in table.items()
}  # fmt: skip


def tensors(out):
    return [out] if isinstance(out, Tensor) else list(out)


def products(gradients, tangents):
    """``<gradient, tangent>`` for every tangent, of all tensors together."""
    return sum(
        (t * g.to_dense()).reshape(K, -1).sum(1) for g, t in zip(gradients, tangents, strict=True)
    )


@pytest.mark.filterwarnings("ignore:reduction. 'mean':UserWarning", "ignore:index_reduce")
@pytest.mark.parametrize("name", CALLS)
def test_derivatives_are_those_of_backpropagation(name):
    function, *inputs = CALLS[name]
    tangents = [random(K, *x.shape, seed=2 + i).to(x.dtype) for i, x in enumerate(inputs)]
    leaves = [x.clone().requires_grad_() for x in inputs]
    outputs = tensors(function(*leaves))
    weights = [random(*out.shape, seed=9).to(out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, leaves, weights, materialize_grads=True)
    found = tensors(function(*[DualTensor(x, t) for x, t in zip(inputs, tangents, strict=True)]))
    for dual, out in zip(found, outputs, strict=True):
        torch.testing.assert_close(dual.primal, out.detach(), rtol=1e-12, atol=0, equal_nan=True)
    torch.testing.assert_close(
        products(weights, [dual.tangents for dual in found]),
        products(gradients, tangents),
        rtol=1e-9 if inputs[0].dtype is torch.float64 else 1e-5,
        atol=1e-12 if inputs[0].dtype is torch.float64 else 1e-6,
        equal_nan=True,
    )
