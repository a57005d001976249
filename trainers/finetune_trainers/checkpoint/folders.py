"""A folder of files that many checkpoints share, as blobs: the best parameters so far. Called by `saving` on rank 0.

A file is stored once however many checkpoints name it, and swept when none does.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from blake3 import blake3

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.manifest import BlobRecord
from finetune_trainers.checkpoint.reading import DamagedError
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.write import write_blob

__all__ = ["fetch_folder", "folder_records", "store_folder"]

_BLOCK_BYTES = 8 << 20


def folder_records(folder: Path) -> tuple[BlobRecord, ...]:
    """The folder's files, with digests; none when it is not there. Files in folders below are left out."""
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return tuple(BlobRecord(name=file.name, digest=_digest(file), bytes=file.stat().st_size) for file in files)


def store_folder(storage: Storage, folder: Path, records: Sequence[BlobRecord]) -> None:
    """Write the files that the storage does not have. An intent that names them has been announced before."""
    for record in records:
        write_blob(storage, record.name, partial(_blocks, folder / record.name), record.bytes, record.digest)


def fetch_folder(storage: Storage, records: Sequence[BlobRecord], folder: Path) -> None:
    """Put the files back, verified, in the place of what is there. Raises DamagedError."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for record in records:
        place, digest = layout.blob(record.digest), blake3()
        with (folder / record.name).open("wb") as file:
            for start in range(0, record.bytes, _BLOCK_BYTES):
                block = storage.read_range(place, start, min(start + _BLOCK_BYTES, record.bytes))
                digest.update(block)
                file.write(block)
        if digest.hexdigest() != record.digest:
            raise DamagedError(f"{place} ({record.name}) does not hold what its name says")


def _digest(file: Path) -> str:
    digest = blake3()
    for block in _blocks(file):
        digest.update(block)
    return digest.hexdigest()


def _blocks(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while block := opened.read(_BLOCK_BYTES):
            yield block
