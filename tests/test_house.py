"""The structure of the code: who may know whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"

# From top to bottom: a room imports from rooms below it. Rooms of one row know nothing of each
# other. What lies in a package's own folder is below all of its rooms.
ROOMS = {
    "multitangent": [
        ["learning_rate", "diagnosis"],
        ["gradient"],
        ["parallel"],
        ["engine"],
        ["perturbation"],
        ["objective"],
        ["tangents"],
        ["dual", "aggregation"],
    ],
    "multitangent_lab": [
        ["cli"],
        ["experiments"],
        ["search", "benchmarks", "fuzz", "checkup"],
        ["training"],
        ["functions", "models", "data"],
        ["config"],
    ],
}


def module_of(path: Path) -> str:
    """The dotted name of a file."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(SOURCE.rglob("*.py"))}


def imports_of(path: Path) -> Iterator[tuple[str, str]]:
    """Modules of this project that a file imports from anywhere in it, with the names it takes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            for alias in node.names:
                if node.module.partition(".")[0] in ROOMS:
                    yield node.module, alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in ROOMS:
                    yield alias.name, ""


def place_of(module: str) -> tuple[str, str]:
    """The package and the room of a module; the room is empty in a package's own folder."""
    package, _, rest = module.partition(".")
    room = rest.partition(".")[0]
    known = {name for row in ROOMS[package] for name in row}
    return package, room if room in known else ""


def depth(package: str, room: str) -> int:
    """How far down a room lies."""
    rows = ROOMS[package]
    return next((i for i, row in enumerate(rows) if room in row), len(rows))


def test_every_folder_is_a_room():
    for package, rows in ROOMS.items():
        folders = {p.parent.name for p in (SOURCE / package).glob("*/__init__.py")}
        assert folders == {name for row in rows for name in row}


@pytest.mark.parametrize("module", FILES)
def test_arrows_point_down(module):
    package, room = place_of(module)
    if module == package:  # hands names on
        return
    wrong = []
    for target, name in imports_of(FILES[module]):
        other_package, other_room = place_of(target)
        same = (other_package, other_room) == (package, room)
        if package == other_package:
            allowed = same or depth(package, room) < depth(package, other_room)
        else:
            allowed = package == "multitangent_lab"
        if not allowed:
            wrong.append(f"{target}.{name}")
    assert wrong == []


@pytest.mark.parametrize("module", FILES)
def test_rooms_are_entered_by_the_door(module):
    """From another room only names of its `__init__` are imported."""
    place = place_of(module)
    wrong = [
        f"{target}.{name}"
        for target, name in imports_of(FILES[module])
        if place_of(target) != place
        and place_of(target)[1]
        and any(part.startswith("_") for part in [*target.split("."), name])
    ]
    assert wrong == []


def test_there_is_no_circle():
    graph: dict[str, set[str]] = {}
    for module, path in FILES.items():
        found = set()
        for target, name in imports_of(path):
            inner = f"{target}.{name}"
            found.add(inner if inner in FILES else target)
        # What a room hands on is not what its own files need.
        graph[module] = {other for other in found - {module} if not module.startswith(f"{other}.")}
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in finished:
            for other in sorted(graph.get(module, ())):
                visit(other, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


TESTS = [path for path in sorted((ROOT / "tests").rglob("*.py")) if path != Path(__file__)]
BENCHMARKS = sorted((SOURCE / "multitangent_lab" / "benchmarks").glob("*.py"))
FOREIGN = {"_version", "_forward_hooks", "_forward_pre_hooks"}  # of PyTorch's objects


def test_there_are_tests_and_benchmarks():
    assert len(TESTS) > 30
    assert len(BENCHMARKS) > 5


@pytest.mark.parametrize("path", [*TESTS, *BENCHMARKS], ids=lambda path: path.stem)
def test_tests_and_benchmarks_reach_into_no_other_room(path):
    """A test of one room, in the folder of that name, may import what is private there."""
    inside = path.relative_to(ROOT).parts[1:-1]
    package = "multitangent_lab" if "lab" in inside or SOURCE in path.parents else "multitangent"
    own = (package, inside[-1] if inside else "")
    wrong = [
        f"{target}.{name}"
        for target, name in imports_of(path)
        if any(part.startswith("_") for part in [*target.split("."), name])
        and place_of(target) not in (own, (package, ""))  # a package's folder is its rooms' own
    ]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            of_self = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            of_torch = ast.unparse(node).startswith("torch.")
            if not (of_self or of_torch or node.attr.startswith("__") or node.attr in FOREIGN):
                wrong.append(f"line {node.lineno}: {ast.unparse(node)}")
    assert wrong == []
