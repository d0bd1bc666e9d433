"""Table I: ResNet18 and a vision transformer on MNIST and CIFAR-10 (Section IV-E)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from multitangent_lab._files import write_csv, write_text
from multitangent_lab._looks import GRADIENTS, label
from multitangent_lab.experiments._experiment import Claim, Experiment
from multitangent_lab.experiments._store import Row
from multitangent_lab.experiments._training import (
    MOST_TELLING,
    Training,
    mean_test_errors,
    results,
    run,
    training,
)

_BATCH = {"mnist": 64, "cifar10": 128}

_Model = Literal["resnet18", "vit"]
_Data = Literal["mnist", "cifar10"]

# Best test errors in per cent, Table I of arXiv:2410.17764v2, in the order of `GRADIENTS`.
_PAPER: Mapping[tuple[_Model, _Data], Sequence[float]] = {
    ("resnet18", "mnist"): (0.48, 4.13, 4.32, 2.98, 1.86, 3.33, 3.14, 1.84),
    ("resnet18", "cifar10"): (25.79, 63.63, 60.77, 55.87, 49.35, 58.14, 55.24, 47.24),
    ("vit", "mnist"): (2.39, 60.53, 50.73, 44.57, 36.06, 49.11, 44.08, 42.60),
    ("vit", "cifar10"): (40.29, 71.10, 69.49, 66.98, 63.68, 68.12, 65.72, 61.07),
}


def cells(quick: bool, simulated: bool) -> list[Training]:
    """One seed of everything first, of that backpropagation and K = 16; then the other seeds."""
    if quick:
        models: tuple[_Model, ...] = ("resnet18", "vit")
        return [
            training(model, "digits", gradient, count, 0, epochs=1, simulated=simulated)
            for model in models
            for gradient, count in MOST_TELLING
            if count <= 4
        ]
    order = [(MOST_TELLING[:3], 0), (MOST_TELLING[3:], 0), (MOST_TELLING, 1), (MOST_TELLING, 2)]
    return [
        training(
            model, dataset, gradient, count, seed,
            batch_size=_BATCH[dataset], simulated=simulated,
        )
        for gradients, seed in order
        for gradient, count in gradients
        for model, dataset in _PAPER
    ]  # fmt: skip


def draw(rows: list[Row], folder: Path) -> None:
    """The table, ours beside the paper's; what was not run says so."""
    write_csv(folder / "results.csv", results(rows))
    errors = mean_test_errors(rows, "model", "dataset")
    names = list(dict.fromkeys((*_PAPER, *(key[:2] for key in errors))))
    head = ["gradient", *(f"{model}, {dataset}: here, paper" for model, dataset in names)]
    lines = [head, ["---"] * len(head)]
    for place, gradient in enumerate(GRADIENTS):
        here = [_shown(rows, errors, (*name, *gradient)) for name in names]
        paper = [f"{_PAPER[name][place]:.2f}" if name in _PAPER else "-" for name in names]
        both = (", ".join(pair) for pair in zip(here, paper, strict=True))
        lines.append([label(*gradient), *both])
    simulated = any(row["simulated"] for row in rows)
    how = "simulated with backpropagation" if simulated else "in real forward mode"
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    epochs = max(row["epochs"] for row in rows)
    intro = (
        f"Test error in %, {how}, after at most {epochs} epoch{'s' if epochs > 1 else ''}, at the "
        "one of\nthe best validation loss; mean over as many seeds as the brackets say. The paper "
        "gives the best\ntest error within 200 epochs.\n\n"
    )
    write_text(folder / "table1.md", intro + text + "\n")


def _shown(rows: list[Row], errors: dict[tuple[Any, ...], float], key: tuple[Any, ...]) -> str:
    if key not in errors:
        return "not run"
    names = ("model", "dataset", "gradient", "num_tangents")
    runs = [row for row in results(rows) if tuple(row[name] for name in names) == key]
    diverged = sum(row["diverged"] for row in runs)
    return f"{errors[key]:.2f} ({len(runs)}{f', {diverged} diverged' if diverged else ''})"


def claims(rows: list[Row]) -> list[Claim]:
    """What the paper says about Table I, of every column that is complete."""
    errors = mean_test_errors(rows, "model", "dataset")
    found: list[Claim] = []
    for name in _PAPER:
        here = {key[2:]: error for key, error in errors.items() if key[:2] == name}
        where = " on ".join(name)
        statements = (
            f"{where}: more tangents reduce the test error",
            f"{where}: of the forward gradients one with K = 16 is best",
            f"{where}: a significant gap to the true gradient remains",
        )
        if len(here) < len(GRADIENTS):
            found += [Claim("IV-E", statement, None, "") for statement in statements]
        else:
            judged = zip(statements, _judged(here), strict=True)
            found += [Claim("IV-E", statement, *verdict) for statement, verdict in judged]
    return found


def _judged(here: dict[tuple[Any, ...], float]) -> list[tuple[bool, str]]:
    """Of one complete column; a significant gap is more than half of the true gradient's error."""
    steps = {
        (name, k): here[name, k] - (here[name, fewer] if fewer > 1 else here["single", 1])
        for name in ("mean", "projection")
        for fewer, k in ((1, 2), (2, 4), (4, 16))
    }
    worse = [f"{name} {k}: {change:+.2f}" for (name, k), change in steps.items() if change >= 0]
    exact = here["backpropagation", 1]
    forward = {key: error for key, error in here.items() if key[0] != "backpropagation"}
    best = min(forward, key=lambda key: forward[key])
    gap = forward[best] - exact
    return [
        (not worse, f"{len(steps) - len(worse)} of {len(steps)} steps of K; not {worse}"),
        (best[1] == 16, f"best: {label(*best)}, {forward[best]:.2f} %"),
        (gap > 0.5 * exact, f"{gap:.2f} points above {exact:.2f} %"),
    ]


EXPERIMENT = Experiment(
    title="Table I: ResNet18 and vision transformer",
    cells=cells,
    run=run,
    draw=draw,
    claims=claims,
)
