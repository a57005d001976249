"""Which tests run when nobody says which, and what is said of those that do not."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests import lanes
from tests.lanes import LANES, Lane


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the lanes that would have run; none does."""
    names: list[str] = []

    def run(lane: Lane, arguments: Sequence[str]) -> lanes._Ran:
        names.append(lane.name)
        return lanes._Ran(lane, 0, 0.0, may_be_empty=False)

    monkeypatch.setattr(lanes, "run", run)
    return names


def test_a_lane_that_is_run_by_name_only_is_left_out_and_said_to_be(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lanes"])
    assert lanes.main() == 0
    assert ran == [lane.name for lane in LANES if lane.name not in ("cluster", "vllm")]
    lines = capsys.readouterr().out.splitlines()
    for name in ("cluster", "vllm"):
        (line,) = (line for line in lines if line.startswith(name))
        assert "NOT RUN" in line
        assert line.endswith(f"python -m tests.lanes --lane {name}")


def test_a_lane_that_is_named_runs_alone(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lanes", "--lane", "cluster"])
    assert lanes.main() == 0
    assert ran == ["cluster"]
    assert not [line for line in capsys.readouterr().out.splitlines() if "cluster" in line and "NOT RUN" in line]


def test_a_test_is_in_the_last_lane_of_those_whose_markers_it_has() -> None:
    """A file of trainings may have one that starts Ray; rollouts by vLLM are trainings too."""
    expressions = {lane.name: lanes.expression(lane) for lane in LANES}
    assert all(f"not {lane.marker}" in expressions["pure"] for lane in LANES[1:])
    assert expressions["training"] == "training and not ray and not e2e and not vllm and not cluster"
    assert expressions["ray"] == "ray and not e2e and not vllm and not cluster"
    assert expressions["cluster"] == "cluster"


def test_what_files_print_that_run_beside_one_another_is_not_mixed(capsys: pytest.CaptureFixture[str]) -> None:
    script = (
        "import sys, time; print(sys.argv[1], flush=True); time.sleep(0.2); print('end'); sys.exit(int(sys.argv[1]))"
    )
    commands = [[sys.executable, "-c", script, str(number)] for number in range(4)]
    assert lanes._call(commands, os.environ, at_a_time=2) == [0, 1, 2, 3]
    printed = capsys.readouterr().out.split()
    assert sorted(printed[::2]) == ["0", "1", "2", "3"]
    assert printed[1::2] == ["end"] * 4


@pytest.mark.parametrize("processes", [1, 2])
def test_a_test_that_hangs_shows_where_and_fails_its_lane(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], processes: int
) -> None:
    file = tmp_path / "test_hanging.py"
    file.write_text("import threading\n\n\ndef test_a():\n    threading.Event().wait()\n")
    lane = replace(LANES[0], processes=processes, hangs_after=1)
    monkeypatch.setattr(lanes, "LANES", (lane,))
    assert lanes.run(lane, [str(file), f"--rootdir={tmp_path}"]).verdict == "FAILED"
    assert 'test_hanging.py", line 5 in test_a' in capfd.readouterr().err


def test_a_lane_looks_for_its_tests_where_its_mark_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def written(name: str, text: str) -> str:
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        return str(file)

    monkeypatch.setattr(lanes, "__file__", written("lanes.py", "mark.slow"))
    in_itself = written("test_a.py", "pytestmark = pytest.mark.slow")
    written("test_b.py", "pytestmark = pytest.mark.other")
    written("stores/conftest.py", "pytest.param('s3', marks=pytest.mark.slow)")
    by_its_folder = written("stores/test_c.py", "")
    together, apart = Lane("l", "", "slow"), Lane("l", "", "slow", apart=True)
    assert lanes._parts(together, []) == [[by_its_folder, in_itself]]
    assert lanes._parts(apart, ["-k", "saves"]) == [[by_its_folder], [in_itself]]
    assert lanes._parts(together, [in_itself]) == [[]]


def test_marks_of_lanes_are_written_where_they_are_looked_for() -> None:
    """In a file that tests import, pytest would see the mark and the choice of files would not."""
    marks = [f"pytest.mark.{lane.marker}" for lane in LANES if lane.marker]
    for file in Path(lanes.__file__).parent.rglob("*.py"):
        if not file.name.startswith("test_") and file.name != "conftest.py":
            assert not [mark for mark in marks if mark in file.read_text(encoding="utf-8")], file
