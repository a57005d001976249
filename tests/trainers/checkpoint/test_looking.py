"""What is listed and shown is what is there."""

from __future__ import annotations

import pytest

from finetune_api.checkpoints import CheckpointState
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.looking import details, listing_of
from finetune_trainers.checkpoint.commit import abandon
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.manifest import Parent
from finetune_trainers.checkpoint.pins import pin
from finetune_trainers.checkpoint.retention import Best, Retention
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.sweep import sweep
from tests.trainers.checkpoint import synthetic
from tests.trainers.checkpoint.faulting import SimulatedDisk
from tests.trainers.checkpoint.saving import intent_of, save, start, write_all
from tests.trainers.checkpoint.synthetic import NOON
from tests.trainers.checkpoint.test_crashes import blob, put

ALL = Retention(keep_last=None)


def motley(storage: Storage) -> Storage:
    """One of each: whole, damaged, unfinished, abandoned, deleting; and a shared file."""
    fence = start(storage)
    put(storage, b"tokenizer" * 50)
    for step in (10, 20, 30):
        save(storage, fence, step, metrics={"loss": 1.0 / step}, blobs=(blob(b"tokenizer" * 50),))
    storage.create(layout.tombstone(CheckpointId(1, 10)), b"")
    storage.delete([layout.shard(CheckpointId(1, 30), 1)])
    write_all(storage, intent_of(fence, 40), ranks=[1])
    write_all(storage, intent_of(fence, 50), ranks=[])
    abandon(storage, fence, CheckpointId(1, 50), "no space")
    return storage


def test_every_state_is_told_newest_first_with_its_reason(storage: Storage) -> None:
    found = listing_of(motley(storage), ALL, NOON)
    assert [(row.step, row.state) for row in found.checkpoints] == [
        (50, CheckpointState.ABANDONED),
        (40, CheckpointState.UNFINISHED),
        (30, CheckpointState.DAMAGED),
        (20, CheckpointState.WHOLE),
        (10, CheckpointState.DELETING),
    ]
    rows = {row.step: row for row in found.checkpoints}
    assert rows[50].problems == ["no space"]
    assert rows[40].problems == ["1 of 2 receipts are there"]
    assert rows[30].problems == ["ckpt/0000000030-e00001/shard-00001-000.safetensors: is missing"]
    assert rows[20].problems == []
    assert found.newest == "0000000020-e00001"
    assert (rows[20].world_size, rows[20].zero_stage, rows[20].metrics) == (2, 3, {"loss": 0.05})
    assert (rows[40].world_size, rows[10].world_size) == (2, None)
    assert [rows[step].keep for step in (50, 40, 10)] == [None, None, None]


def test_the_total_is_that_of_all_files_of_checkpoints(storage: Storage) -> None:
    found = listing_of(motley(storage), ALL, NOON)
    everything = {stored.name: stored.bytes for stored in storage.list("")}
    others = sum(size for name, size in everything.items() if name.startswith(("FENCE/", "HEAD")))
    assert found.bytes == sum(everything.values()) - others
    assert found.shared_bytes == 450


def test_a_place_where_nothing_was_saved_yet_is_empty(storage: Storage) -> None:
    start(storage)
    found = listing_of(storage, ALL, NOON)
    assert (found.checkpoints, found.newest, found.bytes) == ([], None, 0)
    assert found.activity is not None
    assert found.activity.at_work


@pytest.mark.parametrize(
    "policy",
    [
        ALL,
        Retention(keep_last=1),
        Retention(keep_last=2, keep_every=20),
        Retention(keep_last=1, keep_best=Best(metric="loss", mode="max")),
        Retention(keep_last=None, quota_bytes=100_000),
    ],
)
def test_what_a_list_says_will_go_is_what_a_sweep_deletes(policy: Retention) -> None:
    storage = PosixStorage("/run", SimulatedDisk())
    fence = start(storage)
    for step in (10, 20, 30, 40, 50):
        save(storage, fence, step, metrics={"loss": 1.0 / step})
    pin(storage, CheckpointId(1, 20), "ann", "for the paper", NOON)
    storage.delete([layout.shard(CheckpointId(1, 50), 0)])
    rows = listing_of(storage, policy, NOON).checkpoints
    goes = {row.id for row in rows if row.keep is False}
    assert {str(checkpoint) for checkpoint in sweep(storage, policy, fence).deleted} == goes
    assert all(row.reasons for row in rows)


def test_a_pin_is_shown_with_who_and_why(storage: Storage) -> None:
    fence = start(storage)
    for step in (10, 20, 30):
        save(storage, fence, step)
    pin(storage, CheckpointId(1, 10), "ann", "for the paper", NOON)
    storage.create(layout.pin(CheckpointId(1, 20)), b"damaged")
    pins = [row.pin for row in listing_of(storage, Retention(keep_last=1), NOON).checkpoints]
    assert pins[0] is None
    assert pins[1] is not None
    assert pins[1].by is None
    assert pins[2] is not None
    assert (pins[2].by, pins[2].reason, pins[2].created) == ("ann", "for the paper", NOON)


def test_details_are_those_of_the_intent(storage: Storage) -> None:
    intent = synthetic.intent()
    fence = start(storage)
    manifest = save(
        storage,
        fence,
        10,
        tensors=intent.tensors,
        param_groups=intent.param_groups,
        parent=Parent(step=5, epoch=1),
        writer={"torch": "2.13.0"},
        adapter={"rank": 16},
        blobs=(),
        metrics={"loss": 0.5},
    )
    found = details(storage, manifest.id, with_tensors=False)
    assert (found.num_tensors, found.num_parameters) == (6, 37 * 8 + 5 + 1 + 64 * 65 + 9)
    assert found.parent == "0000000005-e00001"
    assert (found.writer, found.adapter, found.tensors) == ({"torch": "2.13.0"}, {"rank": 16}, None)
    assert [(one.state, one.dtype, one.num_tensors, one.bytes) for one in found.states] == [
        ("param", "F32", 5, 4 * 4462),
        ("exp_avg", "F32", 5, 4 * 4462),
        ("exp_avg_sq", "F32", 5, 4 * 4462),
        ("value", "BF16", 1, 18),
    ]
    assert [(group.name, group.num_tensors, group.options["lr"]) for group in found.groups] == [("decay", 5, 1e-3)]
    assert sum(file.bytes for file in found.files) == found.summary.bytes
    assert {file.rank for file in found.files if file.name.startswith("shard")} == {0, 1}


def test_tensors_are_listed_when_they_are_asked_for(storage: Storage) -> None:
    manifest = save(storage, start(storage), 10)
    tensors = details(storage, manifest.id, with_tensors=True).tensors
    assert tensors is not None
    assert [(one.name, one.shape, one.states) for one in tensors] == [
        ("weight", [70, 40], {"param": "F32", "exp_avg": "F32"}),
        ("bias", [3], {"param": "F32"}),
    ]
