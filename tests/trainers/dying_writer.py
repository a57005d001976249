"""The writer of checkpoints for a training that `dying` ends: with a shard of a step on disk, and nothing yet that says
so, it kills its trainer and itself.

Started in the writer's place, as `python -m tests.trainers.dying_writer SOCKET BUFFERS`.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_trainers.checkpoint import layout, writer
from finetune_trainers.checkpoint.storage.opening import open_storage
from tests.trainers.checkpoint.faulting import FaultingStorage, Schedule

__all__ = ["DYING_WRITER", "end", "hang"]

DYING_WRITER = "FINETUNE_TEST_DYING_WRITER"
"""Names a variable: the trainer's process, the step at whose shard to die, and the file of the mark."""


def end(mark: Path, where: str, also: Sequence[int] = ()) -> None:
    """This process, and before it those of `also`, at once and without a word beyond the mark."""
    mark.write_text(where)
    for process in (*also, os.getpid()):
        os.kill(process, signal.SIGKILL)


def hang(mark: Path, where: str) -> None:
    """Nothing more is done, until somebody ends this process."""
    mark.write_text(where)
    while True:
        signal.pause()


class Deadly(Schedule):
    """Ends trainer and writer behind the shard."""

    def __init__(self, trainer: int, step: int, mark: str) -> None:
        super().__init__()
        self._trainer, self._step, self._mark = trainer, step, Path(mark)

    def boundary(self, what: str) -> None:
        when, _, name = what.partition(" write ")
        checkpoint = layout.checkpoint_of(name)
        if when == "after" and checkpoint is not None and checkpoint.step == self._step:
            end(self._mark, "the writer writes", also=[self._trainer])


def main() -> None:
    deadly = Deadly(*json.loads(os.environ[DYING_WRITER]))

    def opened(uri: str, *arguments: Any, **named: Any) -> FaultingStorage:
        return FaultingStorage(open_storage(uri, *arguments, **named), deadly)

    vars(writer)["open_storage"] = opened
    writer.main()


if __name__ == "__main__":
    main()
