"""The losses of tokens, measured one by one, of models that are causal in time."""

from __future__ import annotations

import pytest
import torch
from causal_models import (
    CLASSES,
    SIZE,
    WIDTH,
    B,
    Causal,
    Recurrent,
    T,
    assert_close,
    batch,
    gradients_of,
    made,
    of_logits,
    true_gradients,
)
from torch import Tensor, nn

from models_for_tests import DEVICE
from multitangent import (
    Activations,
    ControlVariate,
    ForwardGradient,
    Mean,
    Normal,
    Projection,
    SimulatedGradient,
)
from multitangent.aggregation import Rescaled, Sum, TopK
from multitangent.gradient import DifferenceGradient, step
from multitangent.objective import LogitsLoss
from multitangent.tangents import (
    Cone,
    Normalized,
    Orthogonal,
    OwnValue,
    Residual,
    RunningMean,
    ScaledByRMS,
    Sphere,
    StandardBasis,
)


class TestExact:
    """With K >= n the projection is backpropagation."""

    @pytest.mark.parametrize("share", ["batch", "sample"])
    @pytest.mark.parametrize("tangents", [StandardBasis(SIZE), Normal(SIZE + 3), Sphere(SIZE + 3)])
    def test_many_tangents(self, tangents, share):
        model, (x, y) = made(Causal), batch()
        loss = LogitsLoss()
        perturb = Activations(credit="token", share=share)
        value = ForwardGradient(model, loss, tangents, perturb=perturb)(x, y)
        found = gradients_of(model)
        true = loss(model(x), y)
        torch.testing.assert_close(value, true.detach())
        assert_close(found, true_gradients(model, true))

    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("micro_batch", [1, 3, B])
    def test_exact_output_in_micro_batches(self, micro_batch, recompute):
        model, (x, y) = made(Causal), batch()
        loss = LogitsLoss()
        perturb = Activations(credit="token", output="exact", recompute=recompute)
        ForwardGradient(model, loss, Normal(SIZE), perturb=perturb, micro_batch=micro_batch)(x, y)
        found = gradients_of(model)
        assert_close(found, true_gradients(model, loss(model(x), y)))

    def test_without_stored_tangents(self):
        model, (x, y) = made(Causal), batch(20)
        loss = LogitsLoss()
        perturb = Activations(credit="token", share="sample")
        ForwardGradient(model, loss, Normal(SIZE), perturb=perturb, store_tangents=False)(x, y)
        found = gradients_of(model)
        assert_close(found, true_gradients(model, loss(model(x), y)))

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("shift", [False, True])
    def test_ignored_labels(self, reduction, shift):
        model, (x, y) = made(Causal), batch()
        y[0, 1:], y[2, 0] = -100, -100
        loss = LogitsLoss(reduction=reduction, shift=shift)
        perturb = Activations(credit="token")
        value = ForwardGradient(model, loss, Normal(SIZE), perturb=perturb)(x, y)
        found = gradients_of(model)
        true = loss(model(x), y)
        torch.testing.assert_close(value, true.detach())
        assert_close(found, true_gradients(model, true))

    def test_weighted_classes(self):
        model, (x, y) = made(Causal), batch()
        model = nn.Sequential(model.first, nn.Tanh(), model.last)
        weight = torch.linspace(0, 1, CLASSES, dtype=torch.float64, device=DEVICE)
        loss = LogitsLoss()
        loss.weight = weight
        gradient = ForwardGradient(model, loss, Normal(T * 8), perturb=Activations(credit="token"))
        gradient(x, y)
        found = gradients_of(model)
        assert_close(found, true_gradients(model, loss(model(x), y)))

    @pytest.mark.parametrize("loss", [nn.MSELoss(), nn.SmoothL1Loss(reduction="sum")])
    def test_elementwise_losses(self, loss):
        model, (x, _) = made(Recurrent), batch()
        y = torch.randn(B, T, CLASSES, dtype=torch.float64, device=DEVICE)
        gradient = ForwardGradient(
            model, loss, Normal(T * (WIDTH + CLASSES)), perturb=Activations(credit="token")
        )
        gradient(x, y)
        found = gradients_of(model)
        assert_close(found, true_gradients(model, loss(model(x), y)))

    def test_a_function_of_tokens_is_averaged(self):
        model, (x, y) = made(Causal), batch()
        perturb = Activations(credit="token")
        value = ForwardGradient(model, of_logits, Normal(SIZE), perturb=perturb)(x, y)
        found = gradients_of(model)
        true = of_logits(model(x), y).mean()
        torch.testing.assert_close(value, true.detach())
        assert_close(found, true_gradients(model, true))

    @pytest.mark.parametrize("kind", [ForwardGradient, SimulatedGradient])
    def test_nothing_is_before_an_exact_output(self, kind):
        model, (x, y) = nn.Sequential(nn.Linear(2, CLASSES)).to(DEVICE, torch.float64), batch()
        loss = LogitsLoss()
        perturb = Activations(credit="token", output="exact")
        gradient = kind(model, loss, Normal(3), perturb=perturb)
        gradient(x, y)
        found = gradients_of(model)
        assert_close(found, true_gradients(model, loss(model(x), y)))
        assert gradient.assess(x, y).cosine == pytest.approx(1, abs=1e-9)

    def test_one_token(self):
        model, (x, y) = made(Causal), batch()
        perturb = Activations(credit="token")
        loss = LogitsLoss()
        ForwardGradient(model, loss, Normal(SIZE), perturb=perturb)(x[:, :1], y[:, :1])
        found = gradients_of(model)
        assert_close(found, true_gradients(model, loss(model(x[:, :1]), y[:, :1])))


AGGREGATORS = [
    Mean(),
    Sum(),
    Projection(),
    TopK(2),
    Rescaled(Projection()),
    ControlVariate(),
    ControlVariate(1.0),
]
SOURCES = [
    Normal(5),
    Sphere(3),
    Normalized(Normal(3)),
    Orthogonal(4),
    Cone(3, 40.0),
    StandardBasis(7),
    ScaledByRMS(Normal(3)),
    Normal(2) + OwnValue() + RunningMean(),
]


class TestSimulation:
    """Simulated and real agree, where an oracle of few tangents is wanted."""

    @staticmethod
    def both(**options) -> list[list[Tensor]]:
        found = []
        x, y = batch()
        for kind in (ForwardGradient, SimulatedGradient):
            model = made(Causal)
            gradient = kind(model, LogitsLoss(), **options)
            for _ in range(3):  # so that sources have learned
                model.zero_grad()
                gradient(x, y)
            found.append(gradients_of(model))
        return found

    @pytest.mark.parametrize("aggregator", AGGREGATORS, ids=repr)
    def test_aggregators(self, aggregator):
        perturb = Activations(credit="token", share="sample", discount=0.7)
        tangents = Normal(4) + OwnValue()
        assert_close(*self.both(tangents=tangents, aggregator=aggregator, perturb=perturb), 1e-8)

    @pytest.mark.parametrize("share", ["batch", "sample"])
    @pytest.mark.parametrize("tangents", SOURCES, ids=repr)
    def test_sources(self, tangents, share):
        perturb = Activations(credit="token", share=share, output="exact")
        assert_close(
            *self.both(tangents=tangents, aggregator=ControlVariate(), perturb=perturb), 1e-8
        )

    def test_a_residual_guess(self):
        perturb = Activations(credit="token", output="exact")
        tangents = Normal(2) + Residual()
        assert_close(
            *self.both(tangents=tangents, aggregator=ControlVariate(), perturb=perturb), 1e-8
        )

    def test_micro_batches(self):
        x, y = batch()
        found = []
        for size in (1, 2, 3, B):
            model = made(Causal)
            perturb = Activations(credit="token", share="sample")
            ForwardGradient(model, LogitsLoss(), Normal(4), Mean(), perturb, micro_batch=size)(x, y)
            found.append(gradients_of(model))
        for other in found[:-1]:
            assert_close(other, found[-1])

    @pytest.mark.parametrize("tangents", [Normal(3), Normal(2) + OwnValue()], ids=repr)
    def test_finite_differences(self, tangents):
        x, y = batch()
        found = []
        for kind in (ForwardGradient, DifferenceGradient):
            model = made(Causal)
            perturb = Activations(credit="token", share="sample")
            kind(model, LogitsLoss(), tangents, Projection(), perturb)(x, y)
            found.append(gradients_of(model))
        assert_close(*found, 1e-5)


class TestCredit:
    """What a position is credited with."""

    @staticmethod
    def step_of(discount: float = 1.0, **options):
        model, (x, y) = made(Causal), batch()
        perturb = Activations(credit="token", discount=discount, **options)
        gradient = ForwardGradient(model, LogitsLoss(), Normal(3), Mean(), perturb)
        return step(*gradient.prepare(x, y))

    def test_shapes(self):
        result = self.step_of(share="sample")
        assert result.losses.shape == (B, T)
        assert result.combination.jvps.shape == (3, B, T)
        assert result.gram.shape == (B, T, 3, 3)
        assert self.step_of().gram.shape == (T, 3, 3)

    @pytest.mark.parametrize("share", ["batch", "sample"])
    @pytest.mark.parametrize("discount", [0.0, 0.6, 1.0])
    def test_formula(self, discount, share):
        result = self.step_of(discount, share=share)
        coefficients = result.combination.coefficients
        for name, found in result.values.items():
            rows = result.tangents.blocks[name].rows().expand(-1, B, -1, -1)
            expected = torch.zeros_like(found)
            for t in range(T):
                for s in range(t, T):
                    weights = discount ** (s - t) * coefficients[:, :, s]
                    expected[:, t] += torch.einsum("kb,kbn->bn", weights, rows[:, :, t])
            torch.testing.assert_close(found, expected)

    @pytest.mark.parametrize("share", ["batch", "sample"])
    def test_gram_matrices_end_at_the_token(self, share):
        result = self.step_of(share=share)
        rows = [block.rows() for block in result.tangents.blocks.values()]
        gram = result.gram if share == "sample" else result.gram[None]
        for s in range(T):
            vectors = torch.cat([v[:, :, : s + 1].flatten(2) for v in rows], 2)
            expected = torch.einsum("kbn,lbn->bkl", vectors, vectors)
            torch.testing.assert_close(gram[:, s], expected)

    def test_the_mean_is_unbiased_with_less_noise(self):
        """Over many tangents; the losses of earlier tokens are noise to a position."""
        model, (x, y) = made(Causal), batch()
        loss, count = LogitsLoss(), 60
        true = torch.cat([g.flatten() for g in true_gradients(model, loss(model(x), y))])
        errors = {}
        for credit in ("sample", "token"):
            perturb = Activations(credit=credit, share="sample")
            gradient = ForwardGradient(model, loss, Normal(50), Mean(), perturb)
            for _ in range(count):
                gradient(x, y)
            total = torch.cat([g.flatten() for g in gradients_of(model)])
            errors[credit] = float((total / count - true).norm() / true.norm())
        assert errors["token"] < 0.15
        assert errors["token"] < 0.9 * errors["sample"]

    def test_assess(self):
        model, (x, y) = made(Causal), batch()
        perturb = Activations(credit="token")
        gradient = ForwardGradient(model, LogitsLoss(), Normal(SIZE) + Normal(2), perturb=perturb)
        found = gradient.assess(x, y)
        assert found.cosine == pytest.approx(1, abs=1e-9)
        assert found.captured["all"] == pytest.approx(1, abs=1e-9)
        assert found.captured["Normal(num_tangents=2)"] < 0.9

    def test_diagnostics(self):
        model, (x, y) = made(Causal), batch()
        gradient = ForwardGradient(
            model, LogitsLoss(), Normal(3), perturb=Activations(credit="token")
        )
        gradient(x, y)
        assert gradient.diagnostics.gradient_norm.shape == (B, T)
        assert gradient.diagnostics.condition.shape == (T,)

    def test_a_line_has_the_losses_of_samples(self):
        model, (x, y) = made(Causal), batch()
        gradient = ForwardGradient(
            model, LogitsLoss(), Normal(3), perturb=Activations(credit="token")
        )
        gradient(x, y)
        direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
        assert gradient.along(direction).slopes.shape == (B,)

    def test_compile_is_left_out(self):
        model, (x, y) = made(Causal), batch()
        perturb = Activations(credit="token")
        gradient = ForwardGradient(model, LogitsLoss(), Normal(3), perturb=perturb, compile=True)
        with pytest.warns(UserWarning, match="left out for this model and batch. Found losses of"):
            gradient(x, y)
        found = gradients_of(model)
        ForwardGradient(model, LogitsLoss(), Normal(3), perturb=perturb)(x, y)
        assert_close(found, gradients_of(model))
