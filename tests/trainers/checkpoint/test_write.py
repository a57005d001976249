"""A rank writes its slices as they lie in memory, hashed on the way, and says so when they are durable."""

from __future__ import annotations

import pytest
from blake3 import blake3

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.documents import parse
from finetune_trainers.checkpoint.manifest import Receipt, TensorRecord
from finetune_trainers.checkpoint.shards import CHUNK_BYTES, Slice, chunk_digests, digest_of_digests
from finetune_trainers.checkpoint.storage.errors import StorageFullError
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.storage.resilient import ResilientStorage
from finetune_trainers.checkpoint.write import write_blob, write_rank
from tests.trainers.checkpoint import synthetic
from tests.trainers.checkpoint.faulting import FaultingStorage, Schedule, SimulatedDisk


def bytes_of(piece: Slice) -> memoryview:
    return next(synthetic.data(synthetic.intent(), [piece]))


def test_the_receipt_tells_files_slices_and_digests(storage: Storage) -> None:
    intent = synthetic.intent()
    held = synthetic.slices(intent, 1)
    receipt = write_rank(storage, intent, 1, held, bytes_of, {"rng.json": b"{}", "rng.safetensors": b"raw"})
    assert parse(storage.read(layout.receipt(intent.id, 1)), Receipt) == receipt
    (shard,) = receipt.shards
    assert storage.size(layout.folder(intent.id) + shard.file) == shard.bytes
    for extent, piece in zip(shard.extents, held, strict=True):
        data = bytes_of(piece)
        assert extent.digest == digest_of_digests(chunk_digests(data, CHUNK_BYTES))
        stored = storage.read_range(layout.shard(intent.id, 1), extent.offset, extent.offset + len(data))
        assert bytes(stored) == bytes(data)
    assert [(aux.name, aux.file, aux.digest) for aux in receipt.aux] == [
        ("rng", "aux-00001-rng.json", blake3(b"{}").hexdigest()),
        ("rng", "aux-00001-rng.safetensors", blake3(b"raw").hexdigest()),
    ]


def test_a_rank_that_holds_nothing_leaves_a_receipt_and_no_shard(storage: Storage) -> None:
    receipt = write_rank(storage, synthetic.intent(), 1, [], bytes_of, {})
    assert receipt.shards == ()
    assert [stored.name for stored in storage.list("")] == [layout.receipt(synthetic.intent().id, 1)]


@pytest.mark.parametrize("chunk", [CHUNK_BYTES, 3 * 4096])
def test_a_long_slice_goes_in_blocks_of_whole_chunks(storage: Storage, chunk: int) -> None:
    intent = synthetic.intent(tensors=(TensorRecord(name="x", shape=(5_000_000,), states={"param": "F32"}),))
    data = memoryview(bytes(range(250)) * 80_000)
    piece = Slice(0, "param", 0, 5_000_000)
    (shard,) = write_rank(storage, intent, 0, [piece], lambda _: data, {}, chunk_bytes=chunk).shards
    assert shard.extents[0].digest == digest_of_digests(chunk_digests(data, chunk))
    table = storage.read_range(layout.shard(intent.id, 0), shard.table_offset, shard.bytes)
    assert bytes(table) == chunk_digests(data, chunk)


def test_an_upload_that_starts_again_has_the_same_digests() -> None:
    intent = synthetic.intent()
    held = synthetic.slices(intent, 0)
    whole = write_rank(PosixStorage("/a", SimulatedDisk()), intent, 0, held, bytes_of, {})
    for at in range(1, 20):
        faulty = FaultingStorage(PosixStorage("/b", SimulatedDisk()), Schedule(at=at, kind="unavailable"))
        assert write_rank(ResilientStorage(faulty, sleep=lambda _: None), intent, 0, held, bytes_of, {}) == whole


def test_there_is_no_receipt_when_a_file_could_not_be_written() -> None:
    inner = PosixStorage("/run", SimulatedDisk())
    intent = synthetic.intent()
    with pytest.raises(StorageFullError):
        write_rank(
            FaultingStorage(inner, Schedule(at=5, kind="full")), intent, 0, synthetic.slices(intent, 0), bytes_of, {}
        )
    assert list(inner.list("")) == []


def test_a_shared_file_is_written_once_and_again_when_it_is_damaged(storage: Storage) -> None:
    made = []

    def parts() -> list[bytes]:
        made.append(1)
        return [b"content"]

    digest = blake3(b"content").hexdigest()
    records = [write_blob(storage, "tokenizer.json", parts, 7, digest) for _ in range(2)]
    assert len(made) == 1
    assert {record.digest for record in records} == {digest}
    storage.replace(layout.blob(digest), b"short")
    write_blob(storage, "tokenizer.json", parts, 7, digest)
    assert storage.read(layout.blob(digest)) == b"content"
