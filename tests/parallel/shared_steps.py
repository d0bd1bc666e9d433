"""Steps that several processes share: what each of them runs, beside a single process."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from math import prod
from pathlib import Path
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from models_for_tests import build
from multitangent import (
    Activations,
    ControlVariate,
    Feedback,
    ForwardGradient,
    Mean,
    Normal,
    OwnValue,
    Projection,
    Rademacher,
    SimulatedGradient,
)
from multitangent.aggregation import SumOfGuesses, WhenLearning
from multitangent.gradient import DifferenceGradient
from multitangent.tangents import (
    Every,
    Homogeneous,
    LowRank,
    Orthogonal,
    Residual,
    RunningMean,
    ScaledByRMS,
    Sphere,
)

TIMEOUT = 60  # seconds, for every collective
STEPS = 4
OWN = Activations(share="sample", output="exact")
LOSS = nn.CrossEntropyLoss()
SUM = nn.CrossEntropyLoss(reduction="sum")
WEIGHTED = nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), ignore_index=1)


@dataclass(frozen=True)
class Case:
    """A gradient whose steps are compared."""

    tangents: Any
    aggregator: Any = field(default_factory=Projection)
    perturb: Any = "activations"
    model: str = "mlp"
    loss: Any = LOSS
    kind: Callable[..., Any] = ForwardGradient
    options: Mapping[str, Any] = field(default_factory=dict)


# What all ranks know alike, so that any source goes with it.
OF_TANGENTS = {
    "normal": Case(Normal(5)),
    "mean": Case(Normal(6), Mean()),
    "mixed": Case(Orthogonal(4) + Rademacher(3)),
    "sphere": Case(Sphere(4), Mean(), OWN),
    "per sample": Case(Normal(5), perturb=OWN),
    "micro-batches": Case(Normal(5), perturb=OWN, options={"micro_batch": 2}),
    "drawn again": Case(Normal(5), perturb=OWN, options={"store_tangents": False}),
    "dropout": Case(Normal(4), model="dropout"),
    "informed": Case(
        ScaledByRMS(Normal(3)) + Feedback(3) + OwnValue(), ControlVariate(), OWN, loss=WEIGHTED
    ),
    "direct": Case(
        Every(2, Normal(4) + Homogeneous(Feedback())), WhenLearning(ControlVariate()), OWN
    ),
    "residual": Case(Residual(), SumOfGuesses(), Activations(output="exact"), "residual"),
    "weights": Case(Normal(5), perturb="weights"),
    "weights drawn again": Case(Normal(5), perturb="weights", options={"store_tangents": False}),
    "low rank": Case(LowRank(4) + RunningMean(), perturb="weights"),
    "counted": Case(Normal(3) + Rademacher(3), perturb=OWN, options={"generator": "philox"}),
    "simulated": Case(Normal(5), perturb=OWN, kind=SimulatedGradient),
    "differences": Case(Normal(5), perturb="weights", kind=DifferenceGradient),
}
OF_DATA = {
    "normal": Case(Normal(5)),
    "sum": Case(Normal(5), Mean(), loss=SUM),
    "weighted": Case(Normal(5), loss=WEIGHTED),
    "per sample": Case(Normal(5), perturb=OWN),
    "micro-batches": Case(Normal(5), perturb=OWN, options={"micro_batch": 2}),
    "dropout": Case(Normal(4), model="dropout"),
    "dropout in parts": Case(Normal(4), model="dropout", options={"micro_batch": 2}),
    "dropout of the exact output": Case(Normal(4), perturb=OWN, model="dropout"),
    "residual": Case(Residual(), SumOfGuesses(), Activations(output="exact"), "residual"),
    "weights": Case(Normal(5), perturb="weights"),
    "weights and sum": Case(Normal(5), perturb="weights", loss=SUM),
    "weights and weighted": Case(Normal(5), perturb="weights", loss=WEIGHTED),
    "weights drawn again": Case(Normal(5), perturb="weights", options={"store_tangents": False}),
    "weights and dropout": Case(Rademacher(5), perturb="weights", model="dropout"),
    "low rank": Case(LowRank(4) + RunningMean(), perturb="weights"),
    "counted": Case(
        Normal(3) + Rademacher(3), perturb=OWN, model="dropout", options={"generator": "philox"}
    ),
    "simulated": Case(Normal(5), kind=SimulatedGradient),
    "differences": Case(Normal(5), perturb="weights", kind=DifferenceGradient),
}


def trained(case: Case, mesh: Any = None, rows: slice = slice(None)) -> list[Tensor]:
    """The losses and gradients of some steps of gradient descent."""
    model, x, y, _ = build(case.model)
    torch.manual_seed(3)
    x, y = torch.cat([x, x.flip(0) + 0.5]), torch.cat([y, y.roll(1)])
    model = copy.deepcopy(model)
    gradient = case.kind(
        model, copy.deepcopy(case.loss), case.tangents, case.aggregator, case.perturb,
        seed=7, mesh=mesh, **case.options,
    )  # fmt: skip
    found = []
    for _ in range(STEPS):
        model.zero_grad()
        found.append(gradient(x[rows], y[rows]))
        found += [p.grad.clone() for p in model.parameters()]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    return found


def rows_of(count: int, rank: int) -> slice:
    """Samples of one rank, of twelve: as unequal as they can be."""
    bounds = {1: [0, 12], 2: [0, 5, 12], 4: [0, 2, 5, 6, 12]}[count]
    return slice(bounds[rank], bounds[rank + 1])


def run_rank(rank: int, shape: Mapping[str, int], folder: Path) -> None:
    """What one process does: all cases of the axes that the mesh has."""
    mesh = began(rank, shape, folder)
    warnings.filterwarnings("error", message="micro_batch=.* splits what belongs together")
    splits = "data" in shape
    rows = rows_of(shape["data"], mesh.get_local_rank("data")) if splits else slice(None)
    found: dict[str, Any] = {}
    for name, case in (OF_DATA if splits else OF_TANGENTS).items():
        try:
            found[name] = trained(case, mesh, rows)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            break  # other ranks wait for this one, and then end too
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_ranks(shape: Mapping[str, int], folder: Path, target: Any = run_rank) -> list[Any]:
    """What the processes of a mesh found, by rank."""
    count = prod(shape.values())
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=target, args=(r, shape, folder)) for r in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(4 * TIMEOUT)
        if process.is_alive():
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def began(rank: int, shape: Mapping[str, int], folder: Path, seconds: float = TIMEOUT) -> Any:
    """The mesh of a process that has joined the others."""
    torch.set_num_threads(1)
    count = prod(shape.values())
    store = dist.FileStore(str(folder / "store"), count)
    timeout = timedelta(seconds=seconds)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=timeout)
    return init_device_mesh("cpu", tuple(shape.values()), mesh_dim_names=tuple(shape))


def run_with_faults(rank: int, shape: Mapping[str, int], folder: Path) -> None:
    """The errors of a process with faults, each in a run of its own."""
    mesh = began(rank, shape, folder)
    model, x, y, _ = build("mlp")
    other, *_ = build("mlp")
    if rank == 1:
        next(other.parameters()).data[0, 0] += 1e-12
    found = {
        "seed": error_of(
            lambda: ForwardGradient(model, LOSS, Normal(4), seed=rank, mesh=mesh)(x, y)
        ),
        "parameters": error_of(lambda: ForwardGradient(other, LOSS, Normal(4), mesh=mesh)(x, y)),
        "few tangents": error_of(lambda: ForwardGradient(model, LOSS, Normal(1), mesh=mesh)(x, y)),
        "none": error_of(lambda: ForwardGradient(model, LOSS, Normal(2), mesh=mesh)(x, y)),
    }
    gradient = ForwardGradient(model, LOSS, Normal(2), mesh=mesh)
    for gradient.step in (0, 99):
        gradient(x, y)
    if rank == 1:
        next(model.parameters()).data[0, 0] += 1e-12
    found["drift"] = error_of(lambda: gradient(x, y))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run_until_one_dies(rank: int, shape: Mapping[str, int], folder: Path) -> None:
    """What the others meet when rank 1 is gone, and how long that takes."""
    mesh = began(rank, shape, folder, seconds=10)
    model, x, y, _ = build("mlp")
    gradient = ForwardGradient(model, LOSS, Normal(4), mesh=mesh)
    gradient(x, y)
    torch.save({}, folder / f"{rank}.pt")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = monotonic()
    error = error_of(lambda: [gradient(x, y) for _ in range(100)])
    torch.save({"error": error, "seconds": monotonic() - start}, folder / f"{rank}.pt")


def error_of(call: Callable[[], object]) -> str:
    """The name and the message of an exception, empty if there is none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
