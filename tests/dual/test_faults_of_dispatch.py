"""Ordinary code around dual tensors that once failed: its tangents are those of backpropagation."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_rules import TABLE
from torch import Tensor, nn

from multitangent.dual import DualTensor, ordinary_afterwards
from multitangent.dual._arguments import find_duals, map_duals
from multitangent.dual._dual_tensor import expanded
from multitangent.dual._fallback import jvp_by_vmap

K = 3
DTYPE = torch.float64


def value(*shape, seed=0):
    return torch.randn(shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed))


def assert_as_backward(function, *shape, reference=None, seed=0):
    """The tangents of a function of one tensor are the Jacobian's of backpropagation."""
    x, t = value(*shape, seed=seed), value(K, *shape, seed=seed + 10)
    jacobian = torch.autograd.functional.jacobian(reference or function, x.clone())
    expected = jacobian.flatten(jacobian.ndim - x.ndim) if x.ndim else jacobian.unsqueeze(-1)
    expected = (expected @ t.reshape(K, -1).T).movedim(-1, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = function(DualTensor(x.clone(), t))
    torch.testing.assert_close(getattr(found, "primal", found), function(x.clone()))
    if isinstance(found, DualTensor) and len(found.tangents):
        torch.testing.assert_close(expanded(found), expected)
    else:
        assert not expected.any()


def zeros(*shape):
    return torch.zeros(shape, dtype=DTYPE)


def written(write, *shape):
    """A function that writes what depends on its argument into zeros."""

    def function(x):
        target = zeros(*(shape or x.shape))
        write(target, x * x)
        return target * 2 + target.sum()

    return function


INDEX = torch.tensor([2, 0, 1])
PLACES = torch.tensor([[0, 2, 1, 0], [1, 0, 2, 2], [2, 1, 0, 1]])
MASK = value(3, 4, seed=5) > 0


def set_rows(z, h):
    z[INDEX] = h


def set_column(z, h):
    z[:, 1] = h[:, 0]


def add_to_column(z, h):
    z[:, 1] += h[:, 0]


def set_masked(z, h):
    z[MASK] = h[MASK]


def set_through_a_view_of_a_view(z, h):
    other = z.view(4, 3)
    z.t()[1:3].mul_(0).add_(h.t()[:2])
    z.add_(other.reshape(3, 4))


def set_transposed(z, h):
    z.t().copy_(h.t())


def set_numbers_too(z, h):
    z[0] = 1.0
    z[1] = h[0]
    z[1, 2] = 5.0


WRITES = {
    "rows": set_rows,
    "column": set_column,
    "column +=": add_to_column,
    "mask": set_masked,
    "view of a view": set_through_a_view_of_a_view,
    "transposed": set_transposed,
    "numbers": set_numbers_too,
    "+=": lambda z, h: z.__iadd__(h),
    "-=": lambda z, h: z.__isub__(h),
    "*=": lambda z, h: z.add_(1).__imul__(h),
    "/=": lambda z, h: z.add_(1).__itruediv__(h),
    "**=": lambda z, h: z.add_(2).__ipow__(h),
    "%=": lambda z, h: z.add_(2).__imod__(h + 1),
    "copy_": lambda z, h: z.copy_(h),
    "copy_ by name": lambda z, h: z.copy_(other=h),
    "copy_ of a row": lambda z, h: z.copy_(h[0]),
    "add_": lambda z, h: z.add_(h, alpha=3),
    "addcmul_": lambda z, h: z.addcmul_(h, h, value=0.5),
    "addmm_": lambda z, h: z.addmm_(h, value(4, 4), beta=0.5),
    "baddbmm_": lambda z, h: z.unsqueeze(0).baddbmm_(h[None], value(1, 4, 4)),
    "lerp_": lambda z, h: z.lerp_(h, 0.3),
    "index_add_": lambda z, h: z.index_add_(0, INDEX[[0, 0, 1]], h),
    "index_copy_": lambda z, h: z.index_copy_(0, INDEX, h),
    "index_fill_": lambda z, h: z.index_fill_(0, INDEX[:2], h[0, 0]),
    "index_put_": lambda z, h: z.index_put_((INDEX, INDEX), h[:, 0]),
    "index_put_ sum": lambda z, h: z.index_put_((INDEX * 0,), h, accumulate=True),
    "scatter_": lambda z, h: z.scatter_(0, INDEX[:, None].expand(3, 4), h),
    "scatter_add_": lambda z, h: z.scatter_add_(0, PLACES, h),
    "scatter_reduce_": lambda z, h: z.scatter_reduce_(0, PLACES, h, "sum"),
    "masked_fill_": lambda z, h: z.masked_fill_(MASK, h[0, 0]),
    "masked_scatter_": lambda z, h: z.masked_scatter_(MASK, h),
    "fill_": lambda z, h: z.fill_(h[0, 0]),
    "fill_diagonal_": lambda z, h: z.add_(h).fill_diagonal_(2.0),
    "diagonal": lambda z, h: z.diagonal().copy_(h[:, 0]),
    "zero_ after": lambda z, h: z.add_(h).zero_().add_(h[0]),
    "torch.add out": lambda z, h: torch.Tensor.add_(z, h),
    "clamp_": lambda z, h: z.add_(h).clamp_(0, 1),
    "relu_": lambda z, h: torch.relu_(z.add_(h).sub_(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRITES)
def test_an_ordinary_tensor_carries_what_is_written_into_it(name):
    assert_as_backward(written(WRITES[name], 3, 4), 3, 4)


TARGETS = {
    "zeros_like": lambda x: torch.zeros_like(x.detach()),
    "new_zeros": lambda x: x.detach().new_zeros(3, 4),
    "empty": lambda x: torch.empty(3, 4, dtype=DTYPE).zero_(),
    "full": lambda x: torch.full((3, 4), 2.0, dtype=DTYPE),
    "computed": lambda x: torch.ones(3, 4, dtype=DTYPE) * 2,
    "clone": lambda x: value(3, 4).clone(),
    "a view": lambda x: zeros(5, 4)[1:4],
    "a view apart": lambda x: zeros(4, 3).t(),
    "data": lambda x: x.data.clone(),
    "from numpy": lambda x: torch.from_numpy(np.ones((3, 4))),
    "expanded": lambda x: torch.ones(4, dtype=DTYPE).repeat(3, 1),
    "of a dual": lambda x: torch.zeros_like(x),
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("write", [set_rows, add_to_column, set_transposed])
def test_whatever_made_the_target(name, write):
    def function(x):
        target = TARGETS[name](x)
        write(target, x * x)
        return target * x

    assert_as_backward(function, 3, 4)


def set_rows_as_views(z, h):
    for row, source in zip(z, h, strict=True):
        row.copy_(source)


def set_both_halves(z, h):
    left, right = z.chunk(2, 1)
    left.copy_(h[:, :2])
    right.add_(h[:, 2:])


def set_slices(z, h):
    left, right = z[:, :2], z[:, 2:]
    left.copy_(h[:, :2])
    right.add_(h[:, 2:])


@pytest.mark.parametrize("write", [set_rows_as_views, set_both_halves, set_slices])
def test_views_of_one_tensor_are_written_into_in_turn(write):
    """More than backpropagation allows."""
    assert_as_backward(written(write, 3, 4), 3, 4, reference=written(Tensor.copy_, 3, 4))


def test_what_was_written_into_is_ordinary_again_behind_the_sweep():
    buffer, base = zeros(3), zeros(2, 3)
    row, frozen = base[1], nn.Parameter(zeros(3), requires_grad=False)
    with ordinary_afterwards():
        for target in (buffer, row, frozen):
            target.add_(DualTensor(value(3), value(K, 3)))
            assert isinstance(target, DualTensor)
        assert isinstance(base, DualTensor)
    for target in (buffer, row, frozen, base[1]):
        assert not isinstance(target, DualTensor)
        torch.testing.assert_close(target.detach(), value(3))
    assert type(frozen) is nn.Parameter and type(row) is Tensor
    assert set(vars(buffer)) == set()


def test_integers_take_the_value_alone():
    counts = torch.zeros(3).long()
    counts.copy_(DualTensor(torch.tensor([1.0, 2.0, 3.0]), torch.ones(1, 3)))
    counts[0] = DualTensor(torch.tensor(5.0), torch.ones(1))
    assert type(counts) is Tensor and counts.tolist() == [5, 2, 3]


def write_view(take):
    """A function that writes into a view, taken by `take`, of zeros and of its argument's copy."""

    def function(x):
        target = torch.zeros_like(x)
        view = take(target)
        view.copy_(take(x * x))
        other = x * 1
        take(other).mul_(2)
        return target + other.sin() + view.sum()

    return function


VIEWS = {
    "diagonal": lambda x: x.diagonal(),
    "torch.diagonal": lambda x: torch.diagonal(x, 1),
    "einsum": lambda x: torch.einsum("ij->ji", x),
    "einsum diagonal": lambda x: torch.einsum("ii->i", x),
    "unfold": lambda x: x.unfold(0, 2, 2),
    "hsplit": lambda x: torch.hsplit(x, 2)[1],
    "tensor_split": lambda x: x.tensor_split(2)[0],
    "split": lambda x: x.split(2)[1],
    "broadcast": lambda x: torch.broadcast_tensors(torch.ones(1), x)[1],
    "atleast": lambda x: torch.atleast_3d(x),
    "T": lambda x: x.T,
    "adjoint": lambda x: x.adjoint(),
    "real": lambda x: torch.real(x),
    "permute": lambda x: torch.permute(x, (1, 0)),
    "narrow": lambda x: x.narrow(0, 1, 2),
    "view": lambda x: x.view(2, 8),
    "index": lambda x: x[1:, ::2],
    "swapaxes": lambda x: x.swapaxes(0, 1),
    "numpy_T": lambda x: x.moveaxis(0, 1),
    "select_scatter": lambda x: x.select(1, 2),
    "expand": lambda x: x.unsqueeze(0).expand(1, 4, 4),
    "squeeze": lambda x: x.unsqueeze(1).squeeze(),
    "view_as": lambda x: x.view_as(torch.ones(16)),
    "detour": lambda x: x.diagonal()[1:3],
    "of einsum": lambda x: torch.einsum("ij->ji", x)[1],
    "positive": lambda x: torch.positive(x),
    "ravel": lambda x: x.ravel(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_write_through_a_view_reaches_its_source(name):
    def out_of_place(x):
        places = VIEWS[name](torch.arange(16.0, dtype=DTYPE).view(4, 4)).long()
        target = torch.zeros(16, dtype=DTYPE).index_put((places,), VIEWS[name](x * x))
        other = (x * 1).view(16)
        other = other.index_put((places,), 2 * other[places]).view(4, 4)
        return target.view(4, 4) + other.sin() + target[places].sum()

    assert_as_backward(write_view(VIEWS[name]), 4, 4, reference=out_of_place)


def test_any_argument_may_be_the_source_of_a_view():
    def function(x):
        y = x * 1
        torch.einsum("ij->ji", [y]).mul_(2)
        return y.sin()

    assert_as_backward(function, 3, 4)


def test_a_view_is_read_after_a_write_to_its_source():
    def function(x):
        y = x * 1
        d = y.diagonal()
        y.mul_(2)
        return d * d

    assert_as_backward(function, 3, 3)


def set_by(index, *value_shape):
    def function(x):
        y = x * 1
        y[index] = (x * x).flatten()[: int(np.prod(value_shape))].reshape(value_shape)
        return y + y[index].sum()

    return function


INDICES = {
    "array apart": ((np.array([0, 1]), slice(None), np.array([2, 3])), (2, 3)),
    "tuples apart": (((0, 1), slice(None), (2, 3)), (2, 3)),
    "lists apart": (([0, 1], slice(None), [2, 3]), (2, 3)),
    "tensors apart": ((torch.tensor([0, 1]), slice(None), torch.tensor([2, 3])), (2, 3)),
    "array": (np.array([1, 0]), (2, 3, 4)),
    "tuple": (((1, 0), (2, 0)), (2, 4)),
    "array mask": (np.array([True, False]), (1, 3, 4)),
    "mask apart": ((torch.tensor([True, False]), slice(None), torch.tensor([2, 3])), (2, 3)),
    "number of numpy": (np.int64(1), (3, 4)),
    "numbers of numpy": ((np.int64(1), slice(None), np.int64(2)), (3,)),
    "array and none": ((np.array([0, 1]), None, 0), (2, 1, 4)),
    "tensor and number": ((torch.tensor([0, 1]), slice(None), 1), (2, 3)),
    "uint8": (torch.tensor([1, 0], dtype=torch.uint8), (1, 3, 4)),
    "range": (range(2), (2, 3, 4)),
    "true": (True, (1, 2, 3, 4)),
    "ellipsis": ((..., [0, 2]), (2, 3, 2)),
    "0-d": ((torch.tensor(1), slice(None), torch.tensor(2)), (3,)),
    "leading ones": ((0, 1), (1, 1, 4)),
}


@pytest.mark.filterwarnings("ignore:.*uint8")
@pytest.mark.parametrize("name", INDICES)
def test_every_kind_of_index(name):
    index, shape = INDICES[name]
    assert_as_backward(set_by(index, *shape), 2, 3, 4)


EXITS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "in a list": lambda x: copy.deepcopy([x]),
    "pickle": pickle.dumps,
    "save": lambda x: torch.save({"x": x}, io.BytesIO()),
    "dlpack": lambda x: x.__dlpack__(),
    "from_dlpack": torch.from_dlpack,
    "numpy": lambda x: x.numpy(),
    "asarray": np.asarray,
}


@pytest.mark.parametrize("name", EXITS)
def test_a_tensor_that_carries_tangents_stays_one_of_torch(name):
    x = DualTensor(value(3), value(K, 3))
    with pytest.raises(RuntimeError, match=r"Try `\.detach\(\)` before it"):
        EXITS[name](x)
    EXITS[name](x.detach())


def test_nothing_is_written_by_out():
    x = DualTensor(value(3), value(K, 3))
    for function in (torch.eq, torch.add, torch.floor_divide, torch.logaddexp):
        with pytest.raises(NotImplementedError, match="Found `out=`"):
            function(x, x, out=x)
    with pytest.raises(NotImplementedError, match="Found `out=`"):
        torch.add(x.primal, x.primal, out=x)
    mask = torch.zeros(3, dtype=torch.bool)
    assert torch.eq(x, x, out=mask) is mask and mask.all()


OF_PLAIN = {
    "expand_as": lambda x: value(4).expand_as(x),
    "view_as": lambda x: value(12).view_as(x),
    "reshape_as": lambda x: value(12).reshape_as(x),
    "type_as": lambda x: value(3, 4).float().type_as(x),
    "to": lambda x: value(3, 4).float().to(x),
    "new_tensor": lambda x: value(3, 4).new_tensor(x),
    "tensor": lambda x: torch.tensor(x),
    "tensor of numbers": lambda x: torch.tensor([x[0, 0], x[0, 1]]),
    "as_tensor": lambda x: torch.as_tensor(x),
    "asarray": lambda x: torch.asarray(x),
    "linspace": lambda x: torch.linspace(0, x.detach()[0, 0], 3),
    "full of an item": lambda x: torch.full((3,), x[0, 0].item()),
    "full_like": lambda x: torch.full_like(x, 2.0),
    "zeros_like": lambda x: torch.zeros_like(x),
    "is_same_size": lambda x: torch.zeros(3, 4) if value(3, 4).is_same_size(x) else None,
    "sum_to_size": lambda x: x.sum_to_size(1, 4),
    "broadcast_to": lambda x: torch.broadcast_to(x, (2, 3, 4)),
    "expand_as of dual": lambda x: x[0].expand_as(x),
    "where": lambda x: torch.where(value(3, 4) > 0, value(3, 4), x),
    "masked_scatter": lambda x: value(3, 4).masked_scatter(MASK, x),
    "isin": lambda x: value(3, 4) * torch.isin(value(3, 4), x),
    "clamp": lambda x: value(3, 4).clamp(x - 1, x),
    "clamp tensor": lambda x: x.clamp(value(3, 4) - 1, value(3, 4)),
    "maximum": lambda x: torch.maximum(value(3, 4), x),
    "ones": lambda x: torch.ones(x.shape) * x,
}


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
@pytest.mark.filterwarnings("ignore:torch.asarray. unspecified requires_grad")
@pytest.mark.parametrize("name", OF_PLAIN)
def test_an_ordinary_tensor_beside_one_that_carries_tangents(name):
    assert_as_backward(lambda x: OF_PLAIN[name](x) * 1.0, 3, 4)


NUMBERS = {
    "type": lambda x: x * len(x.type()),
    "type to": lambda x: x.type(torch.float64),
    "type name": lambda x: x.type("torch.DoubleTensor"),
    "to int": lambda x: (5 * x).to(torch.int64) + 1 + x,
    "type int": lambda x: (5 * x).type(torch.int64) + x,
    "type_as int": lambda x: (5 * x).type_as(torch.ones(1).long()) + x,
    "int": lambda x: (5 * x).int() + (5 * x).long() + (5 * x).short() + x,
    "char": lambda x: (5 * x).char() * x,
    "bool": lambda x: x.bool() * x + x.to(torch.bool),
    "2 //": lambda x: (2 // x).detach() + x,
    "// 2": lambda x: (x // 0.3).detach() * x,
    "% 2": lambda x: x % 0.3,
    "% dual": lambda x: x % (x * x),
    "2 **": lambda x: 2**x,
    "2 -": lambda x: 2 - x,
    "2 /": lambda x: 2 / x,
    "2 * + 3": lambda x: 3 + 2 * x,
    "matrix @": lambda x: value(4, 3) @ x,
    "fmod": lambda x: torch.fmod(x, 0.3),
    "divmod": lambda x: x.div(0.3, rounding_mode="floor") + x,
    "compare": lambda x: (x < 2) * x + (x <= 0.1),
    "tensor //": lambda x: (value(3, 4) // x).detach() + x,
    "tensor %": lambda x: value(3, 4) % x,
    "abs neg": lambda x: abs(-x) + +x,
    "frac": lambda x: x.frac() + x.trunc() + x.ceil(),
    "float": lambda x: x * float(x[0, 0].detach()),
    "half": lambda x: x.float().double(),
    "cpu": lambda x: x.cpu().to("cpu").to(x.device, torch.float64),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_types_and_reflected_operators(name):
    assert_as_backward(NUMBERS[name], 3, 4)


def test_the_remainder_of_a_number():
    """Of which backpropagation has no derivative."""
    for function in (lambda x: 2 % x, lambda x: torch.remainder(2, x)):
        assert_as_backward(function, 3, 4, reference=lambda x: 2 - x * (2 / x).floor())


SCALARS = {
    "softmax": lambda x: x.softmax(0),
    "softmax last": lambda x: F.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, 0),
    "transpose": lambda x: x.transpose(0, -1),
    "swapaxes": lambda x: torch.swapaxes(x, 0, 0),
    "permute": lambda x: x.permute(()),
    "movedim": lambda x: x.movedim(0, 0),
    "t": lambda x: x.t(),
    "roll": lambda x: x.roll(1),
    "flip": lambda x: x.flip(()),
    "index_select": lambda x: x.index_select(0, torch.tensor([0])),
    "gather": lambda x: x.gather(0, torch.tensor(0)),
    "take": lambda x: x.take(torch.tensor([0, 0])),
    "mse_loss": lambda x: F.mse_loss(x, torch.tensor(0.5, dtype=DTYPE)),
    "mse_loss sum": lambda x: F.mse_loss(x, x * x, reduction="sum"),
    "mse_loss none": lambda x: F.mse_loss(x, x * x, reduction="none"),
    "l1_loss": lambda x: F.l1_loss(x, torch.tensor(0.5, dtype=DTYPE)),
    "sum": lambda x: x.sum(0) + x.sum() + x.sum(-1, keepdim=True),
    "mean": lambda x: x.mean(0) + x.mean() + x.mean(-1, keepdim=True),
    "max": lambda x: x.max() + x.max(0).values + x.amax(),
    "squeeze": lambda x: x.squeeze() + x.squeeze(0) + x.unsqueeze(0).squeeze(-1),
    "unsqueeze": lambda x: x.unsqueeze(-1),
    "flatten": lambda x: x.flatten(),
    "reshape": lambda x: x.reshape(1, 1).view(()).expand(2, 3),
    "repeat": lambda x: x.repeat(2),
    "stack": lambda x: torch.stack([x, x * x]),
    "cumsum": lambda x: x.cumsum(0),
    "sort": lambda x: x.sort(0).values,
    "index": lambda x: x[None] + x[...] + x[()],
    "mask": lambda x: x[torch.tensor(True)],
    "where": lambda x: torch.where(x > 0, x, -x),
    "norm": lambda x: x.norm(),
    "logsumexp": lambda x: x.logsumexp(0),
    "clamp": lambda x: x.clamp(-5, 5),
    "pow": lambda x: x ** x.abs(),
    "index_fill": lambda x: x.index_fill(0, torch.tensor([0]), 2.0) + x,
    "index_add": lambda x: x.index_add(0, torch.tensor([0]), x**2),
    "scatter": lambda x: x.scatter(0, torch.tensor(0), x * x),
    "unfold": lambda x: x.clone().contiguous().view(-1).unbind()[0],
}


@pytest.mark.parametrize("name", SCALARS)
def test_tensors_without_axes(name):
    assert_as_backward(SCALARS[name], seed=3)


IMAGES = value(2, 4, 5, 5, seed=7)
NAMED = {
    "where": lambda x: torch.where(condition=x > 0, input=x, other=2 * x),
    "where mixed": lambda x: torch.where(x > 0, input=x, other=2 * x),
    "where method": lambda x: x.where(condition=x > 0, other=2 * x),
    "add": lambda x: torch.add(input=x, other=x, alpha=2) + x.add(other=x),
    "sub": lambda x: torch.sub(other=x, input=x * x) + torch.rsub(input=x, other=2),
    "mul": lambda x: torch.mul(input=x, other=x),
    "div": lambda x: torch.div(input=x, other=x.abs() + 1),
    "pow": lambda x: torch.pow(input=x, exponent=2),
    "pow of": lambda x: torch.pow(self=2.0, exponent=x),
    "exp": lambda x: torch.exp(input=x) + torch.tanh(input=x),
    "matmul": lambda x: torch.matmul(input=x, other=x.T) + torch.mm(input=x, mat2=x.T),
    "addmm": lambda x: torch.addmm(input=x, mat1=value(3, 3), mat2=x),
    "cat": lambda x: torch.cat(tensors=[x, x * x], dim=1),
    "stack": lambda x: torch.stack(tensors=(x, x * x)),
    "linear": lambda x: F.linear(input=x, weight=value(2, 4), bias=value(2)),
    "linear weight": lambda x: F.linear(weight=x, input=value(2, 4)),
    "embedding": lambda x: F.embedding(input=torch.tensor([2, 0]), weight=x),
    "relu": lambda x: F.relu(input=x * 1, inplace=True),
    "clamp": lambda x: torch.clamp(input=x, min=0, max=1),
    "softmax": lambda x: F.softmax(input=x, dim=0) + torch.softmax(x, dim=1),
    "layer_norm": lambda x: F.layer_norm(input=x, normalized_shape=(4,)),
    "mse_loss": lambda x: F.mse_loss(target=x, input=value(3, 4)),
    "cross_entropy": lambda x: F.cross_entropy(target=torch.tensor([1, 0, 2]), input=x),
    "sum": lambda x: torch.sum(input=x, dim=0) + x.sum(axis=0) + x.sum(axis=0, keepdims=True),
    "mean": lambda x: torch.mean(input=x, axis=0),
    "transpose": lambda x: torch.transpose(input=x, dim0=0, dim1=1),
    "permute": lambda x: torch.permute(input=x, dims=(1, 0)) + x.permute(dims=(1, 0)),
    "reshape": lambda x: torch.reshape(input=x, shape=(2, 6)) + x.reshape(shape=(2, 6)),
    "view": lambda x: x.view(size=(2, 6)),
    "unsqueeze": lambda x: torch.unsqueeze(input=x, dim=0) + x.unsqueeze(dim=0),
    "narrow": lambda x: torch.narrow(input=x, dim=0, start=1, length=2),
    "chunk": lambda x: torch.chunk(input=x, chunks=2, dim=1)[0],
    "split": lambda x: torch.split(tensor=x, split_size_or_sections=2)[0],
    "expand": lambda x: x[0].expand(size=(2, 4)),
    "expand_as": lambda x: x[0].expand_as(other=x),
    "repeat": lambda x: x.repeat(repeats=(2, 1)),
    "flip": lambda x: torch.flip(input=x, dims=(0,)),
    "roll": lambda x: torch.roll(input=x, shifts=1, dims=0),
    "gather": lambda x: torch.gather(input=x, dim=0, index=PLACES[:2]),
    "index_select": lambda x: torch.index_select(input=x, dim=0, index=INDEX),
    "masked_fill": lambda x: torch.masked_fill(input=x, mask=MASK, value=1.0),
    "scatter_add": lambda x: torch.scatter_add(input=x, dim=0, index=PLACES, src=x * x),
    "index_add": lambda x: x.index_add(dim=0, index=INDEX, source=x * x, alpha=2),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "bmm": lambda x: torch.bmm(input=x[None], mat2=x.T[None]),
    "conv": lambda x: F.conv1d(input=x[None], weight=value(2, 3, 2)),
    "pad": lambda x: F.pad(input=x, pad=(1, 1)),
    "attention": lambda x: F.scaled_dot_product_attention(query=x, key=x, value=x),
    "clone": lambda x: torch.clone(input=x),
    "flatten": lambda x: torch.flatten(input=x, start_dim=0),
    "searchsorted": lambda x: x * torch.searchsorted(sorted_sequence=x.detach(), input=x),
    "copy_": lambda x: (x * 1).copy_(other=x * x, non_blocking=False),
    "add_": lambda x: (x * 1).add_(other=x * x, alpha=2),
    "setitem": lambda x: x * torch.numel(input=x),
    "to": lambda x: x.to(dtype=torch.float64) + x.to(x),
    "pooling": lambda x: F.max_pool1d(input=x[None], kernel_size=2),
}


@pytest.mark.parametrize("name", NAMED)
def test_arguments_by_name(name):
    assert_as_backward(NAMED[name], 3, 4)


def without_rows(dual):
    return DualTensor(dual.primal, dual.tangents[:0])


@pytest.mark.parametrize("name", TABLE)
def test_tangents_without_rows_are_zero(name):
    """As those of new zeros are: alone, and beside others."""
    function, *args = TABLE[name]
    kwargs = args.pop() if isinstance(args[-1], dict) else {}
    duals = list(find_duals((args, kwargs)))
    for place in range(-1, len(duals) if len(duals) > 1 else 0):
        chosen = duals if place < 0 else [duals[place]]
        few, new_kwargs = map_duals(
            lambda d, chosen=chosen: without_rows(d) if any(d is c for c in chosen) else d,
            (tuple(args), kwargs),
        )
        out = function(*few, **new_kwargs)
        expected = jvp_by_vmap(function, few, new_kwargs, K)
        items = [out] if isinstance(out, Tensor) else [v for v in out if v.is_floating_point()]
        for item, tangents in zip(items, expected, strict=True):
            if len(item.tangents):
                torch.testing.assert_close(expanded(item), tangents.to(item.dtype))
            else:
                assert not tangents.any()


def classes(target):
    return lambda x: F.cross_entropy(x, target)


TARGETS_OF_LOSSES = {
    "uint8": classes(torch.tensor([1, 0, 3], dtype=torch.uint8)),
    "uint8 weight": lambda x: F.cross_entropy(
        x, torch.tensor([1, 0, 3], dtype=torch.uint8), value(4).abs()
    ),
    "uint8 nll": lambda x: F.nll_loss(x, torch.tensor([1, 0, 3], dtype=torch.uint8)),
    "dual": lambda x: F.cross_entropy(value(3, 4), x.softmax(1)),
    "both": lambda x: F.cross_entropy(x.sin(), x.softmax(1), reduction="none"),
    "both smooth": lambda x: F.cross_entropy(x.sin(), x, value(4).abs(), label_smoothing=0.2),
    "both pixels": lambda x: F.cross_entropy(x[:, :, None], x.exp()[:, :, None], reduction="sum"),
    "dual one": lambda x: F.cross_entropy(x[0], x[1].softmax(0)),
    "mse": lambda x: F.mse_loss(value(3, 4), x) + F.mse_loss(x, x.sin()),
    "mse weight": lambda x: F.mse_loss(value(3, 4), x, weight=x.exp()),
    "mse broadcast": lambda x: F.mse_loss(x, x[:1].clone(), reduction="none"),
    "l1": lambda x: F.l1_loss(value(3, 4), x) + F.l1_loss(x.sin(), x),
    "huber": lambda x: F.huber_loss(value(3, 4), x) + F.smooth_l1_loss(x.sin(), x),
    "kl": lambda x: F.kl_div(x.log_softmax(1), x.softmax(1), reduction="batchmean"),
    "kl log": lambda x: F.kl_div(x.log_softmax(1), x.sin().log_softmax(1), log_target=True),
    "bce": lambda x: F.binary_cross_entropy(x.sigmoid(), x.sin().sigmoid()),
    "bce logits": lambda x: F.binary_cross_entropy_with_logits(x, x.sigmoid()),
    "bce uint8": lambda x: F.binary_cross_entropy_with_logits(x, (x > 0).to(x.dtype)),
    "cosine": lambda x: F.cosine_embedding_loss(x, x.sin(), torch.tensor([1, -1, 1])),
    "poisson": lambda x: F.poisson_nll_loss(x, x.exp()),
    "gaussian": lambda x: F.gaussian_nll_loss(x, x.sin(), x.exp()),
    "triplet": lambda x: F.triplet_margin_loss(x, x.sin(), x.cos()),
}


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")
@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize("name", TARGETS_OF_LOSSES)
def test_targets_of_losses(name):
    assert_as_backward(TARGETS_OF_LOSSES[name], 3, 4)
