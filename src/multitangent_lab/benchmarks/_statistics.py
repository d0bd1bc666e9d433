"""How far batch statistics that are held constant along tangents are from the true gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from multitangent.engine import Backpropagation
from multitangent.tangents import Tangents
from multitangent_lab.benchmarks._case import Case, gradient_of, make_case, make_gradient
from multitangent_lab.config import BenchConfig

STEPS = (0, 10, 50)
_STATISTICS: tuple[Literal["frozen", "coupled"], ...] = ("frozen", "coupled")


def compare_statistics(config: BenchConfig) -> dict[str, Any]:
    """Cosines with backpropagation's gradient of what infinitely many tangents would give.

    With statistics held constant along tangents, as in a forward sweep, and for a check with
    statistics that are differentiated; for the initial network, and for the same after some steps
    of SGD with backpropagation on the batch (learning rate 0.01, momentum 0.9).

    Returns:
        ``cosine_frozen`` and ``cosine_coupled``, one value for each of ``steps``.
    """
    case = make_case(config)
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.01, momentum=0.9)
    cosines: dict[str, list[float]] = {"cosine_frozen": [], "cosine_coupled": []}
    for step in range(max(STEPS) + 1):
        optimizer.zero_grad()
        if step in STEPS:
            case.backpropagation()
            true = gradient_of(case)
            for statistics in _STATISTICS:
                gradient = _exact(config, case, statistics)
                cosine = gradient @ true / (gradient.norm() * true.norm())
                cosines[f"cosine_{statistics}"].append(round(float(cosine), 4))
            optimizer.zero_grad()
        case.backpropagation()
        optimizer.step()
    return {"steps": list(STEPS), **cosines}


def _exact(config: BenchConfig, case: Case, statistics: Literal["frozen", "coupled"]) -> Tensor:
    problem, batch, stream = make_gradient(config, case).prepare(case.x, case.y)
    tangents = Tangents(problem.source, stream)
    run = problem.perturbation(batch, stream, tangents)
    _, values = Backpropagation(statistics).gradients(run, tangents)
    gradients = run.pullback(values)
    return torch.cat([gradients[p].flatten() for p in case.model.parameters()]).double()
