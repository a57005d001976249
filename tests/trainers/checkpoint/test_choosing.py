"""People name checkpoints shortly; what is not there is answered with what is."""

from __future__ import annotations

import pytest

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.choosing import UnknownCheckpointError, chosen, manifest_of, unless_deleted
from finetune_trainers.checkpoint.commit import abandon
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.reading import DamagedError
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.sweep import sweep
from tests.trainers.checkpoint.faulting import SimulatedDisk
from tests.trainers.checkpoint.saving import intent_of, restored, save, start, write_all


@pytest.fixture
def run() -> Storage:
    """Steps 10 and 20 of attempt 1; 20 again and 30 of attempt 2."""
    storage = PosixStorage("/run", SimulatedDisk())
    for steps in ((10, 20), (20, 30)):
        fence = start(storage)
        for step in steps:
            save(storage, fence, step)
    return storage


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("newest", CheckpointId(2, 30)),
        ("10", CheckpointId(1, 10)),
        ("20", CheckpointId(2, 20)),
        ("20-e1", CheckpointId(1, 20)),
        ("0000000020-e00001", CheckpointId(1, 20)),
    ],
)
def test_a_checkpoint_is_found_by_a_short_name(run: Storage, text: str, meant: CheckpointId) -> None:
    assert chosen(run, text) == meant
    assert manifest_of(run, meant).id == meant


@pytest.mark.parametrize("text", ["40", "10-e2", "0000000010-e00002", "latest", "", "-1", "10-e", "../10"])
def test_an_unknown_name_is_answered_with_those_that_are_there(run: Storage, text: str) -> None:
    with pytest.raises(UnknownCheckpointError) as caught:
        chosen(run, text)
    assert caught.value.known == ["0000000030-e00002", "0000000020-e00002", "0000000020-e00001", "0000000010-e00001"]


def test_newest_passes_over_damaged_ones_as_a_run_would(run: Storage) -> None:
    run.delete([layout.shard(CheckpointId(2, 30), 0)])
    assert chosen(run, "newest") == CheckpointId(2, 20)


def test_newest_says_why_when_none_is_whole() -> None:
    storage = PosixStorage("/run", SimulatedDisk())
    with pytest.raises(UnknownCheckpointError, match="there is no checkpoint at file:///run"):
        chosen(storage, "newest")
    save(storage, start(storage), 10)
    storage.delete([layout.shard(CheckpointId(1, 10), 0)])
    with pytest.raises(UnknownCheckpointError, match=r"no checkpoint at .* is whole: .*shard-00000-000.* is missing"):
        chosen(storage, "newest")


def test_what_is_no_checkpoint_is_not_taken_for_one(run: Storage) -> None:
    fence = start(run)
    write_all(run, intent_of(fence, 40), ranks=[0])
    write_all(run, intent_of(fence, 50), ranks=[0])
    abandon(run, fence, CheckpointId(3, 50), "no space")
    run.create(layout.tombstone(CheckpointId(1, 10)), b"")
    run.replace(layout.manifest(CheckpointId(1, 20)), b"{")
    for checkpoint, why in (
        (CheckpointId(3, 40), "it was never finished"),
        (CheckpointId(3, 50), r"it was given up \(no space\)"),
        (CheckpointId(1, 10), "it is being deleted"),
        (CheckpointId(1, 20), "MANIFEST.json cannot be read: is not JSON .*; finetune ckpt repair may help"),
    ):
        with pytest.raises(UnknownCheckpointError, match=why):
            manifest_of(run, checkpoint)


def test_what_is_deleted_while_it_is_read_is_not_called_damaged() -> None:
    storage = PosixStorage("/run", SimulatedDisk())
    fence = start(storage)
    first, second = save(storage, fence, 10), save(storage, fence, 20)
    sweep(storage, Retention(keep_last=1), fence)
    with (
        pytest.raises(UnknownCheckpointError, match="was deleted while it was read") as told,
        unless_deleted(storage, first.id),
    ):
        restored(storage, first)
    assert told.value.known == [str(second.id)]
    storage.delete([layout.shard(second.id, 0)])
    with pytest.raises(DamagedError), unless_deleted(storage, second.id):
        restored(storage, second)
