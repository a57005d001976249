"""A trainer that stages a checkpoint of two ranks and then trains for ever: `python -m ...stager URI`, to be killed.

It puts its writers to sleep first and tells their numbers, so that nothing is written before it is killed.
"""

from __future__ import annotations

import sys
import time

import psutil

from finetune_trainers.checkpoint.flushes import Flushes
from finetune_trainers.checkpoint.manifest import Intent
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.shards import Slice
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.writer_protocol import Begin
from tests.trainers.checkpoint import synthetic
from tests.trainers.checkpoint.saving import intent_of, start


def main() -> None:
    uri, world = sys.argv[1], 2
    fence = start(open_storage(uri))
    begins = [
        Begin(uri=uri, pvc_root="", exclusive=True, rank=rank, fence=fence, retention=Retention())
        for rank in range(world)
    ]
    ranks = [Flushes(begin) for begin in begins]
    for flushes in ranks:
        while flushes.writer_pid is None:
            flushes.poll(1.0)
    pids = [flushes.writer_pid for flushes in ranks]
    for pid in pids:
        psutil.Process(pid).suspend()
    print("writers", *pids, flush=True)
    intent = intent_of(fence, 1, world)
    for rank, flushes in enumerate(ranks):
        parts = synthetic.slices(intent, rank)
        flushes.stage(intent, parts, lambda piece, target: _fill(target, intent, piece), {"rng.json": b"{}"})
    print("staged 1", flush=True)
    time.sleep(600)


def _fill(target: memoryview, intent: Intent, piece: Slice) -> None:
    target[:] = next(synthetic.data(intent, [piece]))


if __name__ == "__main__":
    main()
