"""Any rank of any world size gets its elements, to the bit, for hardly more bytes than they have."""

from __future__ import annotations

import pytest

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.commit import publish
from finetune_trainers.checkpoint.manifest import Manifest, SliceKey, TensorRecord
from finetune_trainers.checkpoint.reading import DamagedError, SliceReader
from finetune_trainers.checkpoint.slices import Wanted, even_slice
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.write import announce, write_rank
from tests.trainers.checkpoint import synthetic
from tests.trainers.checkpoint.saving import CHUNK, intent_of, original, restored, save, start


@pytest.mark.parametrize("old", [1, 2, 3, 5])
def test_every_world_size_restores_every_other(storage: Storage, old: int) -> None:
    manifest = save(storage, start(storage), 10, world=old)
    for new in (1, 2, 3, 4, 7):
        for rank in range(new):
            assert restored(storage, manifest, rank, new) == original(manifest.intent, rank, new)


def test_a_rank_of_the_same_world_reads_its_own_bytes_and_nothing_else(storage: Storage) -> None:
    manifest = save(storage, start(storage), 10, world=2)
    wanted = [
        Wanted(SliceKey("model", tensor.name, state), *even_slice(tensor.numel, 1, 2))
        for tensor in manifest.intent.tensors
        for state in tensor.states
    ]
    plan = SliceReader(storage, manifest).plan(wanted)
    assert plan.amplification == 1.0
    assert len(plan.reads.reads) == 2, "one for each file of the rank"


def test_one_state_can_be_read_alone(storage: Storage) -> None:
    manifest = save(storage, start(storage), 10, world=3)
    want = Wanted(SliceKey("model", "weight", "param"), 0, 2800)
    target = memoryview(bytearray(2800 * 4))
    plan = SliceReader(storage, manifest).read({want: target})
    assert bytes(target) == original(manifest.intent)[want.key]
    assert plan.amplification == 1.0


def test_requests_are_no_longer_than_they_may_be(storage: Storage) -> None:
    manifest = save(storage, start(storage), 10, world=1)
    want = Wanted(SliceKey("model", "weight", "exp_avg"), 7, 2790)
    target = memoryview(bytearray(2783 * 4))
    plan = SliceReader(storage, manifest, max_read=4096).read({want: target})
    assert len(plan.reads.reads) == 3
    assert all(read.end - read.start <= 4096 for read in plan.reads.reads)
    assert bytes(target) == original(manifest.intent)[want.key][28:11160]


def test_what_a_checkpoint_does_not_hold_is_refused_before_anything_is_read(storage: Storage) -> None:
    manifest = save(storage, start(storage), 10)
    with pytest.raises(ValueError, match=r"model weight exp_avg_sq: elements \[0, 1\) are wanted and not all are held"):
        SliceReader(storage, manifest).plan([Wanted(SliceKey("model", "weight", "exp_avg_sq"), 0, 1)])


def test_two_roles_may_have_tensors_of_one_name(storage: Storage) -> None:
    tensors = tuple(
        TensorRecord(role=role, name="w", shape=(100,), states={"param": "F32"}) for role in ("actor", "critic")
    )
    manifest = save(storage, start(storage), 10, tensors=tensors)
    assert restored(storage, manifest) == original(manifest.intent)
    assert len(set(restored(storage, manifest).values())) == 2


def test_wants_that_share_a_chunk_both_get_what_they_asked_for(storage: Storage) -> None:
    """The chunk is read once, and cannot lie in the memory of both."""
    manifest = save(storage, start(storage), 10, world=1)
    key = SliceKey("model", "weight", "param")
    whole = original(manifest.intent)[key]
    wants = [Wanted(key, 0, 1500), Wanted(key, 1500, 1501), Wanted(key, 1501, 2800)]
    targets = {want: memoryview(bytearray((want.end - want.start) * 4)) for want in wants}
    SliceReader(storage, manifest).read(targets)
    assert b"".join(targets.values()) == whole


@pytest.fixture
def in_one_file(storage: Storage) -> Manifest:
    """Three tensors of two and a bit chunks each, in one file."""
    fence = start(storage)
    tensors = tuple(TensorRecord(name=name, shape=(2100,), states={"param": "F32"}) for name in ("a", "b", "c"))
    intent = intent_of(fence, 10, 1, tensors=tensors)
    announce(storage, intent)
    slices = synthetic.slices(intent, 0)
    write_rank(storage, intent, 0, slices, lambda piece: next(synthetic.data(intent, [piece])), {}, 20 * CHUNK, CHUNK)
    return publish(storage, fence, intent.id)


@pytest.mark.parametrize("names", ["a", "c", "ab", "ac", "bca"])
def test_the_digests_of_what_is_read_in_part_are_one_request_for_a_file(
    storage: Storage, in_one_file: Manifest, names: str
) -> None:
    wants = [Wanted(SliceKey("model", name, "param"), 3, 900) for name in names]
    targets = {want: memoryview(bytearray(897 * 4)) for want in wants}
    plan = SliceReader(storage, in_one_file).read(targets)
    assert plan.num_requests == len(plan.reads.reads) + 1
    for want, target in targets.items():
        assert bytes(target) == original(in_one_file.intent)[want.key][12:3600]


def test_digests_that_cannot_be_read_are_damage_that_says_why(storage: Storage, in_one_file: Manifest) -> None:
    file = layout.shard(in_one_file.id, 0)
    storage.replace(file, storage.read(file)[:-1])
    want = Wanted(SliceKey("model", "c", "param"), 3, 900)
    with pytest.raises(DamagedError, match=r"shard-00000-000\.safetensors model c param .*: bytes .* are wanted"):
        SliceReader(storage, in_one_file).read({want: memoryview(bytearray(897 * 4))})
