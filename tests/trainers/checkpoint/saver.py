"""A process that saves one checkpoint after another until it is killed; a line for each boundary that it passes.

    python -m tests.trainers.checkpoint.saver URI

Prints "published STEP" once a checkpoint is committed. Before each attempt it restores what it finds, as a job does.
"""

from __future__ import annotations

import sys

from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.sweep import sweep
from tests.trainers.checkpoint.faulting import FaultingStorage, Schedule
from tests.trainers.checkpoint.saving import original, restored, save, start


class Announced(Schedule):
    """No fault; a line at each boundary, so that whoever reads can kill at any."""

    def boundary(self, what: str) -> None:
        print(what, flush=True)


def main() -> None:
    storage = FaultingStorage(open_storage(sys.argv[1]), Announced())
    fence = start(storage)
    found = find_newest(storage).manifest
    if found is not None:
        assert restored(storage, found) == original(found.intent)
    step = found.id.step if found else 0
    while True:
        step += 1
        save(storage, fence, step, world=3)
        print(f"published {step}", flush=True)
        sweep(storage, Retention(keep_last=2), fence)


if __name__ == "__main__":
    main()
