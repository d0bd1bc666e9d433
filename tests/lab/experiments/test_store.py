"""Cells are run once, whoever runs them and however they are stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from multitangent_lab._files import write_csv
from multitangent_lab.experiments._store import Cell, OutOfTimeError, Store


@dataclass(frozen=True)
class Square(Cell):
    x: int


def square(cell):
    return [{"x": cell.x, "y": cell.x**2}]


def never(cell):
    raise AssertionError(f"{cell} was run again")


CELLS = [Square(x) for x in range(4)]


def test_the_key_is_a_function_of_the_value():
    assert Square(3).key == "0e7f6b79c3c6"
    assert len({cell.key for cell in CELLS}) == 4


def test_a_finished_cell_is_never_run_again(tmp_path):
    Store(tmp_path).work(CELLS, square)
    Store(tmp_path).work(CELLS, never)
    assert Store(tmp_path).rows(reversed(CELLS)) == [{"x": x, "y": x**2} for x in (3, 2, 1, 0)]
    record = Store(tmp_path).records()[CELLS[2].key]
    assert record["cell"] == {"kind": "Square", "x": 2}
    assert {"torch", "python", "processor", "command", "seconds"} <= set(record)


def test_what_had_ended_before_a_failure_is_kept(tmp_path):
    def late(cell):
        if cell.x == 2:
            raise OutOfTimeError
        return square(cell)

    with pytest.raises(OutOfTimeError):
        Store(tmp_path).work(CELLS, late)
    Store(tmp_path).work(CELLS[:2], never)
    Store(tmp_path).work(CELLS, square)
    assert len(Store(tmp_path).rows(CELLS)) == 4


@pytest.mark.parametrize("torn", [b'{"key": "12', b"\xff\xfe"])
def test_a_line_that_was_not_finished_is_left_out(torn, tmp_path):
    store = Store(tmp_path)
    store.obtain(CELLS[0], square)
    with store.path.open("ab") as file:
        file.write(torn)
    store.obtain(CELLS[1], square)
    assert len(Store(tmp_path).rows(CELLS)) == 2


# The child says that it has begun the cell, then takes its time.
CHILD = """
import sys, time
from dataclasses import dataclass
from pathlib import Path
from multitangent_lab.experiments._store import Cell, Store

@dataclass(frozen=True)
class Square(Cell):
    x: int

def slow(cell):
    print("begun", flush=True)
    time.sleep(float(sys.argv[2]))
    return [{"x": cell.x, "y": "child"}]

Store(Path(sys.argv[1])).work([Square(0)], slow)
"""


def start(folder, seconds):
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(folder), str(seconds)], stdout=subprocess.PIPE
    )
    assert child.stdout.readline() == b"begun\n"
    return child


def test_processes_share_the_work(tmp_path):
    with start(tmp_path, 1.0) as child:
        store = Store(tmp_path)
        store.work(CELLS, square)  # all but what the child is at
        assert [row["x"] for row in store.rows(CELLS)] == [1, 2, 3]
        assert store.obtain(CELLS[0], never) == [{"x": 0, "y": "child"}]  # waits for it
    assert child.returncode == 0


def test_the_cell_of_a_killed_process_is_free(tmp_path):
    with start(tmp_path, 1000.0) as child:
        os.kill(child.pid, signal.SIGKILL)
    Store(tmp_path).work(CELLS, square)
    assert len(Store(tmp_path).rows(CELLS)) == 4


def test_a_cell_may_get_a_further_field():
    @dataclass(frozen=True)
    class Square(Cell):
        x: int
        times: int = 1

    assert Square(3).key == CELLS[3].key != Square(3, times=2).key


def test_scratch_is_kept_until_the_result_is_stored(tmp_path):
    store = Store(tmp_path)

    def interrupted(cell):
        store.scratch(cell).mkdir()
        raise OutOfTimeError

    with pytest.raises(OutOfTimeError):
        store.obtain(CELLS[0], interrupted)
    clock = store.scratch(CELLS[0]) / "seconds"
    clock.write_text("1000.0")  # of earlier runs
    store.obtain(CELLS[0], square)
    assert store.records()[CELLS[0].key]["seconds"] >= 1000
    assert not store.scratch(CELLS[0]).exists()
    assert (tmp_path / ".work" / ".gitignore").read_text() == "*\n"


def test_rows_of_a_later_version_may_have_more_columns(tmp_path):
    write_csv(tmp_path / "table.csv", [{"a": 1}, {"a": 2, "b": 3}])
    assert (tmp_path / "table.csv").read_text() == "a,b\n1,\n2,3\n"
