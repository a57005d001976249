"""Whatever is changed in a checkpoint is noticed: which file, and which elements of which tensor.

400 corruptions are tried; 10,000 with FINETUNE_LONG=1.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable

import pytest

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.documents import canonical
from finetune_trainers.checkpoint.find import Rejected, find_newest
from finetune_trainers.checkpoint.manifest import Extent, Manifest
from finetune_trainers.checkpoint.reading import DamagedError
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.verify import Damage
from tests.trainers.checkpoint.faulting import SimulatedDisk
from tests.trainers.checkpoint.saving import CHUNK, original, restored, save, start
from tests.trainers.checkpoint.test_crashes import blob, put

NUM_CORRUPTIONS = 10_000 if os.environ.get("FINETUNE_LONG") else 400


class Victim:
    """A run with checkpoints at steps 10 and 20, of which the newer is damaged and then mended again."""

    def __init__(self) -> None:
        self.storage = PosixStorage("/run", SimulatedDisk())
        fence = start(self.storage)
        put(self.storage, b"tokenizer" * 100)
        self.older = save(self.storage, fence, 10)
        self.newer = save(self.storage, fence, 20, blobs=(blob(b"tokenizer" * 100),))
        prefix = layout.folder(self.newer.id)
        self.files = {stored.name: self.storage.read(stored.name) for stored in self.storage.list(prefix)}
        self.files |= {stored.name: self.storage.read(stored.name) for stored in self.storage.list(layout.BLOBS)}

    def put(self, name: str, content: bytes | None) -> None:
        if content is None:
            self.storage.delete([name])
        else:
            self.storage.replace(name, content)

    def rejected(self) -> Rejected:
        """Deep verification finds the damage, and the older one in its place."""
        search = find_newest(self.storage, deep=True)
        assert search.manifest == self.older
        (rejected,) = search.rejected
        assert rejected.checkpoint == self.newer.id
        return rejected


@pytest.fixture(scope="module")
def victim() -> Victim:
    return Victim()


Change = Callable[[random.Random, Victim, str], dict[str, bytes | None]]


def flipped(rng: random.Random, victim: Victim, name: str) -> dict[str, bytes | None]:
    data = bytearray(victim.files[name])
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return {name: bytes(data)}


def cut(rng: random.Random, victim: Victim, name: str) -> dict[str, bytes | None]:
    return {name: victim.files[name][: rng.randrange(len(victim.files[name]))]}


def grown(rng: random.Random, victim: Victim, name: str) -> dict[str, bytes | None]:
    return {name: victim.files[name] + rng.randbytes(rng.randint(1, 5000))}


def zeroed(rng: random.Random, victim: Victim, name: str) -> dict[str, bytes | None]:
    """A page that never reached the medium, where it was not zero before."""
    data = bytearray(victim.files[name])
    start_ = rng.randrange(len(data)) // 4096 * 4096
    end = min(start_ + 4096, len(data))
    data[start_:end] = bytes(end - start_)
    return {name: bytes(data)} if bytes(data) != victim.files[name] else flipped(rng, victim, name)


def deleted(rng: random.Random, victim: Victim, name: str) -> dict[str, bytes | None]:
    return {name: None} if name != layout.manifest(victim.newer.id) else cut(rng, victim, name)


def stale(rng: random.Random, victim: Victim, name: str) -> dict[str, bytes | None]:
    """The file of the same name from the older checkpoint."""
    older = name.replace(str(victim.newer.id), str(victim.older.id))
    content = victim.storage.read(older) if older != name else b"stale"
    return {name: content} if content != victim.files[name] else cut(rng, victim, name)


def swapped(rng: random.Random, victim: Victim, name: str) -> dict[str, bytes | None]:
    """Two files change places."""
    others = [other for other in victim.files if victim.files[other] != victim.files[name]]
    other = rng.choice(others)
    return {name: victim.files[other], other: victim.files[name]}


CHANGES: tuple[Change, ...] = (flipped, flipped, flipped, cut, grown, zeroed, deleted, stale, swapped)


@pytest.mark.parametrize("batch", range(8))
def test_every_corruption_is_noticed_and_its_file_named(victim: Victim, batch: int) -> None:
    rng = random.Random(batch)
    for _ in range(NUM_CORRUPTIONS // 8):
        name, change = rng.choice(list(victim.files)), rng.choice(CHANGES)
        changed = change(rng, victim, name)
        try:
            for file, content in changed.items():
                victim.put(file, content)
            named = {damage.file for damage in victim.rejected().damages}
            assert named & changed.keys(), f"{change.__name__} of {name}"
        finally:
            for file in changed:
                victim.put(file, victim.files[file])
    assert find_newest(victim.storage, deep=True).manifest == victim.newer


def placed(manifest: Manifest) -> list[tuple[str, Extent]]:
    folder = layout.folder(manifest.id)
    return [
        (folder + shard.file, extent)
        for receipt in manifest.receipts
        for shard in receipt.shards
        for extent in shard.extents
    ]


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_a_slice_is_told_by_its_elements(victim: Victim, seed: int) -> None:
    rng = random.Random(seed)
    file, extent = rng.choice(placed(victim.newer))
    element = rng.randrange(extent.start, extent.end)
    data = bytearray(victim.files[file])
    data[extent.offset + (element - extent.start) * 4] ^= 0x10
    victim.put(file, bytes(data))
    try:
        (damage,) = victim.rejected().damages
    finally:
        victim.put(file, victim.files[file])
    chunk = (element - extent.start) // (CHUNK // 4)
    first = extent.start + chunk * (CHUNK // 4)
    assert damage == Damage(
        file,
        "the bytes are not those that were saved",
        victim.newer.key(extent),
        first,
        min(first + CHUNK // 4, extent.end),
    )
    assert f"{extent.state} [{first}, " in str(damage)


def test_a_changed_digest_beside_the_data_is_told_from_changed_data(victim: Victim) -> None:
    shard = victim.newer.receipts[0].shards[0]
    file = layout.folder(victim.newer.id) + shard.file
    for position in range(shard.bytes - 1, shard.table_offset - 1, -1):  # the first slice's last
        data = bytearray(victim.files[file])
        data[position] ^= 1
        victim.put(file, bytes(data))
        (damage,) = victim.rejected().damages
        assert damage.what == "the digests beside these elements are not those that were saved"
        assert damage.key in {victim.newer.key(extent) for extent in shard.extents}
    with pytest.raises(DamagedError, match="the bytes, or the digests beside them, are not those that were saved"):
        restored(victim.storage, victim.newer, 0, 3)
    victim.put(file, victim.files[file])


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_reader_notices_exactly_what_it_reads(victim: Victim, world: int) -> None:
    rng = random.Random(world)
    for _ in range(20):
        file, extent = rng.choice(placed(victim.newer))
        element = rng.randrange(extent.start, extent.end)
        data = bytearray(victim.files[file])
        data[extent.offset + (element - extent.start) * 4 + 2] ^= 1
        victim.put(file, bytes(data))
        try:
            numel = victim.newer.intent.tensors[extent.tensor].numel
            for rank in range(world):
                each = -(-numel // world)
                needs_it = rank * each <= element < (rank + 1) * each
                if needs_it:
                    with pytest.raises(DamagedError, match=f"{file} model .* {extent.state}"):
                        restored(victim.storage, victim.newer, rank, world)
                else:
                    _may_read(victim.storage, victim.newer, rank, world)
        finally:
            victim.put(file, victim.files[file])


def _may_read(storage: Storage, manifest: Manifest, rank: int, world: int) -> None:
    """A neighbour notices too when the element lies in a chunk that it shares; what it returns is right in any case."""
    try:
        found = restored(storage, manifest, rank, world)
    except DamagedError:
        return
    assert found == original(manifest.intent, rank, world)


def edited(data: bytes, edit: Callable[[dict[str, object]], None]) -> bytes:
    """Somebody's careful edit, with the digest made again."""
    document = json.loads(data)
    del document["digest"]
    edit(document)
    digest = hashlib.sha256(canonical(document)).hexdigest()
    return canonical(document | {"digest": digest})


def other_step(document: dict[str, object]) -> None:
    document["intent"]["step"] = 19  # type: ignore[index]


def other_rate(document: dict[str, object]) -> None:
    document["intent"]["paramGroups"] = []  # type: ignore[index]
    document["intent"]["globalBatch"] = 512  # type: ignore[index]


def other_place(document: dict[str, object]) -> None:
    extents = document["receipts"][0]["shards"][0]["extents"]  # type: ignore[index]
    extents[0][5], extents[1][5] = extents[1][5], extents[0][5]


def one_rank_less(document: dict[str, object]) -> None:
    document["receipts"] = document["receipts"][:1]  # type: ignore[index]


@pytest.mark.parametrize("edit", [other_step, other_rate, other_place, one_rank_less])
def test_a_manifest_that_was_edited_with_care_does_not_fit_its_intent_and_receipts(
    victim: Victim, edit: Callable[[dict[str, object]], None]
) -> None:
    name = layout.manifest(victim.newer.id)
    victim.put(name, edited(victim.files[name], edit))
    try:
        assert victim.rejected().damages
    finally:
        victim.put(name, victim.files[name])


def test_quick_verification_notices_all_but_changed_bytes_of_data(victim: Victim) -> None:
    for name, content in victim.files.items():
        victim.put(name, content[:-1])
        search = find_newest(victim.storage)
        victim.put(name, content)
        assert search.manifest == victim.older
        assert any(damage.file == name for damage in search.rejected[0].damages)
