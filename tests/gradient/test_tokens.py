"""The losses of tokens, measured one by one, of models that are causal in time."""

from __future__ import annotations

import warnings

import pytest
import torch
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
from multitangent.aggregation import Rescaled, Sum, SumOfGuesses, TopK
from multitangent.engine import Derivatives, ForwardMode
from multitangent.gradient import DifferenceGradient, step
from multitangent.objective import LogitsLoss, Objective
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

B, T, WIDTH, CLASSES = 4, 4, 3, 5
SIZE = T * (2 * WIDTH + CLASSES)  # n


class Causal(nn.Module):
    """A running mean over time between layers within tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, WIDTH)
        self.second = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + torch.tanh(self.second(self.mixed(h)))
        return self.last(self.mixed(torch.tanh(h)))

    def mixed(self, h: Tensor) -> Tensor:
        counts = torch.arange(1, h.shape[1] + 1, device=h.device)[:, None]
        return h.cumsum(1) / counts


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(2, WIDTH, batch_first=True)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)[0])


def made(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().to(DEVICE, torch.float64)


def batch(size: int = B) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, T, 2, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, (size, T), generator=generator)
    return x.to(DEVICE), y.to(DEVICE)


def gradients_of(model: nn.Module) -> list[Tensor]:
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return grads


def true_gradients(model: nn.Module, value: Tensor) -> list[Tensor]:
    value.backward()
    return gradients_of(model)


def assert_close(found: list[Tensor], expected: list[Tensor], atol: float = 1e-9) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=0)


def of_logits(output: Tensor, target: Tensor) -> Tensor:
    """The losses ``[B, T]`` of logits ``[B, T, classes]``."""
    return nn.functional.cross_entropy(output.mT, target, reduction="none")


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


class MeanOverTime(Causal):
    def mixed(self, h: Tensor) -> Tensor:
        return h + h.mean(1, keepdim=True)


class Bidirectional(Causal):
    def mixed(self, h: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(h, h, h)


class NextToken(Causal):
    """A leak from one position to the one before it, and nowhere else."""

    def mixed(self, h: Tensor) -> Tensor:
        return torch.cat([h[:, :1], h[:, 2:3], h[:, 2:]], 1)


class NormalizedOverTime(Causal):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)

    def mixed(self, h: Tensor) -> Tensor:
        return self.norm(h.mT).mT


class ChannelsFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, WIDTH, 1)
        self.last = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.mT).mT)


class BackwardInTime(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.GRU(2, WIDTH, batch_first=True, bidirectional=True)
        self.last = nn.GRU(2 * WIDTH, CLASSES, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x)[0])[0]


NOT_CAUSAL = [MeanOverTime, Bidirectional, NextToken, NormalizedOverTime, BackwardInTime]


class TestRefusals:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("gradient", [ForwardGradient, SimulatedGradient, DifferenceGradient])
    @pytest.mark.parametrize("kind", NOT_CAUSAL)
    def test_a_model_that_is_not_causal(self, kind, gradient, dtype):
        model, (x, y) = made(kind).to(dtype), batch()
        perturb = Activations(credit="token")
        with pytest.raises(RuntimeError, match=r"causal in time .* depend on the output of"):
            gradient(model, LogitsLoss(), Normal(3), perturb=perturb)(x.to(dtype), y)

    def test_derivatives_of_other_tokens(self):
        """Each derivative is right, and that of another token's loss: their sum does not tell."""

        class Reversed:
            statistics = "frozen"

            def __init__(self, inner):
                self.inner = inner

            def __call__(self, run, tangents):
                found = self.inner(run, tangents)
                return Derivatives(found.losses, found.jvps.flip(-1))

        class Gradient(ForwardGradient):
            def _engine(self, trial):
                return Reversed(ForwardMode(trial.micro_batch, trial.is_plain, trial.compares))

        model, (x, y) = made(Causal), batch()
        with pytest.raises(RuntimeError, match="Directional derivatives should be those"):
            Gradient(model, LogitsLoss(), Normal(3), perturb=Activations(credit="token"))(x, y)

    def test_an_objective_without_tokens(self):
        objective = Objective(made(Causal), LogitsLoss())
        with pytest.raises(ValueError, match=r"has_tokens=True for .*credit='token'"):
            Activations(credit="token").bind(objective)

    def test_normalisation_in_evaluation_mode_is_causal(self):
        model, (x, y) = made(NormalizedOverTime).eval(), batch()
        loss = LogitsLoss()
        ForwardGradient(model, loss, Normal(SIZE), perturb=Activations(credit="token"))(x, y)
        found = gradients_of(model)
        assert_close(found, true_gradients(model, loss(model(x), y)))

    def test_a_loss_that_is_not_causal(self):
        def centred(output: Tensor, target: Tensor) -> Tensor:
            losses = of_logits(output, target)
            return (losses - losses.mean(1, keepdim=True)).square()

        model, (x, y) = made(Causal), batch()
        with pytest.raises(RuntimeError, match=r"causal in time .* the output of 'last'"):
            ForwardGradient(model, centred, perturb=Activations(credit="token"))(x, y)

    @pytest.mark.parametrize("gradient", [ForwardGradient, DifferenceGradient])
    def test_a_site_without_an_axis_of_time(self, gradient):
        model, (x, y) = made(ChannelsFirst), batch()
        with pytest.raises(ValueError, match=r"Found shape \[4, 3, 4\] at 'first'"):
            gradient(model, LogitsLoss(), perturb=Activations(credit="token"))(x, y)

    @pytest.mark.parametrize(
        ("loss", "found"),
        [
            (lambda output, y: of_logits(output, y).mean(1), r"shape \[\d\]"),
            (lambda output, y: of_logits(output, y)[..., None], r"shape \[\d, 4, 1\]"),
            (lambda output, y: 1.0, "1.0"),
        ],
    )
    def test_losses_of_samples(self, loss, found):
        model, (x, y) = made(Causal), batch()
        with pytest.raises(ValueError, match=rf"one number per token.* Found {found}"):
            ForwardGradient(model, loss, perturb=Activations(credit="token"))(x, y)

    def test_losses_of_other_samples(self):
        model, (x, y) = made(Causal), batch()
        with pytest.raises(ValueError, match=r"one number per sample\. Found"):
            ForwardGradient(
                model, lambda out, y: of_logits(out, y)[1:], perturb=Activations(credit="token")
            )(x, y)

    def test_guesses_that_are_not_measured(self):
        model, (x, y) = made(Causal), batch()
        perturb = Activations(credit="token", output="exact")
        with pytest.raises(ValueError, match=r"`aggregator` should measure .* SumOfGuesses"):
            ForwardGradient(model, LogitsLoss(), Residual(), SumOfGuesses(), perturb)(x, y)

    @pytest.mark.parametrize("discount", [-0.1, 1.1, float("nan"), "0.5"])
    def test_a_discount_out_of_range(self, discount):
        with pytest.raises(ValueError, match="`discount` should be at least 0 and at most 1"):
            Activations(credit="token", discount=discount)

    def test_a_discount_without_tokens(self):
        with pytest.raises(ValueError, match="`discount` should be 1 for credit='sample'"):
            Activations(discount=0.5)

    def test_an_unknown_credit(self):
        with pytest.raises(ValueError, match="`credit` should be one of"):
            Activations(credit="position")

    def test_a_causal_model_of_single_precision_passes_in_silence(self):
        model, (x, y) = made(Recurrent).float(), batch()
        gradient = ForwardGradient(model, LogitsLoss(), perturb=Activations(credit="token"))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradient(x.float(), y)
