"""What a learning rate is judged by: descent on a function, or a training run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import optuna
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from multitangent import Projection
from multitangent.tangents import RunningMean
from multitangent_lab.config import SearchConfig
from multitangent_lab.functions import FUNCTIONS, Estimate, TrueGradient, descend
from multitangent_lab.training import AGGREGATORS, SOURCES, NonFiniteLoss, train

# From a trial with its learning rate to the value that is to be small.
Objective = Callable[[optuna.trial.Trial, float], float]


def build_objective(config: SearchConfig) -> Objective:
    """Returns the objective that a search minimises."""
    if config.function is not None:
        return lambda trial, rate: function_values(config, [rate])[0]
    folder = Path(config.run_dir or ".")
    return lambda trial, rate: _train(
        config, trial, rate, folder / "trials" / f"{config.hash[:6]}-{trial.number}"
    )


def function_values(config: SearchConfig, rates: list[float]) -> list[float]:
    """The mean over the seeds of the least values reached, for all rates in one run.

    Infinite where no step led down.
    """
    assert config.function is not None
    function = FUNCTIONS[config.function]
    random, count = SOURCES[config.tangents], config.num_tangents
    gradient: TrueGradient | Estimate
    if config.gradient == "backpropagation":
        gradient = TrueGradient()
    elif config.gradient == "previous":
        gradient = Estimate(random(count - 1) + RunningMean(), Projection())
    else:
        source = random(1 if config.gradient == "single" else count)
        gradient = Estimate(source, AGGREGATORS[config.gradient])
    descent = descend(
        function,
        config.dimension,
        gradient,
        torch.tensor(rates, dtype=torch.float64),
        seeds=config.seeds,
        steps=config.steps,
    )
    values = torch.where((descent.best_step > 0).any(1), descent.best.mean(1), torch.inf)
    return values.tolist()


def _train(config: SearchConfig, trial: optuna.trial.Trial, rate: float, folder: Path) -> float:
    """The least validation loss of a run; a hopeless or diverging run is pruned."""
    try:
        result = train(config.train_config(rate, folder), [_Pruning(trial)])
    except NonFiniteLoss as error:
        trial.set_user_attr("diverged", True)
        raise optuna.TrialPruned(str(error)) from error
    return result.validation_loss


class _Pruning(Callback):
    """Reports the validation loss of every epoch, and ends a run that has no prospects."""

    def __init__(self, trial: optuna.trial.Trial) -> None:
        self._trial = trial

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics["validation_loss"].item()
        self._trial.report(loss, trainer.current_epoch + 1)
        if self._trial.should_prune():
            raise optuna.TrialPruned(f"after epoch {trainer.current_epoch + 1}")
