"""What is started ends with its block, and with the test run however that ends; ports are given out once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.cluster.processes import reserved_ports, started, wait_until

SLEEP = [sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)"]
RUN = """
import pathlib, sys, time
from tests.cluster.processes import started
with started(["sleep", "60"], pathlib.Path(sys.argv[1])) as process:
    print(process.process.pid, flush=True)
    time.sleep(60)
"""


def test_a_process_ends_with_its_block(tmp_path: Path) -> None:
    with started(SLEEP, tmp_path / "log") as process:
        wait_until(lambda: "here" in process.said(), "its first line", process)
        assert process.running
    assert process.process.returncode == -signal.SIGTERM


def test_a_process_sees_what_is_added_to_the_environment(tmp_path: Path) -> None:
    script = "import os; print(os.environ['ADDED'], 'PATH' in os.environ)"
    with started([sys.executable, "-c", script], tmp_path / "log", {"ADDED": "yes"}) as process:
        process.process.wait(30)
    assert process.said() == "yes True\n"


def test_a_killed_process_is_gone_at_once(tmp_path: Path) -> None:
    with started(SLEEP, tmp_path / "log") as process:
        process.kill()
        assert not process.running


def test_waiting_ends_with_the_process_and_shows_its_last_words(tmp_path: Path) -> None:
    with (
        started([sys.executable, "-c", "print('cannot listen')"], tmp_path / "log") as process,
        pytest.raises(AssertionError, match="a process ended while waiting for good news\nlog:\ncannot listen"),
    ):
        wait_until(lambda: False, "good news", process)


def test_waiting_ends_after_its_time() -> None:
    with pytest.raises(AssertionError, match="too long waiting for good news"):
        wait_until(lambda: False, "good news", seconds=0)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=str)
def test_nothing_outlives_a_test_run(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", RUN, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=Path.cwd()) as run:
        assert run.stdout is not None
        child = psutil.Process(int(run.stdout.readline()))
        wait_until(lambda: child.name() == "sleep", "the process to have said whose end is its own")
        os.kill(run.pid, how)
    child.wait(30)


def test_ports_are_not_given_out_twice() -> None:
    with reserved_ports(20) as first, reserved_ports(20) as second:
        assert len({*first, *second}) == 40
