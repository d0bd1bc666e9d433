"""Tangents in factors: every rule that takes them gives what their product gives."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multitangent.dual import Drawn, DualTensor, Factored, Factors, primal

TOKENS = torch.tensor([[0, 3, 1], [2, 2, 4]])


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def parts_of(shape, kind):
    m, *rest = shape
    thin = Factors(random(2, m, 1, seed=1), random(2, 1, *rest, seed=2))
    thick = Factors(random(1, m, 3, seed=3), random(1, 3, *rest, seed=4))
    rows = random(2, m, *rest, seed=5)
    return {"one": [thin], "several": [thick, rows, thin]}[kind]


def image(*shape):
    """An input whose tangents are rows, so that both kinds meet."""
    return DualTensor(random(*shape, seed=6), random(5, *shape, seed=7))


def shift(rows, *shape):
    return DualTensor(random(*shape, seed=9), random(rows, *shape, seed=10))


# By name: the shape of the weights, and a function of them that takes factors.
LINEAR = {
    "linear": ((4, 5), lambda w: F.linear(random(2, 3, 5), w)),
    "linear, one sample": ((4, 5), lambda w: F.linear(random(5), w)),
    "linear, no sample": ((4, 5), lambda w: F.linear(random(0, 5), w)),
    "linear of duals": ((4, 5), lambda w: F.linear(image(3, 5), w, random(4))),
    "linear, trained bias": ((4, 5), lambda w: F.linear(random(2, 3, 5), w, shift(2, 4))),
    "linear of duals, trained bias": ((4, 5), lambda w: F.linear(image(3, 5), w, shift(3, 4))),
    "matmul": ((4, 5), lambda w: random(2, 3, 4) @ w),
    "vector": ((4, 5), lambda w: random(4) @ w),
    "mm": ((4, 5), lambda w: torch.mm(image(3, 4), w)),
    "addmm": ((4, 5), lambda w: torch.addmm(random(5), image(3, 4), w, alpha=2)),
    "addmm, trained bias": ((4, 5), lambda w: torch.addmm(shift(2, 5), image(3, 4), w)),
    "addmm of rows": ((4, 5), lambda w: torch.addmm(shift(2, 3, 5), random(3, 4), w)),
    "transposed": ((4, 5), lambda w: random(3, 5) @ w.t()),
    "T": ((4, 5), lambda w: random(3, 5) @ w.T),
    "mT": ((4, 5), lambda w: random(3, 5) @ w.mT),
    "transpose": ((4, 5), lambda w: random(3, 5) @ w.transpose(-2, 1)),
    "transpose of nothing": ((4, 5), lambda w: random(3, 4) @ w.transpose(1, 1)),
    "chunks": ((4, 5), lambda w: random(3, 5) @ w.chunk(2)[1].t()),
    "pieces": ((4, 5), lambda w: F.linear(random(3, 5), w.split([1, 3])[1])),
    "embedding": ((5, 4), lambda w: F.embedding(TOKENS, w)),
    "embedding of one": ((5, 4), lambda w: F.embedding(TOKENS[0, 1], w)),
    "embedding of none": ((5, 4), lambda w: F.embedding(TOKENS[:0], w)),
    "embedding, padded": ((5, 4), lambda w: F.embedding(TOKENS, w, padding_idx=-3)),
    "conv1d": ((6, 4, 3), lambda w: F.conv1d(random(2, 4, 8), w)),
    "conv1d, one sample": ((6, 4, 3), lambda w: F.conv1d(random(4, 8), w, padding=1)),
    "conv2d": ((6, 4, 3, 2), lambda w: F.conv2d(image(2, 4, 7, 8), w, random(6), 2, (1, 0))),
    "conv2d, groups": ((6, 2, 3, 2), lambda w: F.conv2d(random(2, 4, 7, 8), w, groups=2)),
    "conv2d, depthwise": ((4, 1, 3, 3), lambda w: F.conv2d(random(2, 4, 7, 8), w, groups=4)),
    "conv2d, same": (
        (6, 4, 3, 2), lambda w: F.conv2d(random(2, 4, 7, 8), w, padding="same", dilation=2)
    ),
    "conv3d": ((3, 2, 2, 2, 2), lambda w: F.conv3d(random(1, 2, 3, 4, 5), w)),
    "transposed conv1d": ((4, 3, 3), lambda w: F.conv_transpose1d(random(2, 4, 6), w, stride=2)),
    "transposed conv1d, one sample": ((4, 3, 3), lambda w: F.conv_transpose1d(random(4, 6), w)),
    "transposed conv2d, groups": (
        (4, 3, 3, 2),
        lambda w: F.conv_transpose2d(image(2, 4, 5, 6), w, None, 2, 1, 1, groups=2),
    ),
}  # fmt: skip
ANY = {
    "product": ((4, 5), lambda w: w * w),
    "sum of rows": ((4, 5), lambda w: w[1:3].sum(0)),
    "batched": ((2, 4, 5), lambda w: random(2, 3, 4) @ w),
    "chunks of columns": ((4, 6), lambda w: w.chunk(2, 1)[1]),
    "pieces of negative axes": ((4, 6), lambda w: w.split(2, -2)[1]),
    "view of a view": ((4, 6), lambda w: w.t().reshape(3, 8) + 1),
    "norm": ((4, 5), lambda w: torch.linalg.vector_norm(w)),
    "fallback": ((4, 5), lambda w: torch.special.xlog1py(2.0, w.square())),
}


@pytest.mark.filterwarnings("ignore::multitangent.dual.FallbackWarning")
@pytest.mark.parametrize("parts", ["one", "several"])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("name", [*LINEAR, *ANY])
def test_factors_give_what_their_product_gives(name, parts, drawn):
    shape, function = (LINEAR | ANY)[name]
    weight, factored = random(*shape, seed=8), Factored(parts_of(shape, parts))
    expected = function(DualTensor(weight, factored.computed()))
    tangents = factored
    if drawn:
        tangents = Drawn(factored.computed, factored.dtype, lambda: factored)
    found = function(DualTensor.deferred(weight, tangents))
    torch.testing.assert_close(found.primal, primal(expected))
    torch.testing.assert_close(found.tangents, expected.tangents, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("parts", ["one"])
@pytest.mark.parametrize("name", LINEAR)
def test_linear_functions_never_multiply_the_factors(name, parts, monkeypatch):
    shape, function = LINEAR[name]
    weight, factored = random(*shape, seed=8), Factored(parts_of(shape, parts))

    def multiplied(self):
        raise AssertionError(name)

    monkeypatch.setattr(Factors, "multiplied", multiplied)
    dual = DualTensor.deferred(weight, factored)
    if name == "transpose of nothing":
        with pytest.raises(AssertionError, match=name):
            function(dual)
    else:
        assert function(dual).tangents.isfinite().all()


def test_products_of_factors_are_not_kept():
    dual = DualTensor.deferred(random(4, 5), Factored(parts_of((4, 5), "one")))
    assert dual.tangents.shape == (2, 4, 5)
    assert dual.factored is not None
    assert (dual + 1).factored is None


def test_views_of_a_matrix_that_was_written_into_are_taken_again():
    weight = DualTensor.deferred(random(4, 5), Factored(parts_of((4, 5), "one")))
    view = weight.t()
    assert view.factored is not None
    weight.mul_(2)
    assert weight.factored is None
    assert view.factored is None
    expected = 2 * Factored(parts_of((4, 5), "one")).computed().mT
    torch.testing.assert_close(view.tangents, expected)
    torch.testing.assert_close(random(3, 5) @ view.primal, (random(3, 5) @ view).primal)
    torch.testing.assert_close(
        (random(3, 5) @ view).tangents, random(3, 5) @ expected, rtol=1e-12, atol=1e-12
    )


def test_the_type_of_factors_changes():
    factored = Factored(parts_of((4, 5), "several"))
    assert factored.to(torch.float32).dtype is torch.float32
    assert factored.to(torch.float32).computed().dtype is torch.float32
    assert len(factored) == 5
