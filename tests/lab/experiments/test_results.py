"""What the documentation says about the paper is what is stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from multitangent_lab.experiments import experiment_of

ROOT = Path(__file__).parents[3]
FIGURES = ("fig3", "fig4", "fig5", "fig6")  # of which something has been run


@pytest.mark.parametrize("figure", FIGURES)
def test_the_documentation_has_every_verdict(figure):
    claims = ROOT / "results" / "paper" / figure / "claims.md"
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    lines = [line for line in claims.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    assert len(lines) > 4
    assert [line for line in lines if line not in page] == []


@pytest.mark.parametrize("figure", FIGURES)
def test_stored_cells_are_those_of_the_experiment(figure):
    folder = ROOT / "results" / "paper" / figure
    cells = experiment_of(figure).cells(False, False)
    lines = (folder / "cells.jsonl").read_text(encoding="utf-8").splitlines()
    stored = {record["key"]: record for record in map(json.loads, lines)}
    ran = [cell for cell in cells if cell.key in stored]
    summary = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert (len(ran), len(cells)) == (summary["cells_run"], summary["cells"])
    assert all("/" not in record["command"].replace("results/", "") for record in stored.values())
