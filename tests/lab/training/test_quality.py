"""The quality of gradients over the epochs, with bias and noise told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure

from multitangent_lab.training import CompareConfig, compare
from multitangent_lab.training._draw_quality import draw_quality

SMALL = CompareConfig(
    width=8, num_tangents=4, epochs=2, batch_size=256, device="cpu", gradients=("mean", "residual")
)
STORED = Path(__file__).parents[3] / "results" / "studies" / "guesses" / "quality"


@pytest.fixture
def panels(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The labels of the rows of panels of the pictures that a test draws."""
    labels: list[str] = []

    def note(figure: Figure, *_: object) -> None:
        labels.extend(axes.get_ylabel() for axes in figure.axes if axes.get_ylabel())

    monkeypatch.setattr(Figure, "savefig", note)
    return labels


def test_the_mean_of_several_estimates(tmp_path: Path) -> None:
    compare(replace(SMALL, run_dir=tmp_path, estimates=30))
    table = pd.read_csv(tmp_path / "mean-4" / "quality.csv")
    first = table[table["epoch"] == 1].set_index(["quantity", "place"])["value"]
    assert first["estimates", "all"] == 30
    assert first["cosine", "all"] < first["cosine_of_mean", "all"] <= first["limit", "all"] <= 1
    assert set(first["cosine_of_mean"].index) == {"all", "1", "3", "5"}
    guessed = pd.read_csv(tmp_path / "residual" / "quality.csv")
    first = guessed[guessed["epoch"] == 1].set_index(["quantity", "place"])["value"]
    assert first["estimates", "all"] == 1
    assert first["limit", "all"] == first["cosine", "all"]


def test_one_estimate_is_recorded_as_it_always_was(tmp_path: Path) -> None:
    compare(replace(SMALL, run_dir=tmp_path, gradients=("mean",), estimates=1))
    table = pd.read_csv(tmp_path / "mean-4" / "quality.csv")
    assert list(table.columns) == ["epoch", "quantity", "place", "value"]
    assert list(table["quantity"].unique()) == ["cosine", "captured"]


def test_the_picture_has_a_row_for_every_quantity(tmp_path: Path, panels: list[str]) -> None:
    rows = [
        {"epoch": 1, "quantity": quantity, "place": place, "value": value}
        for quantity in ("cosine", "cosine_of_mean", "limit", "captured")
        for place, value in (("1", -0.3), ("all", 0.5))
    ]
    rows.append({"epoch": 1, "quantity": "estimates", "place": "all", "value": 8})
    without_limit = [row for row in rows if row["quantity"] != "limit"]
    draw_quality({"a": pd.DataFrame(rows), "b": pd.DataFrame(without_limit)}, tmp_path / "q.png")
    assert panels == [
        "Cosine with the true gradient",
        "The same of the mean of 8 estimates",
        "What that levels off at",
        "Share of its squared length captured",
    ]


def test_records_of_one_estimate_are_still_drawn(tmp_path: Path, panels: list[str]) -> None:
    stored = {path.parent.name: pd.read_csv(path) for path in STORED.glob("*/quality.csv")}
    assert len(stored) == 5
    draw_quality(stored, tmp_path / "q.png")
    assert panels == ["Cosine with the true gradient", "Share of its squared length captured"]
