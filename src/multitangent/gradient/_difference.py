"""The same gradient from differences of losses: for what has no derivative, or no memory for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor, nn

from multitangent.aggregation import Mean
from multitangent.engine import Engine, FiniteDifferences, Trial
from multitangent.gradient._estimator import GradientEstimator
from multitangent.gradient._step import Step
from multitangent.gradient._verify_differences import verify_differences
from multitangent.objective import Batch
from multitangent.perturbation import Weights
from multitangent.tangents import Normal, Stream


class DifferenceGradient(GradientEstimator):
    """Computes what `ForwardGradient` computes, from two-sided finite differences.

    For each of the K tangents v the model runs at ``w + e v`` and at ``w - e v``, and

        ``d = (l(w + e v) - l(w - e v)) / (2 e)``

    takes the place of the directional derivative, off by an error of order e^2. A step takes 2 K
    runs of the model, and one at w itself, which gives the loss that is returned. Arguments are
    those of `ForwardGradient` but for `compile`, and more. Tangents, guesses and aggregators are
    the same.

    With ``perturb="weights"`` nothing has to be differentiable: neither the model nor the loss,
    which may be an accuracy or a computation in NumPy. It may return one number per sample,
    ``[B]``, of which the mean is meant, or one number for the whole batch. No graph is recorded.
    The parameters are never written into: whenever the model reaches for one it is handed
    ``w + e v`` in its place, which is gone when the layer has run. With ``store_tangents=False``
    the runs so take the memory of inference. With ``perturb="activations"`` the same holds between
    the layers, and for the loss; inside a layer the local step needs the layer's own derivative.

    A difference sees the numbers that a model computes. Other than in backpropagation, a path
    through ``detach()`` or ``torch.no_grad()`` counts, and the forward of a
    ``torch.autograd.Function`` counts, not its backward.

    Args:
        epsilon: e, for tangents with entries of size 1; that of a guess is divided by the root mean
            square of its entries. By default `multitangent.engine.default_epsilon` of the type of
            the perturbed values: 1e-7 in float64, 1e-4 in float32, 1e-3 in half precision.
        statistics: ``"frozen"`` takes the statistics of batch normalisation in training mode from
            the run at w, as forward mode does; ``"coupled"``, for weights alone, takes those of
            every run itself, as backpropagation does.
        primal_run: Whether the model runs at w for the sake of the loss alone. With ``False`` that
            run is left out where dropout, batch normalisation and the like do not ask for it, from
            the second batch of a kind on. The loss that is returned is then the mean over all runs.
        micro_batch: How many samples run at a time; ``"auto"`` is the whole batch.
        verify: Differences need no comparison with backpropagation, which knows nothing of a loss
            without derivative. On a few samples it is seen whether two runs give the same losses,
            whether a step changes what modules keep as one run does, and, for activations, whether
            samples depend on each other; and the local steps are compared with backpropagation if
            the loss has a derivative. What differs is a `VerificationError`.

    Raises:
        ValueError: If an argument is out of range, or the model does not fit the perturbation.

    Examples:
        The number of samples that are classified wrong has no derivative, yet it can be trained
        on, with steps that are not too short:

        >>> import torch
        >>> from multitangent import Normal
        >>> from multitangent.gradient import DifferenceGradient
        >>> _ = torch.manual_seed(0)
        >>> model, x = nn.Linear(4, 2), torch.randn(256, 4)
        >>> y = (x[:, 0] > x[:, 1]).long()
        >>> gradient = DifferenceGradient(
        ...     model, lambda out, y: out.argmax(1) != y, Normal(8), perturb="weights", epsilon=0.1
        ... )
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> for step in range(40):
        ...     optimizer.zero_grad()
        ...     value = gradient(x, y)
        ...     optimizer.step()
        >>> bool(value < 0.05)
        True
    """

    def __init__(
        self,
        *args: Any,
        epsilon: float | None = None,
        statistics: Literal["frozen", "coupled"] = "frozen",
        primal_run: bool = True,
        **kwargs: Any,
    ) -> None:
        if epsilon is not None and not (isinstance(epsilon, (int, float)) and epsilon > 0):
            raise ValueError(f"`epsilon` should be above 0, or None. Found {epsilon!r}. Try 1e-3.")
        if statistics not in ("frozen", "coupled"):
            raise ValueError(f"`statistics` should be 'frozen' or 'coupled'. Found {statistics!r}.")
        self.epsilon = epsilon
        self.statistics = statistics
        self.primal_run = primal_run
        self._loss_is_trained = False  # as far as the steps so far have shown
        super().__init__(*args, **kwargs)
        if self.compile:
            raise ValueError(
                "`compile` should be False: finite differences run the model as it is. Found True. "
                "Try ForwardGradient."
            )
        if statistics == "coupled" and not isinstance(self.perturb, Weights):
            raise ValueError(
                "`statistics` should be 'frozen' unless weights are perturbed: coupled samples "
                "have no derivatives of their own. Found 'coupled'. Try `perturb='weights'`."
            )

    def _engine(self, trial: Trial) -> Engine:
        return FiniteDifferences(
            self.epsilon,
            trial.micro_batch,
            self.statistics,
            primal_run=self.primal_run or self._loss_is_trained,
            is_plain=trial.is_plain,
            starts_after=trial.writes,
            compares=trial.compares,
        )

    def _learned(self, result: Step) -> dict[nn.Parameter, Tensor]:
        own = set(map(id, self.model.parameters()))
        self._loss_is_trained |= any(id(parameter) not in own for parameter in result.gradients)
        return super()._learned(result)

    def _trial(self, batch: Batch, stream: Stream) -> Trial:
        is_new = self._kind not in self._trials
        trial = super()._trial(batch, stream)
        if is_new and self.micro_batch == "auto":  # no tangents are carried
            trial = self._trials[self._kind] = replace(trial, micro_batch=batch.size)
        return trial

    def _verified_trial(self, batch: Batch, stream: Stream, trial: Trial) -> Trial:
        whole = replace(trial, micro_batch=sys.maxsize, is_plain=False)  # few may be more
        problem = replace(self._problem(is_shared=False), engine=self._engine(whole))
        verify_differences(problem, self.perturb.bind, self._objective, batch, stream, trial)
        return trial

    def _options(self) -> str:
        shown = {"epsilon": None, "statistics": "frozen", "primal_run": True}
        return super()._options() + "".join(
            f", {name}={getattr(self, name)!r}"
            for name, default in shown.items()
            if getattr(self, name) != default
        )


def mezo(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    *,
    epsilon: float = 1e-3,
    seed: int = 0,
    **options: Any,
) -> DifferenceGradient:
    """MeZO: one normal tangent in the space of the weights, by finite differences.

    It is ``DifferenceGradient`` with K = 1, the mean as aggregator, tangents that are drawn again
    wherever they are needed, and two runs of the model a step where nothing asks for a third. Plain
    SGD with the same learning rate takes MeZO's own step (Malladi et al. 2023, arXiv:2305.17333).

    Args:
        model: Any module.
        loss: As for `DifferenceGradient`; it needs no derivative.
        epsilon: The length of the step to either side.
        seed: All random numbers are a function of it and of the count of the steps.
        options: Further arguments of `DifferenceGradient`.

    Examples:
        >>> import torch
        >>> from multitangent.gradient import mezo
        >>> _ = torch.manual_seed(0)
        >>> model, loss = nn.Linear(4, 2), nn.CrossEntropyLoss()
        >>> x = torch.randn(64, 4)
        >>> y = (x[:, 0] > 0).long()
        >>> gradient = mezo(model, loss)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> before = loss(model(x), y)
        >>> for step in range(100):
        ...     optimizer.zero_grad()
        ...     value = gradient(x, y)
        ...     optimizer.step()
        >>> bool(loss(model(x), y) < before / 2)
        True
    """
    settings: dict[str, Any] = {"store_tangents": False, "primal_run": False, **options}
    return DifferenceGradient(
        model, loss, Normal(1), Mean(), "weights", seed, epsilon=epsilon, **settings
    )
