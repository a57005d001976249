"""Ends a run whose owner has died: `python -m finetune_client.guardian PID MARK STOP_SECONDS`.

Started by `runner` beside the trainers, which are in a session of their own and would otherwise train on for hours
after a SIGKILL to the CLI. Its standard input is a pipe from the owner: a byte says that all is over and well, an end
without one says that the owner is gone.
"""

from __future__ import annotations

import signal
import sys

import psutil

from finetune_client.processes import ProcessTree

__all__ = ["main"]


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
