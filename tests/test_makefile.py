"""What `make quickstart` says on a machine that lacks something: all of it at once, before anything is fetched.

The machine is a folder of programs, the only one on the PATH: each is there, missing, or says what a test wants.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

MAKEFILE = Path(__file__).resolve().parents[1] / "Makefile"
GIB = 1 << 20
"""In the kilobytes that df counts."""

PYTHON = """case "$*" in
  -V) echo 'Python {version}' ;;
  *version_info*) exit {too_old} ;;
  *ensurepip*) exit {no_venv} ;;
  *) echo "asked: $*"; exit 9 ;;
esac"""


@dataclass(frozen=True)
class Machine:
    """A folder with the project in it, and the programs that `make` finds."""

    project: Path
    programs: Path

    def has(self, program: str, script: str) -> None:
        """Put a program there, as a script of the shell."""
        file = self.programs / program
        file.write_text(f"#!/bin/bash\n{script}\n")
        file.chmod(0o755)

    def has_python(self, version: str = "3.12.1", *, too_old: int = 0, no_venv: int = 0) -> None:
        """A Python that answers what it is asked before the installation, and refuses to make an environment."""
        self.has("python3", PYTHON.format(version=version, too_old=too_old, no_venv=no_venv))

    def has_free(self, gib: int) -> None:
        header = "Filesystem 1024-blocks Used Available Capacity Mounted on"
        self.has("df", f"printf '%s\\n' '{header}' '/dev/x 99 9 {gib * GIB} 9% /'")

    def lacks(self, program: str) -> None:
        (self.programs / program).unlink()

    def quickstart(self, *variables: str) -> list[str]:
        """What `make quickstart` says on stderr. Nothing may have been made."""
        make = shutil.which("make")
        assert make is not None
        done = subprocess.run(
            [make, "quickstart", *variables],
            cwd=self.project,
            env={"PATH": str(self.programs), "HOME": str(self.project)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode != 0
        assert {file.name for file in self.project.iterdir()} == {"Makefile", "pyproject.toml", "uv.lock"}
        return (done.stdout + done.stderr).splitlines()


def missing(told: list[str]) -> list[str]:
    """The entries of the list that the machine lacks."""
    return [line.removeprefix("  - ") for line in told if line.startswith("  - ")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """One that lacks nothing, but for a Python that makes environments."""
    project, programs = tmp_path / "project", tmp_path / "bin"
    project.mkdir()
    programs.mkdir()
    shutil.copy(MAKEFILE, project)
    for name in ("pyproject.toml", "uv.lock"):
        (project / name).touch()
    for name in ("awk", "date"):
        (programs / name).symlink_to(os.path.realpath(shutil.which(name) or name))
    made = Machine(project, programs)
    made.has_python()
    made.has("g++", "exit 0")
    made.has("uname", "echo Linux x86_64")
    made.has_free(100)
    return made


def test_a_machine_that_lacks_nothing_gets_an_environment(machine: Machine) -> None:
    told = machine.quickstart()
    assert missing(told) == []
    assert "asked: -m venv .tools" in told


NAMED = "make PYTHON=/path/to/python3.12"
LACKING: dict[str, tuple[Callable[[Machine], object], str]] = {
    "no Python": (
        lambda one: one.lacks("python3"),
        f"Python 3.11 or newer, as 'python3' (install python3, or name one: {NAMED})",
    ),
    "an old Python": (
        lambda one: one.has_python("3.9.2", too_old=1),
        f"Python 3.11 or newer: 'python3' is Python 3.9.2 (install a newer one and name it: {NAMED})",
    ),
    "a Python without venv": (
        lambda one: one.has_python(no_venv=1),
        "Python's venv module (Debian: apt-get install python3-venv)",
    ),
    "no compiler": (lambda one: one.lacks("g++"), "a C++ compiler (Debian: apt-get install g++)"),
    "another processor": (
        lambda one: one.has("uname", "echo Linux aarch64"),
        "Linux on x86_64: the lock has no packages for Linux aarch64",
    ),
    "another system": (
        lambda one: one.has("uname", "echo Darwin arm64"),
        "Linux on x86_64: the lock has no packages for Darwin arm64",
    ),
    "a full disk": (lambda one: one.has_free(7), "8 GB of free disk here: there are 7"),
}


@pytest.mark.parametrize("what", LACKING)
def test_what_is_missing_is_said_with_how_to_come_by_it(machine: Machine, what: str) -> None:
    take_away, sentence = LACKING[what]
    take_away(machine)
    told = machine.quickstart()
    assert told[0] == "This machine lacks:"
    assert missing(told) == [sentence]


def test_all_that_is_missing_is_said_at_once(machine: Machine) -> None:
    for program in ("python3", "g++"):
        machine.lacks(program)
    machine.has("uname", "echo Linux riscv64")
    machine.has_free(0)
    assert [line.split(",")[0].split(" (")[0] for line in missing(machine.quickstart())] == [
        "Python 3.11 or newer",
        "a C++ compiler",
        "Linux on x86_64: the lock has no packages for Linux riscv64",
        "8 GB of free disk here: there are 0",
    ]


def test_another_python_may_be_named(machine: Machine) -> None:
    machine.lacks("python3")
    assert "as '/opt/python3.13'" in missing(machine.quickstart("PYTHON=/opt/python3.13"))[0]
