"""Which tests run when nobody says which, and what is said of those that do not."""

from __future__ import annotations

import sys
from collections.abc import Sequence

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
    assert ran == [lane.name for lane in LANES if lane.name != "cluster"]
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("cluster"))
    assert "NOT RUN" in line
    assert line.endswith("python -m tests.lanes --lane cluster")


def test_a_lane_that_is_named_runs_alone(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lanes", "--lane", "cluster"])
    assert lanes.main() == 0
    assert ran == ["cluster"]
    assert "NOT RUN" not in capsys.readouterr().out


def test_the_quick_lane_has_nothing_of_the_others() -> None:
    expression = lanes.expression(LANES[0])
    assert all(f"not {lane.marker}" in expression for lane in LANES[1:])
