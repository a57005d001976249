"""Buckets that a job names: opened with a try at writing, and artifacts fetched out of them.

Called by `outputs` before and after training, and by `model_sources` for a model that another job wrote to a bucket.
Whatever the store refuses becomes a sentence with the field, the URI and what to do; keys are never a part of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from blake3 import blake3
from pydantic import Field, ValidationError

from finetune_api.base import Contract
from finetune_api.failures import Problem
from finetune_api.uris import Scheme, parse_uri
from finetune_trainers.artifact_folder import DIGESTS
from finetune_trainers.checkpoint.storage.errors import (
    StorageDeniedError,
    StorageMissingError,
    StorageUnavailableError,
)
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import StorageError, UserError
from finetune_trainers.places import appearing_whole, cache_folder

__all__ = ["STORAGE_FIELD", "fetch_artifact", "open_for_writing"]

STORAGE_FIELD = "FineTuneRuntime.spec.storage"
_FETCHED = "artifacts"
"""In the cache: one folder for each artifact that came from a bucket, named by its digest."""
_BLOCK_BYTES = 8 << 20
_WHO_AM_I = ("/latest/api/token", "/latest/meta-data", "169.254.170.", "computeMetadata")
"""Parts of the addresses where clouds tell their machines who they are: asked when no keys are at hand."""
_KEYS = {
    Scheme.S3: "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_REGION and AWS_ENDPOINT_URL, where it is not AWS)",
    Scheme.GS: "GOOGLE_APPLICATION_CREDENTIALS",
}


class _Listed(Contract):
    """A file in digests.json."""

    blake3: str
    bytes: int


class _DigestList(Contract):
    """As `artifact_folder.digest_list` writes it."""

    kind: str
    base: dict[str, object]
    files: dict[str, _Listed] = Field(min_length=1)


def open_for_writing(to: str, field: str) -> Storage:
    """The storage at `to`, which `field` names, after something was written there and deleted again. Raises UserError
    for what a person must mend, StorageError when the store does not answer."""
    try:
        return open_storage(to)
    except (StorageDeniedError, StorageMissingError, StorageUnavailableError) as error:
        raise _explained(error, to, field, "cannot be written to") from None


def fetch_artifact(source: str, field: str) -> Path:
    """The artifact at `source`, which `field` names, as a folder of this machine's cache: verified file by file, and
    fetched once. Raises UserError, StorageError."""
    storage = open_storage(source, exclusive=True)
    try:
        data = storage.read(DIGESTS)
    except StorageMissingError:
        raise _refused(field, source, _what_is_there(storage)) from None
    except (StorageDeniedError, StorageUnavailableError) as error:
        raise _explained(error, source, field, "cannot be read") from None
    listed = _parsed(data, source, field)
    folder = cache_folder() / _FETCHED / blake3(data).hexdigest()
    if folder.is_dir():
        return folder
    with appearing_whole(folder, others_will_do=True) as unfinished:
        for name, file in listed.files.items():
            _fetch(storage, name, file, unfinished / name)
        (unfinished / DIGESTS).write_bytes(data)
    return folder


def _fetch(storage: Storage, name: str, file: _Listed, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = blake3()
    with path.open("wb") as out:
        for block in _blocks(storage, name, file.bytes):
            digest.update(block)
            out.write(block)
    if digest.hexdigest() != file.blake3:
        raise StorageError(f"{storage.uri}: {name} is not what {DIGESTS} says; write the artifact anew")


def _blocks(storage: Storage, name: str, size: int) -> Iterator[bytes | memoryview]:
    for start in range(0, size, _BLOCK_BYTES):
        yield storage.read_range(name, start, min(start + _BLOCK_BYTES, size))


def _parsed(data: bytes, source: str, field: str) -> _DigestList:
    """The list of digests, if no name in it leads out of the artifact's folder."""
    try:
        listed = _DigestList.model_validate(json.loads(data))
    except (ValueError, ValidationError):
        raise _refused(
            field, source, f"has a {DIGESTS} that cannot be read; name an artifact that a job wrote"
        ) from None
    for name in listed.files:
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts or "\\" in name:
            raise _refused(field, source, f"has a {DIGESTS} that names {name!r}; name an artifact that a job wrote")
    return listed


def _what_is_there(storage: Storage) -> str:
    try:
        is_empty = next(iter(storage.list("")), None) is None
    except StorageMissingError:
        is_empty = True
    if is_empty:
        return "nothing is there; correct the place, or the endpoint and the keys that it is looked for with"
    return (
        f"has no {DIGESTS}, so nothing tells whether it is whole: name an artifact that a job wrote there by"
        " spec.outputs, whose last file that is"
    )


def _explained(error: StorageError, place: str, field: str, what: str) -> StorageError | UserError:
    """What the store said, by what follows from it."""
    said = error.message.partition(": ")[2] or error.message
    scheme = parse_uri(place).scheme
    keys = _KEYS[scheme]
    if any(part in said for part in _WHO_AM_I):
        return _refused(field, place, f"{what}, because there are no keys to it; {_remedy(keys)}")
    if isinstance(error, StorageUnavailableError):
        return StorageError(f"{field}: {place} {what} now, and may be in a while: {said}")
    if "NoSuchBucket" in said:
        return _refused(field, place, f"{what}: there is no such bucket; make it, or correct the name ({said})")
    return _refused(field, place, f"{what} with the keys at hand ({said}); {_remedy(keys)}, with the right to do so")


def _remedy(keys: str) -> str:
    return (
        f"in a cluster name a Secret by the runtime's storageSecret or by spec.cluster.pods.env, elsewhere set {keys}"
    )


def _refused(field: str, place: str, message: str) -> UserError:
    problem = Problem(path=field, value=place, message=message)
    return UserError(str(problem), [problem])
