"""Ends a run whose owner has died: `python -m finetune_client.guardian PID MARK STOP_SECONDS`.

Started by `runner` and `serving` beside the trainers, which are in a session of their own and would otherwise work on
for hours after a SIGKILL to the CLI. Its standard input is a pipe from the owner: a byte says that all is over and
well, an end without one says that the owner is gone.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence

import psutil

from finetune_client.processes import ProcessTree

__all__ = ["guarded", "main"]


def guarded(pid: int, mark: str, stop_seconds: float, kept_open: Sequence[int] = ()) -> subprocess.Popen[bytes]:
    """What ends the process `pid`, and all that carries its mark, when this process is killed and cannot. It holds the
    descriptors `kept_open` until then."""
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "finetune_client.guardian", str(pid), mark, str(stop_seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        pass_fds=kept_open,
    )


def main() -> None:
    """Wait for word from the owner, and end the run if none comes."""
    pid, mark, stop_seconds = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
    try:
        trainer = psutil.Process(pid)  # remembers when it started: another process may get its number
    except psutil.NoSuchProcess:
        trainer = None
    if sys.stdin.buffer.read(1):
        return
    tree = ProcessTree(pid, mark)
    tree.look()
    if trainer is not None and trainer.is_running():
        trainer.send_signal(signal.SIGINT)
        psutil.wait_procs([trainer], timeout=stop_seconds)
        if trainer.is_running():
            tree.kill()
    tree.clean_up()


if __name__ == "__main__":
    main()
