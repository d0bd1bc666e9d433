"""Tangents of low rank: their law, and blocks that never multiply the factors."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from source_laws import drawn

from multitangent import Mean, Normal, OwnValue, Projection, forward_gradient
from multitangent.dual import Factored, Factors
from multitangent.tangents import (
    FactoredBlock,
    LowRank,
    Normalized,
    Request,
    ScaledByRMS,
    Stream,
    Tangents,
    TangentSource,
)


@dataclass(frozen=True)
class Multiplied(TangentSource):
    """The tangents of another source as full rows."""

    inner: TangentSource

    @property
    def sources(self):
        return (self.inner,)

    @property
    def num_tangents(self):
        return self.inner.num_tangents

    def draw(self, request: Request):
        return self.inner.draw(request)


def moments(rank, steps, shape=(5, 7)):
    for step in range(steps):
        yield drawn(LowRank(16, rank), (shape,), step=step)[0]


@pytest.mark.parametrize("rank", [1, 2])
def test_entries_have_mean_zero_and_covariance_one(rank):
    """32 000 tangents; the standard error of each entry is 0.006, of squares up to 0.016."""
    rows = torch.cat(list(moments(rank, 2000)))
    assert rows.mean(0).abs().max() < 0.03
    assert (rows.T @ rows / len(rows) - torch.eye(35)).abs().max() < 0.08
    assert all(torch.linalg.matrix_rank(rows[:20].view(20, 5, 7)) == rank)


@pytest.mark.parametrize("rank", [1, 3])
def test_the_variance_is_the_documented_one(rank):
    """``E|(v.g) v|^2 = |g|^2 (m n + 2 + 2 (m + n + 1) / rank)``, within three standard errors."""
    m, n = 12, 9
    gradient = torch.linspace(-1, 2, m * n, dtype=torch.float64)
    rows = torch.cat(list(moments(rank, 4000, (m, n))))
    squares = (rows @ gradient).square() * rows.square().sum(1) / gradient.square().sum()
    expected = m * n + 2 + 2 * (m + n + 1) / rank
    if rank == 1:
        assert expected == (m + 2) * (n + 2)
    assert abs(squares.mean() - expected) < 3 * squares.std() / len(squares) ** 0.5
    assert abs(squares.mean() - (m * n + 2)) > 10 * squares.std() / len(squares) ** 0.5


def test_the_mean_is_unbiased():
    """The standard error of the mean over 4000 steps is about 5 % of the gradient."""
    x = torch.linspace(-1, 2, 15, dtype=torch.float64).view(3, 5)
    total = torch.zeros_like(x)
    for step in range(4000):
        total += forward_gradient(lambda x: (x**2).sum(), x, LowRank(2), Mean(), step=step)[1]
    assert (total / 4000 - 2 * x).norm() / (2 * x).norm() < 0.15


def test_as_many_tangents_as_entries_are_exact():
    x = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4)
    for rank in (1, 2):
        _, gradient = forward_gradient(lambda x: (x**3).sum(), x, LowRank(12, rank), Projection())
        torch.testing.assert_close(gradient, 3 * x**2, rtol=1e-9, atol=1e-9)


SOURCES = [
    LowRank(4), LowRank(4, rank=2), LowRank(2) + Normal(1) + LowRank(3, rank=2),
    OwnValue(3) + LowRank(2), Normal(2) + LowRank(2), Normalized(LowRank(3)),
    ScaledByRMS(LowRank(3)), LowRank(2) + OwnValue(3),
]  # fmt: skip


@pytest.mark.parametrize("store", [True, False])
@pytest.mark.parametrize("source", SOURCES, ids=repr)
def test_blocks_of_factors_compute_what_blocks_of_rows_do(source, store):
    torch.manual_seed(0)
    values = {"bias": torch.randn(6), "matrix": torch.randn(6, 7), "filters": torch.randn(5, 2, 3)}
    values = {name: value.double() for name, value in values.items()}
    both = []
    for drawing in (source.init(), Multiplied(source).init()):
        tangents = Tangents(drawing, Stream(3, 1), store=store)
        for name, value in values.items():
            tangents.add(name, value)
        torch.manual_seed(1)
        gradients = {name: torch.randn(2, *v.shape).double() for name, v in values.items()}
        coefficients = torch.randn(source.num_tangents, 3).double()
        combined = tangents.combine(coefficients)
        rows = {f"rows {name}": block.rows() for name, block in tangents.blocks.items()}
        both.append(
            {"gram": tangents.gram(), "jvps": tangents.apply(gradients), **combined, **rows}
        )
        kinds = [isinstance(block, FactoredBlock) for block in tangents.blocks.values()]
        assert kinds == [False, *[not isinstance(drawing, Multiplied)] * 2]
    for name, found in both[0].items():
        torch.testing.assert_close(found, both[1][name], rtol=1e-12, atol=1e-12)


def test_products_are_never_larger_than_the_matrix(monkeypatch):
    monkeypatch.delattr(Factors, "multiplied")
    tangents = Tangents(LowRank(4) + Normal(1), Stream(0, 0))
    tangents.add("matrix", torch.randn(8, 9))
    tangents.gram()
    tangents.apply({"matrix": torch.randn(1, 8, 9)})
    tangents.combine(torch.randn(5))
    with pytest.raises(AttributeError, match="multiplied"):
        tangents.blocks["matrix"].rows()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_are_taken_in_full_precision(dtype):
    tangents = Tangents(LowRank(4), Stream(0, 0), dtype=dtype)
    tangents.add("matrix", torch.randn(30, 40, dtype=torch.float32))
    rows = tangents.blocks["matrix"].factored()
    assert rows.dtype is dtype
    exact = rows.to(torch.float64).computed().flatten(1)
    torch.testing.assert_close(tangents.gram(), exact @ exact.mT, rtol=1e-12, atol=1e-10)
    combined = tangents.combine(torch.ones(4, dtype=torch.float64))["matrix"]
    assert combined.dtype is torch.float32
    torch.testing.assert_close(combined.flatten().double(), exact.sum(0), rtol=1e-5, atol=1e-5)
    jvps = tangents.apply({"matrix": torch.ones(1, 30, 40, dtype=dtype)})
    assert jvps.dtype is torch.float32
    torch.testing.assert_close(jvps[:, 0].double(), exact.sum(1), rtol=1e-4, atol=1e-4)


def test_all_else_gets_normal_tangents():
    shapes = ((7,), (1, 8), (9, 1), (2, 2), (1, 3, 5))
    assert torch.equal(drawn(LowRank(3), shapes), drawn(Normal(3), shapes))
    own = drawn(LowRank(3), ((6, 7),), samples=range(4))  # activations, which may be matrices
    assert torch.equal(own, drawn(Normal(3), ((6, 7),), samples=range(4)))
    tangents = Tangents(LowRank(3), Stream(0, 0))
    tangents.add("hidden", torch.zeros(5, 6, 7), (6, 7))
    assert not isinstance(tangents.blocks["hidden"], FactoredBlock)


@pytest.mark.parametrize(
    "source",
    [
        LowRank(2) + LowRank(2), LowRank(2, rank=2) + LowRank(2), Normal(2) + LowRank(2),
        LowRank(2) + Normal(2),
    ],
    ids=repr,
)  # fmt: skip
def test_no_number_is_drawn_twice(source):
    """Neither by two summands, whatever their ranks are, nor for both factors."""
    tangents = Tangents(source, Stream(0, 0))
    tangents.add("matrix", torch.zeros(8, 9, dtype=torch.float64))
    numbers = []
    for part in tangents.blocks["matrix"].factored().parts:
        if isinstance(part, Factors):
            numbers += [part.left * part.left.shape[2] ** 0.5, part.right]
        else:
            numbers.append(part)
    drawn_numbers = torch.cat([number.flatten() for number in numbers]).round(decimals=10)
    assert len(drawn_numbers.unique()) == len(drawn_numbers)


@dataclass(frozen=True)
class Wrong(LowRank):
    result: object = None

    def draw_factors(self, request):
        return self.result


@pytest.mark.parametrize(
    "result",
    [
        torch.zeros(3, 6, 7),
        Factored([torch.zeros(2, 6, 7)]),
        Factored([Factors(torch.zeros(3, 7, 1), torch.zeros(3, 1, 6))]),
        Factored([Factors(torch.zeros(3, 6, 1).double(), torch.zeros(3, 1, 7).double())]),
    ],
    ids=["tensor", "count", "shape", "type"],
)
def test_what_a_source_returns_is_checked(result):
    tangents = Tangents(Wrong(3, result=result), Stream(0, 0))
    tangents.add("matrix", torch.zeros(6, 7))
    with pytest.raises(ValueError, match=r"should return Factored tangents of shape \[3, 6, 7\]"):
        tangents.gram()


@pytest.mark.parametrize("rank", [0, -1, 1.5, "2"])
def test_the_rank_is_checked(rank):
    with pytest.raises(ValueError, match="`rank` should be an integer of at least 1"):
        LowRank(3, rank)


def test_tangents_of_samples_are_refused():
    with pytest.raises(ValueError, match=r"`share` should be 'batch'.*Found 'sample'"):
        LowRank(3, share="sample")
