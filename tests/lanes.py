"""Runs the tests lane by lane, the quick ones first, and says at the end what each lane came to.

    python -m tests.lanes [PYTEST ARGUMENTS]        all lanes
    python -m tests.lanes --lane ray -k resume      one lane (see LANES); the rest goes to pytest
    python -m tests.lanes --lane cluster            the one that runs only when it is named

Called by `make test`. Each lane is a pytest process of its own: Ray, DeepSpeed and torch settle things once per
process. A lane goes on after an earlier one has failed, so that one run tells everything.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, STDOUT
from threading import Lock

import pytest

__all__ = ["LANES", "Lane", "main"]


@dataclass(frozen=True)
class Lane:
    """Tests that need the same of a machine. `marker` None: the tests that carry no lane's marker.

    A test with the markers of several lanes is in the last of them, which needs the most.
    `processes`: how many run at a time, each with one thread.
    `apart`: each file in a process of its own. DeepSpeed never gives back the buckets of an engine, gigabytes that are
    mapped and not touched; after some dozen trainings the process could start no other one.
    `only_by_name`: left out, and said so, unless somebody asks for it.
    `hangs_after`: in seconds. A test that takes longer shows where it stands and ends its process: one that waits for
    ever would take the time of all the others. The first to need a program, such as Helm, builds it: that is minutes.
    """

    name: str
    what: str
    marker: str | None
    processes: int = 1
    apart: bool = False
    only_by_name: bool = False
    hangs_after: int = 2700


LANES = (
    Lane("pure", "no cluster, no Ray", None, processes=2, hangs_after=1500),
    Lane("control-plane", "a real API server", "control_plane"),
    Lane("training", "torch and DeepSpeed on this machine, without Ray", "training", processes=2, apart=True),
    Lane("ray", "Ray Train on this machine", "ray", apart=True),
    Lane("e2e", "from a manifest to a tuned model", "e2e"),
    Lane("vllm", "rollouts by vLLM itself, in an environment that is made for it", "vllm", only_by_name=True),
    Lane("cluster", "images and pods on two real nodes, as root", "cluster", only_by_name=True),
)


@dataclass(frozen=True)
class _Ran:
    lane: Lane
    code: int
    seconds: float
    may_be_empty: bool

    @property
    def failed(self) -> bool:
        if self.code == pytest.ExitCode.NO_TESTS_COLLECTED:
            return not self.may_be_empty
        return self.code != pytest.ExitCode.OK

    @property
    def verdict(self) -> str:
        if self.code == pytest.ExitCode.NO_TESTS_COLLECTED:
            return "NO TESTS" if self.failed else "no tests"
        return "FAILED" if self.failed else "passed"


def expression(lane: Lane) -> str:
    """The lane as pytest's -m takes it."""
    later = LANES[LANES.index(lane) + 1 :]
    return " and ".join([*filter(None, [lane.marker]), *(f"not {other.marker}" for other in later)])


def run(lane: Lane, arguments: Sequence[str]) -> _Ran:
    """One lane, its output passed through."""
    print(f"\n===== lane {lane.name}: {lane.what} =====", flush=True)
    command = [sys.executable, "-m", "pytest", "-m", expression(lane), *arguments]
    command += ["-o", f"faulthandler_timeout={lane.hangs_after}", "-o", "faulthandler_exit_on_timeout=true"]
    if lane.processes > 1 and not lane.apart:
        command += ["-n", str(lane.processes), "--dist", "loadfile"]
    started = time.monotonic()
    # A lane that runs beside itself: one thread each keeps two processes on two cores.
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if lane.processes > 1 else {})
    commands = [[*command, *part] for part in _parts(lane, arguments)]
    codes = _call(commands, environment, lane.processes if lane.apart else 1)
    failures = [code for code in codes if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)]
    code = failures[0] if failures else min(codes)  # one file with tests is enough
    # With arguments, such as -k, a lane may well have nothing that fits.
    return _Ran(lane, code, time.monotonic() - started, may_be_empty=bool(arguments))


def _call(commands: Sequence[Sequence[str]], environment: Mapping[str, str], at_a_time: int) -> list[int]:
    """Their exit codes. Of several at a time, what each has printed comes when it has ended."""
    printing = Lock()

    def call(command: Sequence[str]) -> int:
        if at_a_time == 1:
            return subprocess.run(command, check=False, env=environment).returncode
        done = subprocess.run(
            command, check=False, env=environment, stdout=PIPE, stderr=STDOUT, text=True, errors="replace"
        )
        with printing:
            print(done.stdout, end="", flush=True)
        return done.returncode

    with ThreadPoolExecutor(at_a_time) as threads:
        return list(threads.map(call, commands))


def _parts(lane: Lane, arguments: Sequence[str]) -> list[list[str]]:
    """The files of each pytest process; none named is all of them.

    A lane with a marker looks only into its own files: collecting all of them takes as long as many a test.
    """
    if lane.marker is None or any(Path(argument.partition("::")[0]).exists() for argument in arguments):
        return [[]]
    files = [str(file) for file in _carrying(f"mark.{lane.marker}")]
    return [[file] for file in files] if lane.apart else [files]


def _carrying(mark: str) -> list[Path]:
    """The test files in which the mark is written, in their own text or in a conftest.py that holds for them."""
    tests = Path(__file__).parent
    marked = {file for file in tests.rglob("*.py") if mark in file.read_text(encoding="utf-8")}
    folders = {file.parent for file in marked if file.name == "conftest.py"}
    return sorted(file for file in tests.rglob("test_*.py") if file in marked or folders & set(file.parents))


def main() -> int:
    """0 when every lane passed."""
    parser = argparse.ArgumentParser(description="Run the tests lane by lane; what is not known here goes to pytest.")
    parser.add_argument("--lane", action="append", choices=[lane.name for lane in LANES], help="only this one")
    options, arguments = parser.parse_known_args()
    named = options.lane or [lane.name for lane in LANES if not lane.only_by_name]
    ran = [run(lane, arguments) for lane in LANES if lane.name in named]
    print("\n===== lanes =====")
    for one in ran:
        print(f"{one.lane.name:<14} {one.verdict:<9} {one.seconds:5.0f} s", flush=True)
    for lane in LANES:
        if lane.only_by_name and lane.name not in named:
            print(f"{lane.name:<14} NOT RUN   {lane.what}: python -m tests.lanes --lane {lane.name}", flush=True)
    return int(any(one.failed for one in ran))


if __name__ == "__main__":
    sys.exit(main())
