"""What is refused where the losses of tokens are measured."""

from __future__ import annotations

import warnings

import pytest
import torch
from causal_models import (
    CLASSES,
    SIZE,
    WIDTH,
    Causal,
    Recurrent,
    assert_close,
    batch,
    gradients_of,
    made,
    of_logits,
    true_gradients,
)
from torch import Tensor, nn

from multitangent import (
    Activations,
    ForwardGradient,
    Normal,
    SimulatedGradient,
)
from multitangent.aggregation import SumOfGuesses
from multitangent.engine import Derivatives, ForwardMode
from multitangent.gradient import DifferenceGradient
from multitangent.objective import LogitsLoss, Objective
from multitangent.tangents import (
    Residual,
)


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
