"""Functions of PyTorch, composed at random: the tangents of dual tensors against autograd."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from multitangent.dual import DualTensor, full_tangents, pad_rows
from multitangent_lab.fuzz._comparison import Case, Values
from multitangent_lab.fuzz._draw import Draw, table


def fit(x: Tensor, *shape: int) -> Tensor:
    """The values of a tensor, over and over, in another shape."""
    size = torch.Size(shape).numel()
    return x.reshape(-1).repeat(size // max(x.numel(), 1) + 1)[:size].reshape(shape)


def like(x: Tensor, y: Tensor) -> Tensor:
    """The values of `y` in the shape of `x`."""
    return fit(y, *x.shape)


def square(x: Tensor) -> Tensor:
    """A well-conditioned matrix."""
    return fit(x, 3, 3) @ fit(x, 3, 3).mT / 4 + torch.eye(3)


def wrote(x: Tensor, written: Any) -> Tensor:
    """A tensor, after something has been written into it."""
    return x


# Of two tensors x and y; `r` draws options. Any number of tensors may be returned, and tensors may
# be written into. What PyTorch refuses for the shapes at hand is drawn again.
FUNCTIONS = table(
    """
torch.{abs acos acosh aminmax amax amin argmax asin asinh atan atanh atleast_1d atleast_3d ceil
  clone corrcoef cos cosh cov cumulative_trapezoid deg2rad diag diag_embed diff digamma erf erfc
  erfinv exp exp2 expm1 flatten fliplr floor frac i0 isfinite lgamma log log10 log1p log2 logit
  matrix_exp max mean median min nanmean nanmedian nansum nan_to_num neg norm numel ones_like
  positive prod ravel reciprocal relu round rsqrt sgn sigmoid sign sin sinc sinh sqrt square
  squeeze std sum t tan tanh trace trapezoid tril triu trunc var zeros_like}(x)
torch.special.{entr erfcx expit i0e i1 i1e log_ndtr ndtr}(x)
F.{celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid mish normalize
  relu6 rrelu selu silu softplus softshrink softsign tanhshrink}(x)
torch.{add atan2 block_diag bmm broadcast_tensors cartesian_prod cdist copysign
  dist div dot eq float_power floor_divide fmax fmin fmod ge heaviside hypot isclose
  logaddexp logaddexp2 matmul maximum meshgrid minimum mm mul mv outer pow remainder rsub sub
  xlogy}(x, y)
torch.{column_stack dstack hstack vstack}([x, y])
torch.{all amax amin argmin argsort cummax cummin cumprod cumsum log_softmax logcumsumexp
  logsumexp max mean median min mode nansum norm prod softmax sort squeeze std std_mean sum unbind
  unsqueeze var var_mean}(x, r.axis(x))
torch.{chunk kthvalue split tensor_split topk}(x, r.choice([1, 2]), r.axis(x))
torch.{movedim swapaxes transpose}(x, r.axis(x), r.axis(x))
x.{__radd__ __rmul__ __rpow__ __rsub__ __rtruediv__}(2.0)
x.{abs_ detach exp_ neg_ relu_ requires_grad_ round_ sigmoid_ sin_ square_ tanh_ tril_ zero_}()
x.{add_ atan2_ copy_ div_ fmod_ mul_ pow_ sub_}(y)
x.{expand_as reshape_as type_as view_as}(y)
F.{binary_cross_entropy_with_logits cosine_similarity hinge_embedding_loss huber_loss kl_div
  l1_loss mse_loss pairwise_distance poisson_nll_loss smooth_l1_loss}(x, like(x, y))
F.{adaptive_avg_pool1d adaptive_max_pool1d adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d
  channel_shuffle glu interpolate local_response_norm max_pool1d max_pool2d max_pool3d pixel_shuffle
  pixel_unshuffle unfold}(x, r.choice([1, 2]))
F.lp_pool1d(x, 2.0, 2)
F.adaptive_avg_pool2d(x[None], (2, 1))
F.max_pool1d(x, 3, 1, 1)
F.max_unpool1d(*F.max_pool1d(x, 2, return_indices=True), 2)
F.fold(F.unfold(x, 2), x.shape[-2:], 2)
F.prelu(x, fit(y, 1))
F.{relu leaky_relu elu silu}(x, inplace=True)
x.clamp(-0.5, 1.0)
torch.clamp(x, min=y, max=y + 1)
(2 - x) / 3 + x * 2 + 1.5 * x - x / 4
2 // (x.abs() + 1) + x
x ** r.choice([0, 1, 2, 3, -1, 0.5, 2.5])
r.choice([0.0, 1.0, 2.0]) ** x
x.abs() ** x.abs()
torch.div(x, y, rounding_mode=r.choice(["floor", "trunc", None]))
torch.add(x, y, alpha=3)
torch.mul(input=x, other=y)
torch.lerp(x, 2 * x, y)
torch.cross(x, like(x, y) + x.exp())
torch.addcmul(x, x, y, value=0.5)
torch.addcdiv(x, y, y.abs() + 1)
x.addcmul_(y, y)
torch.where(x > y, x, y)
torch.where(x > 0, x, 0.5)
torch.where(condition=x > 0, input=x, other=y)
x.sum(r.axis(x), keepdim=True) * x
x.mean((0, -1))
torch.linalg.vector_norm(x, r.choice([0, 1, 2, 3, torch.inf]), r.axis(x))
torch.renorm(x, 2, 0, 1.0)
x.quantile(0.3)
x @ x.mT
x @ fit(y, x.shape[-1], 2)
torch.einsum(r.choice(["...i,...j->...ij", "...i,...i->...", "...i,...i->i..."]), x, x + y)
torch.einsum("...ij->...ji", x)
torch.tensordot(x, fit(y, x.shape[-1], 2), 1)
F.linear(x, fit(y, 2, x.shape[-1]), r.choice([None, fit(x, 2)]))
F.linear(x, weight=fit(y, 2, x.shape[-1]))
F.bilinear(x, x, fit(y, 2, x.shape[-1], x.shape[-1]))
torch.addmm(fit(y, 2), x, fit(y, x.shape[-1], 2), beta=0.5, alpha=2)
torch.baddbmm(fit(y, 1), x, x.mT)
torch.linalg.{cholesky det inv slogdet}(square(x))
torch.linalg.solve(square(x), fit(y, 3, 2))
torch.matrix_power(square(x), 3)
x.permute(*r.sample(range(x.ndim), x.ndim))
x.{reshape view}(r.choice([(-1,), (x.shape[0], -1), (-1, 2), (1, *x.shape)]))
x.expand(2, *x.shape)
x.unsqueeze(-1).expand(*x.shape, 3)
x.unflatten(-1, (1, -1))
x.{narrow(r.axis(x),0,1) select(r.axis(x),0) diagonal(0,0,-1) unfold(-1,2,1) mT mH}
x.clone().contiguous().as_strided((2, 2), (1, 1))
x[r.choice([slice(None, None, 2), slice(1, None), slice(0, 1)])]
x[..., r.choice([None, slice(1, None), slice(None, 1), 0, -1])]
x.roll(1, r.axis(x))
torch.rot90(x, 1, (0, -1))
x.repeat(2, *[1] * x.ndim)
x.{tile(2) flip(r.axis(x)) flip(0,-1)}
x.repeat_interleave(2, r.axis(x))
x.repeat_interleave(torch.arange(x.shape[0]), 0)
torch.cat([x, like(x, y), x], r.axis(x))
torch.cat([torch.tensor([]), x], -1)
torch.stack([x, like(x, y)], r.axis(x))
torch.take(x, r.rows(x.flatten()))
x[r.rows(x)]
x[..., r.rows(x, 3, -1)]
x[:, [0, -1]]
x[r.mask(x.shape)]
x[x > 0]
x[r.rows(x), r.rows(x, 3, 1)]
x.index_select(r.axis(x), r.rows(x) * 0)
x.gather(0, torch.zeros(2, *x.shape[1:]).long())
torch.take_along_dim(x, x.argsort(-1), -1)
x.masked_select(r.mask(x.shape))
x.masked_fill(r.mask(x.shape), r.choice([0.5, y.sum()]))
x.masked_scatter(r.mask(x.shape), like(x, y))
x.index_add(0, r.rows(x), fit(y, 3, *x.shape[1:]))
x.index_copy(0, r.rows(x, 1), fit(y, 1, *x.shape[1:]))
x.index_fill(0, r.rows(x), 0.5)
x.index_put((r.rows(x),), fit(y, 3, *x.shape[1:]), accumulate=True)
x.scatter(0, torch.zeros(1, *x.shape[1:]).long(), like(x, y))
x.scatter_add(-1, torch.zeros(x.shape).long(), like(x, y))
x.scatter_reduce(-1, torch.zeros(x.shape).long(), like(x, y), {"amax" "amin" "mean" "prod" "sum"})
x.select_scatter(fit(y, *x.shape[1:]), 0, 0)
x.diagonal_scatter(fit(y, min(x.shape)))
F.embedding(r.rows(x), x, r.choice([None, 0]))
F.embedding_bag(r.rows(x)[None], x)
F.layer_norm(x, x.shape[-1:], fit(y, x.shape[-1]), fit(x, x.shape[-1]))
F.rms_norm(x, x.shape[-1:], fit(y, x.shape[-1]))
F.group_norm(x, 1, fit(y, x.shape[1]), fit(x, x.shape[1]))
F.batch_norm(x, torch.zeros(x.shape[1]), torch.ones(x.shape[1]), fit(y, x.shape[1]))
F.batch_norm(x, None, None, fit(y, x.shape[1]), training=True)
F.instance_norm(x, weight=fit(y, x.shape[1]))
F.conv1d(x, fit(y, 2, x.shape[-2], 2), None, r.choice([1, 2]), r.choice([0, 1]))
F.conv1d(x, fit(y, x.shape[-2], 1, 2), groups=x.shape[-2])
F.conv2d(x, fit(y, 2, x.shape[-3], 2, 2), fit(x, 2), 1, r.choice([0, 1, "same"]))
F.conv_transpose1d(x, fit(y, x.shape[-2], 2, 2), stride=2)
F.pad(x, (1, 1), r.choice(["constant", "reflect", "replicate", "circular"]))
F.interpolate(x, None, 2, r.choice(["nearest", "linear", "bilinear", "bicubic", "area"]))
F.grid_sample(x, fit(y, x.shape[0], 2, 2, 2).tanh(), align_corners=False)
F.scaled_dot_product_attention(x, like(x, y), x, is_causal=r.chance(0.5))
F.cross_entropy(x, r.rows(x, x.shape[0], 1), reduction=r.choice(["none", "mean", "sum"]))
F.cross_entropy(x, r.rows(x, x.shape[0], 1), label_smoothing=0.1)
F.cross_entropy(x, like(x, y).softmax(1))
F.{nll_loss multi_margin_loss}(x.log_softmax(1), r.rows(x, x.shape[0], 1))
F.gaussian_nll_loss(x, like(x, y), x.exp())
F.binary_cross_entropy(x.sigmoid(), like(x, y).sigmoid())
F.soft_margin_loss(x, 2.0 * r.mask(x.shape) - 1)
F.multilabel_soft_margin_loss(x, r.mask(x.shape).double())
F.triplet_margin_loss(x, like(x, y), -x)
F.margin_ranking_loss(x, like(x, y), torch.ones(()))
F.cosine_embedding_loss(x, like(x, y), torch.ones(x.shape[0]))
F.ctc_loss(fit(x, 4, 2, 3).log_softmax(-1), torch.ones(2, 1).long(), [4, 4], [1, 1])
x.__setitem__(0, y[(0,) * (y.ndim - x.ndim + 1)])
x.__setitem__(0, y[None, None])
x.__setitem__((..., slice(0, 1)), y)
x.__setitem__((..., 0), 2.0)
x.__setitem__(r.mask(x.shape), y.sum())
x.__setitem__(r.rows(x, 1), fit(y, *x.shape[1:]))
wrote(x, x.reshape(-1)[:2].mul_(3))
wrote(x, x.mT[0].add_(y.sum()))
wrote(x, x.diagonal(0, -2, -1).mul_(2))
wrote(x, x[..., 1:].copy_(y))
wrote(x, x[0].neg_())
wrote(x, torch.einsum("...ij->...ji", x).mul_(2))
x.sigmoid().mul_(x).add_(x)
torch.zeros_like(x).add_(y) + x.new_zeros(x.shape).copy_(x)
wrote(z := torch.zeros_like(x), z.diagonal(0, 0, -1).copy_(fit(y, 1)))
torch.zeros(x.shape).add_(x)
wrote(z := torch.zeros(3, *x.shape), z.__setitem__(1, x))
torch.zeros(4, *x.shape[1:]).index_add_(0, torch.arange(x.shape[0]) % 4, x)
""",
    "r, x, y",
    globals(),
)
SHAPES = ((), (1,), (4,), (3, 4), (3, 3), (2, 3, 4), (2, 4, 6), (2, 2, 4, 4), (2, 1, 4), (1, 3, 1))


class Step(NamedTuple):
    """A function of two of the tensors that are at hand."""

    function: str
    seed: int
    x: int
    y: int


class Input(NamedTuple):
    """A value, and its tangents unless it is plain."""

    value: Tensor
    tangents: Tensor | None


def draw_functions(r: Draw) -> Case:
    """One to six functions of up to three tensors."""
    inputs = [draw_input(r, i) for i in range(r.randint(1, 3))]
    program: list[Step] = []
    length = r.randint(1, 6)
    while len(program) < length:
        x, y, seed = r.choice([-1, -1, r.randrange(9)]), r.randrange(9), r.getrandbits(32)
        step = Step(r.name(FUNCTIONS), seed, x, y)
        if works([*program, step], inputs, r.allows("0-d")):
            program.append(step)
    return Case(
        tuple(step.function for step in program),
        str([(*v.shape, "plain" if t is None else f"{len(t)} tangents") for v, t in inputs]),
        lambda: _by_autograd(program, inputs),
        lambda: _by_dual_tensors(program, inputs),
    )


def draw_input(r: Draw, i: int) -> Input:
    value = r.tensor(*r.choice(SHAPES if r.allows("0-d") else SHAPES[1:]))
    if i > 0 and r.chance(0.25):
        return Input(value, None)
    # Tensors may have different numbers of tangents, which may be constant along an axis.
    count = r.choice([0, 1, 2, 3] if r.allows("no tangents") else [1, 2, 3])
    return Input(value, torch.randn(count, *[r.choice([1, n, n, n]) for n in value.shape]))


def _run(program: list[Step], inputs: list[Tensor]) -> Values:
    """All tensors at the end: copies of the inputs, and what the functions returned."""
    at_hand = {f"input {i}": x.clone() for i, x in enumerate(inputs)}
    for step in program:
        x, y = (list(at_hand.values())[i % len(at_hand)] for i in (step.x, step.y))
        for out in _floating(FUNCTIONS[step.function](Draw(step.seed), x, y)):
            at_hand[f"{len(at_hand)}, of {step.function}"] = out
    return at_hand


def _floating(out: Any) -> list[Tensor]:
    if isinstance(out, Tensor):
        return [out] if out.is_floating_point() else []
    return [t for item in out for t in _floating(item)] if isinstance(out, tuple | list) else []


def works(program: list[Step], inputs: list[Input], zero_d: bool) -> bool:
    """Whether PyTorch itself runs a program, to few finite values."""
    try:
        found = _run(program, [i.value.clone().requires_grad_() for i in inputs]).values()
    except Exception:
        return False
    few = all(0 < v.numel() < 300 and (v.ndim or zero_d) for v in found)
    return few and all(bool((v.detach().abs() < 1e3).all()) for v in found)


def _weights(value: Tensor) -> Tensor:
    """One random number for every number: what differs, differs in their sum."""
    return torch.randn(value.shape, generator=torch.Generator().manual_seed(0))


def _sums(rows: Tensor) -> Tensor:
    """The sum of every row, and zeros for those that are missing of three."""
    return pad_rows(rows.reshape(len(rows), prod(rows.shape[1:])).sum(1), 3)


def _by_autograd(program: list[Step], inputs: list[Input]) -> Values:
    leaves = [v.clone().requires_grad_(t is not None) for v, t in inputs]
    duals = [(x, i.tangents) for x, i in zip(leaves, inputs, strict=True) if i.tangents is not None]
    values: Values = {}
    for name, value in _run(program, leaves).items():
        slopes = torch.zeros(3)
        if value.requires_grad:
            total = (value * _weights(value)).sum()
            found = torch.autograd.grad(
                total, [x for x, _ in duals], retain_graph=True, materialize_grads=True
            )
            for (x, t), gradient in zip(duals, found, strict=True):
                slopes = slopes + _sums(t.expand(-1, *x.shape) * gradient)
        values |= {f"value {name}": value.detach(), f"tangents {name}": slopes}
    return values


def _by_dual_tensors(program: list[Step], inputs: list[Input]) -> Values:
    leaves = [v.clone() if t is None else DualTensor(v.clone(), t) for v, t in inputs]
    values: Values = {}
    for name, value in _run(program, leaves).items():
        tangents = full_tangents(value)
        slopes = torch.zeros(3) if tangents is None else _sums(tangents * _weights(value))
        primal = value.primal if isinstance(value, DualTensor) else value
        values |= {f"value {name}": primal, f"tangents {name}": slopes}
    return values
