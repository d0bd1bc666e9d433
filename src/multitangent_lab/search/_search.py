"""A search that any number of workers share and that goes on after an interruption."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import inf, isfinite, log10
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.trial import FrozenTrial, TrialState

from multitangent_lab._files import write_text
from multitangent_lab.config import SearchConfig
from multitangent_lab.search._objectives import Objective, build_objective, function_values
from multitangent_lab.search._plot import draw_trials
from multitangent_lab.training import ConfigError, to_toml

_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
_BEAT = 10  # seconds between the signs of life of a worker
_GRACE = 60  # seconds without one after which its trial is given up
_RATE = "learning_rate"
# What databases say of a table, or a row in it, that another worker has just made.
_MADE_BY_ANOTHER = ("already exists", "UNIQUE constraint", "duplicate key", "Duplicate entry")


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The outcome of a search.

    Args:
        run_dir: The folder with `trials.csv`, `trials.png`, `result.json`, which holds these
            fields, and for training runs `preset.toml`.
        learning_rate: The best one.
        value: Its validation loss, or the function's value.
        trials: How many trials have ended.
        pruned: How many of them were given up early.
    """

    run_dir: Path
    learning_rate: float
    value: float
    trials: int
    pruned: int

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as JSON values."""
        return vars(self) | {"run_dir": str(self.run_dir)}


def search(
    config: SearchConfig, progress: Callable[[int, float, float], None] = lambda *_: None
) -> SearchResult:
    """Searches the learning rate, on a logarithmic scale, that makes the objective least.

    The objective is the least validation loss of a training run, or the value that descent on a
    function reaches, as a mean over seeds. Runs without prospects are pruned.

    Args:
        config: What to search and how.
        progress: Called with the number of trials that have ended, the best rate and its value.

    Returns:
        The result over all workers' trials, which is stored in the run's folder as well.

    Raises:
        ConfigError: The storage can not be reached, or no trial was finite.

    Examples:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     config = SearchConfig(
        ...         function="sphere", dimension=4, low=0.05, high=5.0, trials=5, sampler="grid",
        ...         steps=30, run_dir=folder,
        ...     )
        ...     result = search(config)
        >>> round(result.learning_rate, 3), result.trials
        (0.5, 5)
    """
    config = config.resolved()
    folder = Path(config.run_dir or ".")
    folder.mkdir(parents=True, exist_ok=True)
    study = _study(config, folder)
    if config.function is not None and config.sampler == "grid":
        _try_grid(config, study)
    else:
        _work(config, study, build_objective(config), progress)
    return _finished(config, study, folder)


def grid(low: float, high: float, count: int) -> list[float]:
    """Rates at equal distances on a logarithmic scale.

    Examples:
        >>> grid(0.01, 1.0, 3)
        [0.01, 0.1, 1.0]
    """
    if count == 1:
        return [(low * high) ** 0.5]
    first, last = log10(low), log10(high)
    rates = (10 ** (first + (last - first) * i / (count - 1)) for i in range(count))
    return [min(max(rate, low), high) for rate in rates]


def _study(config: SearchConfig, folder: Path) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # A URI, in a URL: a path may hold what is special there, such as % or ?.
    file = quote(quote(str(folder.resolve() / "study.db")))
    url = config.storage or f"sqlite:///file:{file}?uri=true"
    try:
        with _known_warnings():
            storage = _storage(url)
        return optuna.create_study(
            storage=storage,
            study_name=f"{config.label}-{config.hash}",
            direction="minimize",
            pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
            load_if_exists=True,
        )
    except Exception as error:  # whatever the driver of the database raises
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"`storage` should be the URL of a database that can be reached. Found {url!r}: "
            f"{reason}. Try without, for a file in the run's folder."
        ) from error


def _storage(url: str, attempts: int = 20) -> optuna.storages.RDBStorage:
    """The storage; workers that begin at the same time make its tables once."""
    try:
        return optuna.storages.RDBStorage(url, heartbeat_interval=_BEAT, grace_period=_GRACE)
    except Exception as error:
        made_by_another = any(sign in str(error) for sign in _MADE_BY_ANOTHER)
        if attempts == 1 or not made_by_another:
            raise
    time.sleep(0.1)
    return _storage(url, attempts - 1)


@contextmanager
def _known_warnings() -> Iterator[None]:
    """Signs of life of a worker are an experimental part of Optuna."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def _sampler(config: SearchConfig, number: int) -> optuna.samplers.BaseSampler:
    """One for the trial of that number: no two workers have the same."""
    seed = 1_000_003 * config.seed + number
    if config.sampler == "tpe":
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    if config.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, deterministic_objective=False)
    return optuna.samplers.RandomSampler(seed=seed)


def _work(
    config: SearchConfig,
    study: optuna.Study,
    objective: Objective,
    progress: Callable[[int, float, float], None],
) -> None:
    """Run trials until enough have ended, waiting for those that other workers run."""

    def one(trial: optuna.trial.Trial) -> float:
        study.sampler = _sampler(config, trial.number)
        return objective(trial, trial.suggest_float(_RATE, config.low, config.high, log=True))

    while True:
        _give_up_stale(study)
        trials = study.get_trials(deepcopy=False)
        ended = [trial for trial in trials if trial.state in _ENDED]
        rate, value = _best(ended)
        progress(len(ended), rate, value)
        if len(ended) >= config.trials:
            return
        running = sum(trial.state == TrialState.RUNNING for trial in trials)
        if len(ended) + running >= config.trials:
            time.sleep(1)
            continue
        study.sampler = _sampler(config, len(trials))
        if config.sampler == "grid":
            rates = [t.params.get(_RATE) for t in trials if t.state != TrialState.FAIL]
            left = [r for r in grid(config.low, config.high, config.trials) if r not in rates]
            if left:  # others may be at work on the same
                study.enqueue_trial({_RATE: left[running % len(left)]})
        study.optimize(one, n_trials=1, catch=())


def _give_up_stale(study: optuna.Study) -> None:
    """End the trials of workers that were killed."""
    with _known_warnings():
        optuna.storages.fail_stale_trials(study)
    # Without even a first sign of life, which comes before the choice of a rate.
    latest = datetime.now() - timedelta(seconds=_GRACE)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if not trial.params and trial.datetime_start and trial.datetime_start < latest:
            study.tell(trial.number, state=TrialState.FAIL)


def _try_grid(config: SearchConfig, study: optuna.Study) -> None:
    """All rates in one vectorised run, stored as trials."""
    rates = grid(config.low, config.high, config.trials)
    old_rates = {t.params[_RATE] for t in study.get_trials(deepcopy=False) if t.state in _ENDED}
    rates = [rate for rate in rates if rate not in old_rates]
    if not rates:
        return
    scale = optuna.distributions.FloatDistribution(config.low, config.high, log=True)
    for rate, value in zip(rates, function_values(config, rates), strict=True):
        study.add_trial(
            optuna.trial.create_trial(
                params={_RATE: rate},
                distributions={_RATE: scale},
                value=value,
            )
        )


def _best(ended: list[FrozenTrial]) -> tuple[float, float]:
    """The rate of the least value, and that; pruned trials do not take part."""
    pairs = [(t.value, t.params[_RATE]) for t in ended if t.value is not None]
    value, rate = min((pair for pair in pairs if isfinite(pair[0])), default=(inf, inf))
    return rate, value


def _finished(config: SearchConfig, study: optuna.Study, folder: Path) -> SearchResult:
    ended = [trial for trial in study.get_trials(deepcopy=False) if trial.state in _ENDED]
    rate, value = _best(ended)
    if not isfinite(value):
        raise ConfigError(
            "`high` should allow for a learning rate that does not diverge. Found no finite loss "
            f"in {len(ended)} trials between {config.low} and {config.high}. Try a lower --high "
            "and a lower --low, and another --run-dir."
        )
    result = SearchResult(
        run_dir=folder,
        learning_rate=rate,
        value=value,
        trials=len(ended),
        pruned=sum(trial.state == TrialState.PRUNED for trial in ended),
    )
    rows = sorted((t.params[_RATE], t.value, t.state.name.lower(), t.number) for t in ended)
    lines = [f"{n},{r!r},{'' if v is None else repr(v)},{s}" for r, v, s, n in rows]
    write_text(
        folder / "trials.csv", "\n".join(["number,learning_rate,value,state", *lines]) + "\n"
    )
    what = "Validation loss" if config.function is None else "Value reached"
    draw_trials(rows, folder / "trials.png", config.label, what)
    write_text(folder / "result.json", json.dumps(result.as_json(), indent=2) + "\n")
    if config.function is None:
        preset = config.train_config(rate, None)
        write_text(folder / "preset.toml", to_toml(preset, without=("run_dir", "data_dir")))
    return result
