"""The command `multitangent doctor`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from multitangent.diagnosis import Report, doctor
from multitangent.tangents import Normal
from multitangent_lab.checkup._case import make_case
from multitangent_lab.config import DoctorConfig


def run_doctor(config: DoctorConfig, *, json: bool) -> dict[str, Any]:
    """Looks at a model, and prints what it finds unless `json`."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if config.device == "auto" else config.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        case = make_case(config, device)
    report = doctor(
        case.model,
        (case.inputs, case.target),
        case.loss,
        perturb=config.perturb,
        tangents=Normal(config.num_tangents),
        fix=config.fix,
    )
    if not json:
        print(f"{config.model}, {config.perturb} perturbed")
        print(report)
    return {"model": config.model, "perturb": config.perturb} | as_json(report)


def as_json(report: Report) -> dict[str, Any]:
    """A report as values that JSON can hold."""
    expected = report.cost and asdict(report.cost.expected(report.num_tangents))
    return {
        "failed": not report.is_healthy,
        "functions": [asdict(finding) for finding in report.functions],
        "sites": dict(report.sites),
        "dimension": report.dimension,
        "expected": expected,
        "fault": report.fault,
        "notes": list(report.notes),
        "repairs": list(report.repairs),
    }
