"""The cells of an experiment, run by one process or several."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from math import inf
from time import monotonic

import torch

from multitangent_lab._allocator import keep_freed_memory
from multitangent_lab.config import NETWORKS, STUDIES, ReproduceConfig
from multitangent_lab.experiments._experiment import Context, Experiment
from multitangent_lab.experiments._store import Cell, OutOfTimeError, Row, Store
from multitangent_lab.experiments._training import shortened
from multitangent_lab.training import ConfigError


def experiment_of(name: str) -> Experiment:
    """The experiment of that name."""
    folder = "studies" if name in STUDIES else "paper"
    module = import_module(f"multitangent_lab.experiments.{folder}.{_FILES.get(name, name)}")
    experiment: Experiment = getattr(module, _VALUES.get(name, "EXPERIMENT"))
    return experiment


_FILES = {name: name.replace("-", "_") for name in STUDIES} | {"guesses-full": "guesses"}
_VALUES = {"guesses-full": "FULL"}


def cells_of(config: ReproduceConfig, figure: str) -> Sequence[Cell]:
    """The cells of an experiment that are known from the start, the most wanted first."""
    cells = experiment_of(figure).cells(config.quick, config.simulated)
    return cells if config.epochs is None else shortened(cells, config.epochs)


def run_cells(
    config: ReproduceConfig, figure: str, deadline: float | None, progress: Callable[[int], None]
) -> None:
    """Runs what is missing of one experiment, with as many processes as the configuration says.

    Args:
        config: What to reproduce and how.
        figure: The experiment.
        deadline: When to stop, on the clock of `time.monotonic`.
        progress: Called with the number of cells that have ended.

    Raises:
        ConfigError: A process has failed; what it had finished is kept.
    """
    left = None if deadline is None else deadline - monotonic()
    context = multiprocessing.get_context("spawn")
    others = [
        context.Process(target=_child, args=(config, figure, left, os.getpid()), daemon=True)
        for _ in range(_workers(config, figure) - 1)
    ]
    for process in others:
        process.start()
    threads = torch.get_num_threads()
    try:
        _work(config, figure, _after(left), progress)
    except BaseException:
        for process in others:
            process.terminate()
        raise
    finally:
        torch.set_num_threads(threads)
        for process in others:
            process.join()
    if any(process.exitcode for process in others):
        raise ConfigError(
            f"`workers` should all end well. Found that one of {len(others) + 1} has failed: see "
            "above. Try --workers 1."
        )


def _after(left: float | None) -> Callable[[], bool]:
    """Whether so many seconds have passed."""
    deadline = inf if left is None else monotonic() + left
    return lambda: monotonic() > deadline


def _child(config: ReproduceConfig, figure: str, left: float | None, parent: int) -> None:
    """One of several processes: stops in time, and when the first of them is gone."""
    late = _after(left)
    _work(config, figure, lambda: late() or os.getppid() != parent)


def _work(
    config: ReproduceConfig,
    figure: str,
    late: Callable[[], bool],
    progress: Callable[[int], None] = lambda ended: None,
) -> None:
    """What one process does."""
    if _on_cpu(config, figure):
        torch.set_num_threads(1)  # small tensors; and sums do not depend on the machine's cores
        keep_freed_memory()
    experiment, cells = experiment_of(figure), cells_of(config, figure)
    store = Store(config.folder(figure))
    context = Context(store, config.data_dir, config.device, late)

    def run(cell: Cell) -> list[Row]:
        if late():
            raise OutOfTimeError
        return experiment.run(cell, context)

    def show() -> None:
        records = store.records()
        progress(sum(cell.key in records for cell in cells))

    def wanted() -> Iterator[Cell]:
        for cell in cells:
            show()
            yield cell

    with suppress(OutOfTimeError):
        store.work(wanted(), run)
        store.work(experiment.further(store), run)
    show()


def _workers(config: ReproduceConfig, figure: str) -> int:
    if config.workers is not None:
        return config.workers
    if figure in _TIMED:
        return 1
    return _cores() if _on_cpu(config, figure) and not config.quick else 1


def _cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _on_cpu(config: ReproduceConfig, figure: str) -> bool:
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    return not (on_gpu and figure in (*NETWORKS, *_TIMED, "guesses", "guesses-full"))


_TIMED = ("time-to-accuracy",)  # parallel processes would slow each other down
