"""The builder asks Go once for each thing, keeps what is whole, and says why it cannot; a fake `go` stands in."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cluster import build
from tests.cluster.build import BuildError, files_path, program_path
from tests.cluster.programs import FILES, ON_DEMAND, PROGRAMS, ModuleFiles, Program

WRAPPERS = Path(build.__file__).parent / "wrappers"
GO = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$1" in
env) echo "$GO_VERSION" ;;
mod) echo "{\\"Dir\\": \\"$MODULE\\"}" ;;
build)
    test -z "$BROKEN" || { echo "no such package"; exit 1; }
    while [ "$1" != -o ]; do shift; done
    echo program > "$2"
    ;;
esac
"""


def silent(text: str) -> None:
    """Nobody listens."""


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the fake go writes how it was called; the machine has that one and an empty cache."""
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "go").write_text(GO)
    (programs / "go").chmod(0o755)
    log = tmp_path / "calls"
    log.touch()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("CALLS", str(log))
    monkeypatch.setenv("GO_VERSION", "go1.26.1")
    monkeypatch.setenv("MODULE", str(tmp_path / "module"))
    monkeypatch.setenv("FINETUNE_TOOLS_CACHE", str(tmp_path / "cache"))
    return log


def count(calls: Path, what: str) -> int:
    return sum(line.startswith(what) for line in calls.read_text().splitlines())


def test_a_program_is_built_once(calls: Path) -> None:
    first, second = program_path("etcd", silent), program_path("etcd", silent)
    assert first == second
    assert first.read_text() == "program\n"
    assert count(calls, "build") == 1


def test_another_go_builds_another_program(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = program_path("etcd", silent)
    monkeypatch.setenv("GO_VERSION", "go1.26.2")
    assert program_path("etcd", silent) != first
    assert first.exists()


def test_a_build_that_fails_leaves_nothing_and_says_what_go_said(
    calls: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BROKEN", "yes")
    with pytest.raises(BuildError, match="no such package"):
        program_path("etcd", silent)
    assert [path for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    monkeypatch.delenv("BROKEN")
    assert program_path("etcd", silent).exists()


def test_a_cache_that_cannot_be_written_is_named(calls: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINETUNE_TOOLS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(BuildError, match="file/cache"):
        program_path("etcd", silent)


def test_files_of_a_module_are_copied_and_outlive_it(calls: Path, tmp_path: Path) -> None:
    folder = tmp_path / "module" / "config" / "components" / "crd" / "bases"
    folder.mkdir(parents=True)
    (folder / "jobsets.yaml").write_text("kind: CustomResourceDefinition")
    (folder / "jobsets.yaml").chmod(0o444)
    folder.chmod(0o555)
    copied = files_path("jobset-manifests", silent) / folder.relative_to(tmp_path / "module") / "jobsets.yaml"
    folder.chmod(0o755)
    (folder / "jobsets.yaml").unlink()
    assert copied.read_text() == "kind: CustomResourceDefinition"
    assert copied.is_relative_to(files_path("jobset-manifests", silent))
    assert count(calls, "mod download") == 1
    assert os.access(copied.parent, os.W_OK)


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_wrapper_names_each_program(program: Program) -> None:
    assert f'"{program.package}"' in (WRAPPERS / program.wrapper / "tools.go").read_text()


@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_a_wrapper_pins_each_module_that_files_come_from(files: ModuleFiles) -> None:
    assert f"{files.module} v" in (WRAPPERS / files.wrapper / "go.mod").read_text()
    assert f"{files.module} v" in (WRAPPERS / files.wrapper / "go.sum").read_text()


def test_what_is_built_on_demand_is_known() -> None:
    assert PROGRAMS.keys() | FILES.keys() >= ON_DEMAND
    assert not PROGRAMS.keys() & FILES.keys()


def test_an_unknown_name_is_refused_with_those_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["etcdd"]) == 2
    assert "unknown: etcdd" in capsys.readouterr().err
