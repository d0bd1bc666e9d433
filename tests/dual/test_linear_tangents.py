"""Tangents of a layer of many outputs: a loss gets the same of them as of their products."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from multitangent.dual import Drawn, DualTensor, Factored, Factors
from multitangent.dual._linear_tangents import FEWEST_THAT_WAIT, LinearTangents

B, T, V, D, K = 3, 45, 2000, 4, 3
assert B * T * V >= FEWEST_THAT_WAIT
ROWS = torch.arange(T)


def random(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


LABELS = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(0))
IGNORED = torch.where(ROWS % 3 == 1, -100, LABELS)
SHARES = random(B, V, T).softmax(1)
HIDDEN = random(B, T, D, seed=1), random(K, B, T, D, seed=2)
SHARED = HIDDEN[0], random(K, 1, T, D, seed=3)
FEWER = HIDDEN[0], random(K - 1, B, T, D, seed=4)
WEIGHT, ROWS_OF_WEIGHT = random(V, D, seed=5), random(K, V, D, seed=6)
FACTORS = [
    Factors(random(1, V, 2, seed=7), random(1, 2, D, seed=8)),
    random(2, V, D, seed=9),
]
BIAS = random(V, seed=10), random(K, V, seed=11)


def drawn():
    return Drawn(lambda: ROWS_OF_WEIGHT, torch.float64)


# Input, weight and bias by name; what has no tangents stands alone.
LAYERS = {
    "input": (HIDDEN, WEIGHT, None),
    "input, plain bias": (HIDDEN, WEIGHT, BIAS[0]),
    "shared input": (SHARED, WEIGHT, None),
    "weight": (HIDDEN[0], (WEIGHT, ROWS_OF_WEIGHT), None),
    "bias": (HIDDEN[0], WEIGHT, BIAS),
    "all": (HIDDEN, (WEIGHT, ROWS_OF_WEIGHT), BIAS),
    "factors": (HIDDEN, (WEIGHT, Factored(FACTORS)), BIAS),
    "factors, drawn again": (FEWER, (WEIGHT, Factored(FACTORS[1:])), None),
    "drawn again": (HIDDEN, (WEIGHT, drawn()), None),
    "fewer rows": (FEWER, (WEIGHT, ROWS_OF_WEIGHT), None),
}


def chosen(logits, mask):
    return F.cross_entropy(logits[mask], LABELS[mask])


# What users and libraries make of logits [B, T, V].
LOSSES = {
    "transposed": lambda y: F.cross_entropy(y.mT, LABELS, reduction="none").mean(1),
    "transpose": lambda y: F.cross_entropy(y.transpose(-1, 1), LABELS),
    "permuted": lambda y: F.cross_entropy(y.permute(1, -1, 0), LABELS.mT, reduction="none"),
    "moved": lambda y: F.cross_entropy(y.movedim(-1, 1), LABELS),
    "two axes moved": lambda y: F.cross_entropy(y.movedim((1, -1), (0, 1)), LABELS.mT),
    "flat": lambda y: F.cross_entropy(y.double().view(-1, V), LABELS.flatten(), reduction="sum"),
    "flattened": lambda y: F.cross_entropy(y.flatten(0, 1), LABELS.flatten()),
    "cut": lambda y: F.cross_entropy(
        y[..., :-1, :].contiguous().view(-1, V), LABELS[..., 1:].reshape(-1)
    ),
    "cut first": lambda y: F.cross_entropy(y[:, 1:].mT, LABELS[:, :-1], reduction="none"),
    "narrow": lambda y: F.cross_entropy(y.narrow(1, -9, 8).mT, LABELS[:, -9:-1]),
    "last": lambda y: F.cross_entropy(y[:, -1], LABELS[:, -1], reduction="none"),
    "one sample": lambda y: F.cross_entropy(y[1], LABELS[1]),
    "masked": lambda y: chosen(y, LABELS % 3 > 0),
    "clone": lambda y: F.cross_entropy(y.clone().mT, LABELS),
    "ignored": lambda y: F.cross_entropy(y.mT, IGNORED),
    "shares": lambda y: F.cross_entropy(y.mT, SHARES, reduction="none"),
    "smoothed": lambda y: F.cross_entropy(
        y.mT, IGNORED, random(V, seed=12).exp(), label_smoothing=0.1
    ),
}
FORMED = {
    "log_softmax": lambda y: F.nll_loss(y.log_softmax(-1).mT, LABELS),
    "squares": lambda y: (y * y).mean((1, 2)),
    "some outputs": lambda y: F.cross_entropy(y[..., : V // 2].mT, LABELS % (V // 2)),
    "fewer outputs": lambda y: F.cross_entropy(y[:, :, 1:].mT, LABELS.clamp(max=V - 2)),
    "other rows": lambda y: F.cross_entropy(y.view(-1, V // 2), LABELS.repeat(2, 1).flatten() % 9),
    "written": lambda y: F.cross_entropy(y.mT.index_fill_(1, ROWS, 0.0), LABELS),
}


def rows_of(x):
    value, t = x
    t = t if isinstance(t, torch.Tensor) else t.computed()
    full = t.new_zeros(K, *value.shape)
    full[: len(t)] = t
    return full


def layer(x, weight, bias):
    def dual(value):
        if not isinstance(value, tuple):
            return value
        primal, t = value
        is_rows = isinstance(t, torch.Tensor)
        return DualTensor(primal, t) if is_rows else DualTensor.deferred(primal, t)

    return F.linear(dual(x), dual(weight), dual(bias))


def expected(loss, parts):
    places = [i for i, part in enumerate(parts) if isinstance(part, tuple)]

    def function(*values):
        given = dict(zip(places, values, strict=True))
        return loss(F.linear(*[given.get(i, part) for i, part in enumerate(parts)]))

    values = tuple(parts[i][0] for i in places)
    rows = [rows_of(parts[i]) for i in places]
    jvps = [torch.func.jvp(function, values, tuple(t[k] for t in rows))[1] for k in range(K)]
    return torch.stack(jvps)


def assert_same(loss, parts):
    torch.testing.assert_close(
        rows_of((loss(F.linear(*[p[0] if isinstance(p, tuple) else p for p in parts])),
                 loss(layer(*parts)).tangents)),
        expected(loss, parts), rtol=1e-10, atol=1e-12,
    )  # fmt: skip


@pytest.mark.parametrize("parts", LAYERS.values(), ids=LAYERS)
def test_every_kind_of_tangents(parts):
    assert_same(LOSSES["transposed"], parts)
    assert_same(FORMED["squares"], parts)


@pytest.mark.parametrize("loss", (LOSSES | FORMED).values(), ids=LOSSES | FORMED)
def test_every_way_to_the_loss(loss):
    assert_same(loss, LAYERS["factors"])


def test_logits_of_another_type():
    found = F.cross_entropy(layer(*LAYERS["all"]).float().mT, LABELS)
    wanted = expected(LOSSES["clone"], LAYERS["all"])
    assert found.tangents.dtype is torch.float32
    torch.testing.assert_close(found.tangents, wanted.float(), rtol=1e-4, atol=1e-4)


@pytest.fixture
def refuse_products(monkeypatch):
    def refuse(self):
        raise AssertionError("the tangents of all logits were made")

    monkeypatch.setattr(LinearTangents, "computed", refuse)


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_tangents_of_logits_are_not_made(loss, refuse_products):
    loss(layer(*LAYERS["all"]))


def test_the_input_may_be_written_into_before_the_loss():
    x = DualTensor(HIDDEN[0].clone(), HIDDEN[1])
    logits = F.linear(x, DualTensor(WEIGHT, ROWS_OF_WEIGHT))
    x.mul_(2)
    loss = LOSSES["flat"]
    wanted = loss(layer(HIDDEN, (WEIGHT, ROWS_OF_WEIGHT), None))
    torch.testing.assert_close(loss(logits).tangents, wanted.tangents, rtol=0, atol=0)


def test_weights_that_were_written_into_are_refused():
    weight = WEIGHT.clone()
    logits = F.linear(DualTensor(*HIDDEN), weight)
    weight.mul_(2)
    with pytest.raises(RuntimeError, match="weights of a layer should stay"):
        LOSSES["transposed"](logits)


def test_views_see_what_is_written_into_the_logits():
    def loss(y):
        flat = y.view(-1, V)
        y[:, 0] *= 0.0
        return F.cross_entropy(flat, LABELS.flatten())

    wanted = expected(lambda y: loss(y.clone()), LAYERS["all"])
    torch.testing.assert_close(loss(layer(*LAYERS["all"])).tangents, wanted)


def test_small_outputs_have_their_tangents_at_once():
    x = DualTensor(HIDDEN[0][:1, :2], HIDDEN[1][:, :1, :2])
    assert F.linear(x, WEIGHT).held(LinearTangents) is None


def test_bfloat16_tangents_are_summed_in_the_precision_of_the_logits():
    rows = HIDDEN[1].bfloat16()
    loss = LOSSES["transposed"](F.linear(DualTensor(HIDDEN[0].float(), rows), WEIGHT.float()))
    assert loss.tangents.dtype is torch.float32
    wanted = expected(LOSSES["transposed"], ((HIDDEN[0], rows.double()), WEIGHT, None))
    torch.testing.assert_close(loss.tangents, wanted.float(), rtol=1e-5, atol=1e-5)
