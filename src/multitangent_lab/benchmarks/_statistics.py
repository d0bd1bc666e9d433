"""How far batch statistics that are held constant along tangents are from the true gradient."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from multitangent._batch import whole
from multitangent.perturbation import ActivationSweep
from multitangent_lab.benchmarks._case import Case, gradient_of, make_case, make_gradient
from multitangent_lab.benchmarks.config import BenchConfig

STEPS = (0, 10, 50)


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
            for name, statistics in (("frozen", "hold"), ("coupled", "couple")):
                found = _exact(config, case, statistics)  # type: ignore[arg-type]
                cosine = found @ true / (found.norm() * true.norm())
                cosines[f"cosine_{name}"].append(round(float(cosine), 4))
            optimizer.zero_grad()
        case.backpropagation()
        optimizer.step()
    return {"steps": list(STEPS), **cosines}


def _exact(config: BenchConfig, case: Case, statistics: Literal["hold", "couple"]) -> Tensor:
    case.model.zero_grad()
    estimator = make_gradient(config, case)
    batch = whole(case.x, case.y)
    sweep = estimator._sweep(estimator._setting(batch), batch)
    assert isinstance(sweep, ActivationSweep)
    sweep.pull_exact(statistics)
    return gradient_of(case)
