"""The driver: one job to its end with nobody watching, told in its output; the trainer is the fake one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import Phase
from finetune_client.driver import Teller
from finetune_client.folders import JOB_FILE, SUSPEND_FILE, RunFolder
from finetune_client.output import ATTEMPT_MARK, JOB_MARK, Reader, attempts_in, newest_document
from finetune_client.submission import SUBMISSION_VARIABLE, Submitted
from finetune_client.views import SUSPENDED_CODE, JobView
from finetune_operator.kinds import Key
from tests.client.conftest import FAKE_TRAINER, JOB, wait_until
from tests.factories import job, with_changes

PROGRAM = f"""
import sys
from finetune_client import runner
runner.TRAINERS = [sys.executable, {str(FAKE_TRAINER)!r}]
from finetune_client.driver import main
sys.exit(main(sys.argv[1:]))
"""


class Driving:
    """A driver in a process of its own."""

    def __init__(self, folder: Path, fake: str = "", changes: dict[str, Any] | None = None, *options: str) -> None:
        submitted = Submitted(with_changes(JOB, {"metadata.namespace": "team-a", **(changes or {})}))
        self.log = folder.parent / f"driver-{len(list(folder.parent.iterdir()))}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(folder), *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"FAKE_TRAINER": fake, SUBMISSION_VARIABLE: submitted.packed()},
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    @property
    def view(self) -> JobView | None:
        document = newest_document(self.output)
        return JobView.of(document) if document else None

    def is_at(self, phase: Phase) -> bool:
        return self.view is not None and self.view.phase is phase

    def end(self) -> int:
        return self.process.wait(300)


Drive = Callable[..., Driving]


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Drive]:
    begun: list[Driving] = []

    def start(*arguments: Any) -> Driving:
        begun.append(Driving(tmp_path / "run", *arguments))
        return begun[-1]

    yield start
    for one in begun:
        if one.process.poll() is None:
            one.process.terminate()
            one.end()


def test_a_job_runs_to_its_end_and_the_output_tells_both_log_and_job(drive: Drive, tmp_path: Path) -> None:
    driving = drive()
    assert driving.end() == 0
    view = driving.view
    assert view is not None
    assert (view.name, view.namespace, view.phase) == ("tiny", "team-a", Phase.SUCCEEDED)
    assert attempts_in(driving.output) == [1]
    assert (1, "the fake trainer starts") in Reader().read(driving.output)
    assert json.loads((tmp_path / "run" / JOB_FILE).read_text()) == view.document


def test_a_failed_attempt_is_followed_by_another_with_a_log_of_its_own(drive: Drive) -> None:
    driving = drive("killed then ", {"spec.failurePolicy.backoff": {"initialSeconds": 1, "maxSeconds": 1}})
    assert driving.end() == 0
    assert attempts_in(driving.output) == [1, 2]
    view = driving.view
    assert view is not None
    assert [one.number for one in view.status.attempts] == [1, 2]


def test_a_job_is_suspended_by_another_process_and_goes_on_in_the_same_folder(drive: Drive) -> None:
    first = drive("waits", {"spec.checkpoint": {"everySteps": 1}})
    wait_until(lambda: first.is_at(Phase.RUNNING))
    assert drive("", {}, "--suspend").end() == 0
    assert first.end() == SUSPENDED_CODE
    assert first.is_at(Phase.SUSPENDED)
    second = drive()
    assert second.end() == 0
    assert second.view is not None
    assert second.view.status.attempts[-1].number == 2
    assert attempts_in(second.output) == [2]


def test_trainers_hear_that_they_should_stop_also_where_who_starts_the_driver_blocks_the_signal(drive: Drive) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        driving = drive("waits", {"spec.checkpoint": {"everySteps": 1}})
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    wait_until(lambda: driving.is_at(Phase.RUNNING))
    assert drive("", {}, "--suspend").end() == 0
    assert driving.end() == SUSPENDED_CODE
    assert driving.view is not None
    assert "did not in time" not in (driving.view.status.attempts[-1].message or "")


def test_a_driver_that_is_told_to_end_leaves_no_trainer(drive: Drive) -> None:
    driving = drive("waits")
    wait_until(lambda: driving.is_at(Phase.RUNNING))
    driving.process.send_signal(signal.SIGTERM)
    assert driving.end() == 130


def test_what_is_no_job_is_said_in_a_sentence(drive: Drive, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune_client.driver", "/nowhere/run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_a_job_travels_as_its_author_wrote_it() -> None:
    submitted = Submitted.of(job({"training": {"epochs": 2}}), "team-a", [])
    assert Submitted.unpacked(submitted.packed()) == submitted
    assert submitted.job["metadata"] == {"name": "example", "namespace": "team-a"}
    assert submitted.job["spec"]["training"] == {"epochs": 2}


def test_a_wish_and_the_jobs_last_state_stay_where_they_are_when_another_attempt_begins(tmp_path: Path) -> None:
    key = Key("default", "tiny")
    with RunFolder.create(tmp_path / "run", {key: "."}, True, None) as folder:
        folder.make_room(key, 1)
        for name in (JOB_FILE, SUSPEND_FILE, "outcome.json"):
            (folder.path / name).touch()
        folder.make_room(key, 2)
        assert {file.name for file in folder.path.iterdir()} == {JOB_FILE, SUSPEND_FILE, "attempt-1"}


def document(phase: str, step: int) -> dict[str, Any]:
    return {"status": {"phase": phase, "progress": {"step": step}, "attempts": [{"number": 1, "step": step}]}}


def told(output: io.StringIO) -> list[tuple[str, int]]:
    jobs = [json.loads(line.removeprefix(JOB_MARK)) for line in output.getvalue().splitlines() if JOB_MARK in line]
    return [(one["status"]["phase"], one["status"]["progress"]["step"]) for one in jobs]


def test_progress_alone_is_told_four_times_a_minute_and_anything_else_at_once(tmp_path: Path) -> None:
    output = io.StringIO()
    teller = Teller(tmp_path, output)
    for second in range(40):
        teller.job(document("Running", second), float(second))
    teller.job(document("Suspended", 40), 40.5)
    assert told(output) == [("Running", 0), ("Running", 15), ("Running", 30), ("Suspended", 40)]


def test_who_looks_into_the_folder_sees_every_step(tmp_path: Path) -> None:
    teller = Teller(tmp_path, io.StringIO())
    for step in (1, 2):
        teller.job(document("Running", step), float(step))
        assert json.loads((tmp_path / JOB_FILE).read_text()) == document("Running", step)


def test_the_job_is_told_again_when_much_has_been_printed_since(tmp_path: Path) -> None:
    output = io.StringIO()
    teller = Teller(tmp_path, output)
    teller.job(document("Running", 1), 0.0)
    teller.log(1, ["a line"] * 500)
    teller.job(document("Running", 1), 1.0)
    assert told(output) == [("Running", 1), ("Running", 1)]


def test_a_line_that_is_still_being_written_does_not_count() -> None:
    whole = f"{ATTEMPT_MARK}1\nhello\n{JOB_MARK}{json.dumps(document('Running', 1))}\n"
    assert newest_document(whole + JOB_MARK + '{"sta') == document("Running", 1)
    assert Reader().read(whole + "half a li") == [(1, "hello")]
    assert newest_document("") is None


def test_output_is_read_alike_in_pieces_of_any_length() -> None:
    mark = JOB_MARK + json.dumps(document("Running", 1))
    whole = f"{mark}\nnobody's\n{ATTEMPT_MARK}1\nhello\n\n{mark}\nétrange\n{ATTEMPT_MARK}2\nagain\nhalf a li"
    for length in (1, 2, 7, len(whole)):
        reader = Reader()
        found = [one for start in range(0, len(whole), length) for one in reader.read(whole[start : start + length])]
        assert found == [(1, "hello"), (1, ""), (1, "étrange"), (2, "again")]
        assert reader.attempts == [1, 2]
