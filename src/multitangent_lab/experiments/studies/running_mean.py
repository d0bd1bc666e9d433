"""Earlier gradients among the tangents of descent on figure 4's functions, at equal K.

Run as ``python -m multitangent_lab.experiments.studies.running_mean FOLDER``.

Every case is stored as it ends, and not run again; any number of processes can share a folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch

from multitangent_lab._files import write_csv
from multitangent_lab.experiments._descents import Descent, descents
from multitangent_lab.experiments._store import Row, Store
from multitangent_lab.functions import FUNCTIONS

GRADIENTS = ("projection", "previous", "running mean")  # the first without guesses
COUNTS = (2, 4, 16)
STEPS = {"sphere": None, "styblinski-tang": None, "rosenbrock": 5000}
DIMENSIONS = (16, 64, 256)


def cells() -> Iterator[Descent]:
    """Every function, dimension, K and gradient."""
    for function, steps in STEPS.items():
        for dimension in DIMENSIONS:
            for count in COUNTS:
                for gradient in GRADIENTS:
                    yield Descent(function, dimension, gradient, count, per_decade=4, steps=steps)


def left(rows: Sequence[Row]) -> Row:
    """What a case leaves of the gap between the start and the minimum, as the mean of its seeds."""
    first = rows[0]
    function, n = FUNCTIONS[first["function"]], first["dimension"]
    initial, minimum = float(function(function.start_point(n))), n * function.minimum
    names = ("function", "dimension", "num_tangents", "gradient", "learning_rate")
    shares = [(row["value"] - minimum) / (initial - minimum) for row in rows]
    return {name: first[name] for name in names} | {
        "left": float(f"{fmean(shares):.4g}"),
        "least": float(f"{min(shares):.4g}"),
        "most": float(f"{max(shares):.4g}"),
    }


def main(folder: Path) -> None:
    """Run what is missing; then write the table."""
    torch.set_num_threads(1)
    store = Store(folder)
    wanted = list(cells())
    store.work(wanted, lambda cell: descents(cell, {}))
    found = [rows for cell in wanted if (rows := store.rows([cell]))]
    write_csv(folder / "functions.csv", [left(rows) for rows in found])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    main(parser.parse_args().folder)
