"""Every rule against its readable twin, the fallback through torch.func, over a table of calls."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from multitangent.dual import DualTensor, FallbackWarning, has_rule
from multitangent.dual._arguments import find_duals, map_duals
from multitangent.dual._backward import floating
from multitangent.dual._dual_tensor import expanded
from multitangent.dual._fallback import jvp_by_vmap
from multitangent.dual._rules.attention import attention_with_dropout

K = 3


def value(*shape: int, positive: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator)
    return x.abs() + 0.5 if positive else x


def dual(*shape: int, shared: tuple[int, ...] = (), positive: bool = False, seed: int = 1):
    """A dual tensor, whose tangents are constant along the axes `shared`."""
    sizes = [1 if axis in shared else size for axis, size in enumerate(shape)]
    return DualTensor(value(*shape, positive=positive, seed=seed), value(K, *sizes, seed=seed + 10))


X, SHARED, V = dual(4, 5), dual(4, 5, shared=(0,)), dual(5, seed=2)
IMAGE = dual(2, 3, 4, 4, shared=(0,))
HEADS = dual(2, 2, 5, 4, shared=(0,))
INDEX = torch.tensor([2, 0, 2])
MASK = value(4, 5, seed=9) > 0
CLASSES = torch.tensor([1, 0, 4, 2])
WEIGHT = value(5, positive=True)
TABLE = {
    "add": (torch.add, X, V),
    "add plain": (Tensor.add, SHARED, 2.0),
    "add alpha": (torch.add, V, X, {"alpha": 3}),
    "sub": (torch.sub, X, V),
    "sub alpha": (Tensor.sub, V, SHARED, {"alpha": 2}),
    "rsub": (Tensor.__rsub__, X, 3.0),
    "mul": (torch.mul, X, V),
    "mul shared": (torch.mul, SHARED, value(4, 5)),
    "mul 0-dim": (torch.mul, dual(), X),
    "div": (torch.div, X, dual(5, positive=True)),
    "div by dual": (torch.div, value(4, 5), dual(4, 5, positive=True)),
    "rdiv": (Tensor.__rdiv__, dual(3, positive=True), 2.0),
    "mul bool": (torch.mul, X, True),
    "neg": (torch.neg, SHARED),
    "pow": (torch.pow, X, 3),
    "pow 0": (torch.pow, X, 0),
    "pow half": (torch.pow, dual(4, positive=True), 0.5),
    "pow dual": (torch.pow, dual(4, positive=True), dual(4, seed=4)),
    "pow of number": (Tensor.__rpow__, X, 2.0),
    **{
        f"{f.__name__}": (f, dual(4, 5, positive=True, shared=(0,)))
        for f in (
            torch.exp, torch.expm1, torch.log, torch.log1p, torch.sqrt, torch.rsqrt,
            torch.reciprocal, torch.square, torch.abs, torch.sin, torch.cos,
        )
    },
    **{
        f"activation {f.__name__}": (f, SHARED)
        for f in (F.relu, F.gelu, F.silu, F.softplus, F.leaky_relu, torch.tanh, torch.sigmoid)
    },
    "gelu tanh": (F.gelu, X, {"approximate": "tanh"}),
    "softplus args": (F.softplus, X, 5.0, 2.0),
    "leaky relu slope": (F.leaky_relu, X, 0.3),
    "clamp": (torch.clamp, SHARED, -0.5, 0.5),
    "clamp min": (Tensor.clamp, X, {"min": 0.0}),
    "item array": (Tensor.__getitem__, SHARED, MASK.numpy()),
    "linear": (F.linear, X, value(2, 5), value(2)),
    "linear shared": (F.linear, SHARED, value(2, 5)),
    "linear constant inputs": (F.linear, dual(4, 5, shared=(1,)), value(2, 5)),
    "linear vector": (F.linear, V, value(2, 5)),
    "linear weight": (F.linear, value(4, 5), dual(2, 5), dual(2, seed=3)),
    "linear all": (F.linear, dual(2, 4, 5), dual(2, 5, seed=3), dual(2, seed=4)),
    "linear no bias": (F.linear, X, dual(2, 5), None),
    "linear bias only": (F.linear, value(4, 5), value(2, 5), dual(2)),
    "matmul": (torch.matmul, X, value(5, 2)),
    "matmul both": (torch.matmul, SHARED, dual(5, 2, seed=3)),
    "matmul right": (torch.matmul, value(3, 4), dual(4, 5, shared=(1,))),
    "matmul batches": (torch.matmul, dual(2, 3, 4), dual(4, 5, seed=3)),
    "matmul broadcast": (torch.matmul, dual(3, 4), dual(2, 4, 5, seed=3)),
    "matmul vector": (torch.matmul, X, V),
    "matmul row": (torch.matmul, V, dual(2, 5, 3, seed=3)),
    "dot": (torch.matmul, V, dual(5, seed=3)),
    "bmm": (torch.bmm, dual(2, 3, 4, shared=(0,)), dual(2, 4, 5, seed=3)),
    "mm": (Tensor.mm, X, dual(5, 2, seed=3)),
    "addmm": (torch.addmm, dual(2, seed=5), X, value(5, 2), {"beta": 0.5, "alpha": 2}),
    "addmm bias": (torch.addmm, dual(2, seed=5), value(4, 5), value(5, 2)),
    "sum": (torch.sum, SHARED),
    "sum dim": (Tensor.sum, SHARED, 0),
    "sum dims": (torch.sum, IMAGE, (0, -1), {"keepdim": True}),
    "mean": (torch.mean, SHARED),
    "mean dim": (Tensor.mean, SHARED, (0,)),
    "mean keep": (torch.mean, IMAGE, (2, 3), True),
    "softmax": (torch.softmax, SHARED, -1),
    "softmax over batch": (F.softmax, SHARED, {"dim": 0}),
    "log softmax": (F.log_softmax, dual(4, 5, shared=(1,)), 1),
    "cross entropy": (F.cross_entropy, X, CLASSES, {"reduction": "none"}),
    "cross entropy mean": (F.cross_entropy, SHARED, CLASSES),
    "cross entropy sum": (F.cross_entropy, X, CLASSES, {"reduction": "sum"}),
    "cross entropy one": (F.cross_entropy, V, torch.tensor(3)),
    "cross entropy weight": (F.cross_entropy, X, CLASSES, WEIGHT),
    "cross entropy smooth": (
        F.cross_entropy, X, CLASSES, WEIGHT, {"label_smoothing": 0.3, "reduction": "none"},
    ),
    "cross entropy smooth mean": (
        F.cross_entropy, X, CLASSES, WEIGHT, {"label_smoothing": 0.3, "ignore_index": 0},
    ),
    "cross entropy ignore": (F.cross_entropy, X, CLASSES, {"ignore_index": 4}),
    "cross entropy ignore no class": (
        F.cross_entropy, X, torch.tensor([1, 255, 4, 2]), {"ignore_index": 255},
    ),
    "cross entropy probabilities": (F.cross_entropy, X, value(4, 5, positive=True), WEIGHT),
    "cross entropy pixels": (
        F.cross_entropy, IMAGE, torch.randint(3, (2, 4, 4)), {"reduction": "none"},
    ),
    "mse": (F.mse_loss, X, value(4, 5), {"reduction": "none"}),
    "mse mean": (F.mse_loss, SHARED, value(4, 5)),
    "mse both": (F.mse_loss, value(4, 5), X, {"reduction": "sum"}),
    "mse weight": (F.mse_loss, X, value(4, 5), {"weight": value(4, 5, positive=True)}),
    "reshape": (torch.reshape, SHARED, (2, 10)),
    "view": (Tensor.view, IMAGE, 2, -1),
    "view whole": (Tensor.view, SHARED, -1),
    "flatten": (torch.flatten, IMAGE, 1),
    "flatten inner shared": (Tensor.flatten, dual(2, 3, 4, shared=(0, 1)), 1),
    "unflatten": (Tensor.unflatten, dual(2, 6, shared=(0,)), 1, (2, 3)),
    "unsqueeze": (torch.unsqueeze, SHARED, -1),
    "squeeze": (torch.squeeze, dual(4, 1, 5, 1, shared=(0,))),
    "squeeze dim": (Tensor.squeeze, dual(4, 1, 5, 1), 1),
    "squeeze wide": (Tensor.squeeze, SHARED, 0),
    "transpose": (torch.transpose, SHARED, 0, -1),
    "t": (Tensor.t, SHARED),
    "permute": (Tensor.permute, IMAGE, 1, 0, -1, 2),
    "permute tuple": (torch.permute, IMAGE, (3, 2, 1, 0)),
    "movedim": (torch.movedim, IMAGE, (0, 1), (2, 0)),
    "narrow": (torch.narrow, SHARED, 0, 1, 2),
    "select": (Tensor.select, SHARED, 0, 1),
    "expand": (Tensor.expand, dual(4, 1, shared=(0,)), 2, 4, 5),
    "expand as": (Tensor.expand_as, V, value(4, 5)),
    "unbind": (torch.unbind, SHARED, 0),
    "chunk": (torch.chunk, SHARED, 2, -1),
    "split": (torch.split, SHARED, [1, 3], 0),
    "clone": (torch.clone, SHARED),
    "to": (Tensor.to, SHARED, torch.float32),
    "cat": (torch.cat, [SHARED, value(2, 5), X], 0),
    "stack": (torch.stack, [SHARED, X], -1),
    "item": (Tensor.__getitem__, SHARED, 1),
    "item slice": (Tensor.__getitem__, IMAGE, (slice(None), 1, slice(0, 4, 2))),
    "item ellipsis": (Tensor.__getitem__, IMAGE, (..., 0)),
    "item none": (Tensor.__getitem__, SHARED, (slice(None), None, slice(1, 3))),
    "item index": (Tensor.__getitem__, SHARED, INDEX),
    "item list": (Tensor.__getitem__, SHARED, (slice(None), [0, 3])),
    "item mask": (Tensor.__getitem__, X, MASK),
    "item pairs": (Tensor.__getitem__, IMAGE, (INDEX % 2, INDEX)),
    "item apart": (Tensor.__getitem__, IMAGE, (INDEX % 2, slice(None), INDEX)),
    "embedding": (F.embedding, torch.tensor([[0, 2], [3, 3]]), dual(4, 5, shared=(0,))),
    "index select": (torch.index_select, SHARED, 0, INDEX),
    "gather": (Tensor.gather, SHARED, 1, torch.tensor([[0, 2], [3, 3]])),
    "flip": (torch.flip, SHARED, (-1,)),
    "roll": (torch.roll, SHARED, 3),
    "roll dim": (Tensor.roll, IMAGE, (1, 2), (0, -1)),
    "repeat": (Tensor.repeat, SHARED, 2, 1, 3),
    "conv1d": (F.conv1d, dual(2, 3, 6, shared=(0,)), value(4, 3, 3), value(4), 2, 1),
    "conv2d": (F.conv2d, dual(2, 3, 5, 5), value(4, 3, 3, 3), {"padding": "same"}),
    "conv2d shared": (F.conv2d, IMAGE, value(4, 3, 3, 3), value(4), {"stride": 2, "padding": 1}),
    "conv2d constant": (F.conv2d, dual(2, 3, 4, 4, shared=(0, 2, 3)), value(4, 3, 2, 2)),
    "conv2d one": (F.conv2d, dual(3, 5, 5), dual(4, 3, 3, 3, seed=3), dual(4, seed=4)),
    "conv2d groups": (
        F.conv2d, dual(2, 4, 5, 5), dual(6, 2, 3, 3, seed=3), dual(6, seed=4), 1, 1, 1, 2,
    ),
    "conv2d depthwise": (F.conv2d, value(2, 3, 5, 5), dual(6, 1, 3, 3), {"groups": 3}),
    "conv2d dilated": (F.conv2d, value(2, 2, 7, 7), dual(2, 2, 3, 3), None, 1, 0, 2),
    "conv3d": (F.conv3d, dual(2, 2, 3, 3, 3), dual(2, 2, 2, 2, 2, seed=3)),
    "conv transpose1d": (F.conv_transpose1d, dual(2, 3, 4), dual(3, 2, 3, seed=3)),
    "conv transpose2d": (
        F.conv_transpose2d, IMAGE, dual(3, 2, 3, 3, seed=3), dual(2, seed=4), 2, 1, 1,
    ),
    "conv transpose2d groups": (
        F.conv_transpose2d, dual(4, 3, 3), dual(4, 3, 2, 2, seed=3), {"groups": 2, "dilation": 2},
    ),
    "conv transpose3d": (F.conv_transpose3d, dual(2, 2, 2, 2, 2), dual(2, 1, 2, 2, 2, seed=3)),
    "max pool1d": (F.max_pool1d, dual(2, 3, 6, shared=(0,)), 2),
    "max pool2d": (F.max_pool2d, IMAGE, 3, 2, 1),
    "max pool2d flag": (F.max_pool2d, dual(3, 4, 4), 2, None, 0, 1, False, False),
    "max pool3d": (F.max_pool3d, dual(1, 2, 4, 4, 4), {"kernel_size": 2, "ceil_mode": True}),
    "adaptive max pool1d": (F.adaptive_max_pool1d, dual(2, 3, 6), 4),
    "adaptive max pool2d": (F.adaptive_max_pool2d, IMAGE, (2, 3)),
    "adaptive max pool3d": (F.adaptive_max_pool3d, dual(1, 2, 4, 4, 4), 2),
    "avg pool1d": (F.avg_pool1d, dual(2, 3, 6, shared=(0, 2)), 2),
    "avg pool2d": (F.avg_pool2d, IMAGE, 3, 2, 1, {"count_include_pad": False}),
    "avg pool3d": (F.avg_pool3d, dual(2, 4, 4, 4), 2),
    "adaptive avg pool1d": (F.adaptive_avg_pool1d, dual(2, 3, 6), 4),
    "adaptive avg pool2d": (F.adaptive_avg_pool2d, IMAGE, 1),
    "adaptive avg pool3d": (F.adaptive_avg_pool3d, dual(1, 2, 4, 4, 4), 2),
    "pad": (F.pad, SHARED, (1, 2)),
    "pad batch": (F.pad, SHARED, (0, 0, 1, 1), "constant", 3.0),
    "pad reflect": (F.pad, IMAGE, (1, 2, 0, 1), {"mode": "reflect"}),
    "pad circular": (F.pad, dual(2, 3, 4), (1, 1), "circular"),
    "interpolate": (F.interpolate, IMAGE, {"scale_factor": 2}),
    "interpolate bilinear": (F.interpolate, dual(2, 3, 4, 4), (3, 7), None, "bilinear"),
    "interpolate linear": (F.interpolate, dual(2, 3, 4), {"size": 6, "mode": "linear"}),
    "pixel shuffle": (torch.pixel_shuffle, dual(2, 4, 3, 3, shared=(0,)), 2),
    "pixel unshuffle": (torch.pixel_unshuffle, IMAGE, 2),
    "batch norm": (F.batch_norm, IMAGE, value(3), WEIGHT[:3], value(3), value(3)),
    "batch norm of the batch": (
        F.batch_norm, dual(4, 3, 5, shared=(0,)), None, None, dual(3, seed=4), None, True,
    ),
    "batch norm plain": (F.batch_norm, SHARED, value(5), WEIGHT),
    "batch norm all": (
        F.batch_norm, dual(2, 3, 4), value(3), WEIGHT[:3], dual(3, seed=4), dual(3, seed=5),
    ),
    "instance norm": (F.instance_norm, IMAGE),
    "instance norm running": (
        F.instance_norm, IMAGE, value(3), WEIGHT[:3], None, None, False, 0.1, 1e-3,
    ),
    "layer norm": (F.layer_norm, SHARED, (5,)),
    "layer norm all": (F.layer_norm, IMAGE, (4, 4), dual(4, 4, seed=3), dual(4, 4, seed=4), 1e-3),
    "layer norm constant": (F.layer_norm, dual(4, 5, shared=(1,)), (5,), WEIGHT),
    "layer norm weight": (F.layer_norm, value(4, 5), (5,), dual(5)),
    "group norm": (F.group_norm, dual(2, 4, 3, 3, shared=(0,)), 2, value(4), value(4)),
    "group norm all": (F.group_norm, dual(2, 4, 3), 2, dual(4, seed=3), dual(4, seed=4)),
    "rms norm": (F.rms_norm, SHARED, (5,)),
    "rms norm all": (F.rms_norm, IMAGE, (4, 4), dual(4, 4, seed=3), 1e-3),
    **{
        f"attention {name}": (F.scaled_dot_product_attention, *args)
        for name, args in {
            "query": (dual(2, 3, 4), value(2, 5, 4), value(2, 5, 6)),
            "all": (dual(2, 3, 4, shared=(0,)), dual(2, 5, 4, seed=3), dual(2, 5, 6, seed=4)),
            "key": (value(2, 2, 3, 4), dual(2, 2, 5, 4), value(2, 2, 5, 4)),
            "value": (value(3, 4), value(5, 4), dual(5, 4, shared=(1,))),
            "causal": (HEADS, HEADS, HEADS, {"is_causal": True, "scale": 0.3}),
            "mask": (HEADS, HEADS, HEADS, value(5, 5) > -0.5),
            "bias": (HEADS, HEADS, HEADS, dual(5, 5, seed=7)),
            "bias alone": (value(2, 3, 4), value(2, 5, 4), value(2, 5, 6), dual(1, 5)),
            "grouped": (
                dual(2, 4, 3, 4), dual(2, 2, 5, 4), dual(2, 2, 5, 4), {"enable_gqa": True},
            ),
        }.items()
    },
    **{
        f"local {f.__name__}": (f, SHARED)
        for f in (
            F.hardtanh, F.relu6, F.hardswish, F.hardsigmoid, F.hardshrink, F.softshrink, F.celu,
            F.elu, F.selu, F.mish, F.softsign, F.tanhshrink, F.logsigmoid, torch.tan, torch.erf,
            torch.sinc, torch.nan_to_num, torch.amax, torch.amin, torch.std, torch.var,
            torch.prod, torch.max, torch.median, torch.norm,
            torch.linalg.vector_norm, F.normalize, torch.std_mean, torch.var_mean,
        )
    },
    **{
        f"local {f.__name__} of two": (f, dual(4, 5, seed=6), SHARED)
        for f in (
            torch.maximum, torch.fmax, torch.hypot, torch.atan2, torch.logaddexp, torch.max,
            torch.clamp, F.l1_loss, F.smooth_l1_loss, F.cosine_similarity,
            F.pairwise_distance,
        )
    },
    "logsumexp": (torch.logsumexp, SHARED, 1),
    "cummax": (torch.cummax, SHARED, {"dim": 0}),
    "max dim": (torch.max, SHARED, 1),
    "min dim": (Tensor.min, IMAGE, {"dim": 0, "keepdim": True}),
    "topk": (torch.topk, X, 2, 0),
    "amax dims": (Tensor.amax, IMAGE, (0, -1)),
    "norm dim": (Tensor.norm, SHARED, 2, 0, {"keepdim": True}),
    "renorm": (torch.renorm, SHARED, 2, 0, 0.5),
    "threshold": (F.threshold, SHARED, 0.5, 1.0),
    "prelu": (F.prelu, IMAGE, dual(3, shared=(0,))),
    "prelu weight": (F.prelu, value(4, 5), dual(1)),
    "lp pool": (F.lp_pool2d, dual(2, 3, 4, 4, positive=True), 2.0, 2),
    "kl": (F.kl_div, SHARED, dual(4, 5, positive=True), {"reduction": "batchmean"}),
    "nll": (F.nll_loss, SHARED, CLASSES, {"reduction": "none"}),
    "nll mean": (F.nll_loss, X, CLASSES, WEIGHT),
    "bce logits": (F.binary_cross_entropy_with_logits, SHARED, MASK.double()),
    "scatter reduce": (torch.scatter_reduce, X, 0, INDEX[None], dual(1, 3), "mean"),
    "where": (torch.where, MASK, SHARED, 0.0),
    "where both": (torch.where, MASK, V, X),
    "where method": (Tensor.where, X, MASK, value(4, 5)),
    "masked fill": (Tensor.masked_fill, SHARED, MASK, -9.0),
}  # fmt: skip


def call(name):
    function, *args = TABLE[name]
    kwargs = args.pop() if isinstance(args[-1], dict) else {}
    return function, tuple(args), kwargs


@pytest.mark.parametrize("name", TABLE)
def test_rule_equals_fallback(name):
    function, args, kwargs = call(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)  # there is a rule
        out = function(*args, **kwargs)
    outputs = floating(out)
    expected = jvp_by_vmap(function, args, kwargs, K)
    assert len(outputs) == len(expected)
    for item, tangents in zip(outputs, expected, strict=True):
        assert isinstance(item, DualTensor)
        assert item.tangents.dtype == item.primal.dtype
        torch.testing.assert_close(expanded(item), tangents.to(item.dtype), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", TABLE)
def test_rules_can_be_differentiated_once_more(name):
    """Forward over forward: the derivative of a rule's tangents, against central differences."""
    function, args, kwargs = call(name)
    inputs = list(find_duals((args, kwargs)))
    points = tuple(d.primal.contiguous() for d in inputs)
    directions = tuple(expanded(d)[0].contiguous() for d in inputs)

    def tangents(*moved):
        remaining = iter([DualTensor(p, u[None]) for p, u in zip(moved, directions, strict=True)])
        new_args, new_kwargs = map_duals(lambda _: next(remaining), (args, kwargs))
        out = function(*new_args, **new_kwargs)
        return tuple(expanded(o)[0] for o in floating(out))

    def moved(h):
        return tangents(*(p + h * u for p, u in zip(points, directions, strict=True)))

    with sdpa_kernel(SDPBackend.MATH):
        found = torch.func.jvp(tangents, points, directions)[1]
    h = 1e-5
    for item, ahead, behind in zip(found, moved(h), moved(-h), strict=True):
        difference = ((ahead - behind) / (2 * h)).to(item.dtype)
        torch.testing.assert_close(item, difference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TABLE)
def test_primal_is_the_functions_own_value(name):
    from multitangent.dual._arguments import primals

    function, args, kwargs = call(name)
    out, expected = function(*args, **kwargs), function(*primals(args), **primals(kwargs))
    for item, plain in zip(floating(out), floating(expected), strict=True):
        assert torch.equal(item.primal, plain)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: F.linear(x, value(2, 5)), (K, 1, 2)),
        (lambda x: x.unflatten(1, (5, 1)).flatten(1) + 1, (K, 1, 5)),
        (
            lambda x: (2 * x - value(4, 5)).unsqueeze(1).expand(4, 3, 5).transpose(1, 2),
            (K, 1, 5, 1),
        ),
        (lambda x: x[:, 1:3].clone(), (K, 1, 2)),
        (lambda x: x[..., 1:3] - x[..., None, 2], (K, 1, 2)),
        (lambda x: x[None, ..., 0], (K, 1, 1)),
        (lambda x: x[1:, 1], (K, 3)),
        (lambda x: x[:, [0, 2]], (K, 1, 2)),
        (lambda x: x @ value(5, 2), (K, 1, 2)),
        (lambda x: torch.tanh(x), (K, 4, 5)),
    ],
)
def test_tangents_of_the_whole_batch_grow_an_axis_only_where_samples_differ(function, shape):
    assert function(SHARED).tangents.shape == shape


@pytest.mark.parametrize("index", [1, -1])
def test_the_padding_row_of_an_embedding_is_never_trained(index):
    weight = dual(4, 3)
    found = F.embedding(torch.tensor([0, index % 4]), weight, padding_idx=index)
    assert torch.equal(found.tangents[:, 0], weight.tangents[:, 0])
    assert (found.tangents[:, 1] == 0).all()


def test_a_row_of_attention_without_keys():
    mask = torch.tensor([[True, False], [False, False]])
    q, k, v = dual(2, 3), dual(2, 3, seed=4), dual(2, 3, seed=5)
    found = F.scaled_dot_product_attention(q, k, v, mask)
    assert (found.primal[1] == 0).all()
    assert (found.tangents[:, 1] == 0).all()
    with_dropout = attention_with_dropout(q.primal, k.primal, v.primal, mask, dropout_p=1e-12)
    torch.testing.assert_close(with_dropout, found.primal)


def test_operators_reach_the_rules():
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        y = (2 - X) * X / 3 + X**2 - X @ value(5, 5) + 1 / (2**X) - abs(-X)
    assert isinstance(y, DualTensor)
    for function in (Tensor.add, Tensor.mul, Tensor.matmul, Tensor.__rsub__, Tensor.detach):
        assert has_rule(function)
