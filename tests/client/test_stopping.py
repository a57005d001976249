"""Signals and sudden deaths: the run ends as it should, and no process is left."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from tests.client.conftest import is_alive, wait_until


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_stops_the_trainer_cleanly(start: Any, write_job: Any, number: signal.Signals) -> None:
    running = start("run", write_job(), "-o", "json", fake="waits")
    running.wait_for("waiting")
    trainer = running.trainer()
    running.process.send_signal(number)
    done = running.finish()
    assert done.code == 130
    assert (done.document["phase"], done.document["result"]) == ("Failed", "Cancelled")
    assert done.document["progress"]["step"] == 3
    failed = next(c for c in done.document["conditions"] if c["type"] == "Failed")
    assert failed["reason"] == "Cancelled"
    assert "Stopping cleanly" in done.stderr
    assert "Stopped after 3 of 5 steps" in done.stderr
    assert not is_alive(trainer.pid)


def test_the_second_signal_kills_a_trainer_that_does_not_listen(start: Any, write_job: Any) -> None:
    running = start("run", write_job(), "-o", "json", fake="deaf")
    running.wait_for("waiting")
    trainer, children = running.trainer(), running.children()
    running.process.send_signal(signal.SIGINT)
    wait_until(lambda: "Stopping cleanly" in running.process.stderr.readline())
    assert trainer.is_running()
    running.process.send_signal(signal.SIGINT)
    done = running.finish()
    assert done.code == 130
    assert done.document["result"] == "Cancelled"
    assert "Killing the run" in done.stderr
    assert [pid for pid in (trainer.pid, *children) if is_alive(pid)] == []


@pytest.mark.parametrize("fake", ["killed-with-children", "leaves-children"])
def test_what_the_trainer_leaves_behind_is_ended(start: Any, write_job: Any, fake: str) -> None:
    running = start("run", write_job(), "-o", "json", "--no-retry", fake=fake)
    done = running.finish()
    assert done.document["failure"] == ("Unknown" if fake == "killed-with-children" else None)
    assert [pid for pid in running.children() if is_alive(pid)] == []


def test_a_run_whose_command_line_was_killed_is_ended_too(start: Any, write_job: Any) -> None:
    running = start("run", write_job(), fake="waits-with-children")
    running.wait_for("waiting")  # by then children.json is whole
    trainer = running.trainer()
    running.process.kill()
    running.process.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in (trainer.pid, *running.children())))


def test_what_writes_a_checkpoint_is_let_finish(start: Any, write_job: Any) -> None:
    running = start("run", write_job(), "-o", "json", "--no-retry", fake="killed-with-writer")
    assert running.finish().document["failure"] == "Unknown"
    assert (running.workdir / "written").exists()
    assert [pid for pid in running.children() if is_alive(pid)] == []


def test_it_is_when_the_command_line_was_killed_too(start: Any, write_job: Any) -> None:
    running = start("run", write_job(), fake="waits-with-writer")
    running.wait_for("waiting")
    running.trainer().kill()
    running.process.kill()
    running.process.communicate()
    wait_until(lambda: not any(is_alive(pid) for pid in running.children()))
    assert (running.workdir / "written").exists()
