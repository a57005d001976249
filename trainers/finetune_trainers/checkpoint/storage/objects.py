"""A bucket as a storage: S3, what speaks like it, and GCS, through obstore (the Rust library object_store).

Shards go up in one conditional put each, which the store checks by SHA-256. Larger files, of exports, are multipart
uploads, several parts at once, that appear whole when they are completed. obstore repeats a request that failed on its
way, with growing and jittered pauses; `resilient` repeats what it gives up.

What an upload leaves whose writer died is invisible and costs space only. `multiparts` finds and aborts it where the
keys are at hand; elsewhere a bucket that takes exports needs a lifecycle rule that aborts incomplete multipart uploads.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from finetune_trainers.checkpoint.storage.errors import (
    StorageConflictError,
    StorageDeniedError,
    StorageError,
    StorageFullError,
    StorageMissingError,
    StorageTornError,
    StorageUnavailableError,
)
from finetune_trainers.checkpoint.storage.protocol import Parts, Requests, Stored, check_whole, fill

if TYPE_CHECKING:
    from finetune_trainers.checkpoint.storage.multiparts import Uploads

__all__ = ["ObjectStorage"]

_SINGLE_BYTES = 65 << 20
"""A shard with its header and digests goes up in one conditional request."""
_PART_BYTES = 16 << 20
_PARTS_AT_ONCE = 8
_REQUESTS_AT_ONCE = 32
_BY_WORD: dict[str, type[StorageError]] = {
    "NoSuchBucket": StorageDeniedError,
    "NotImplemented": StorageDeniedError,
    "501 Not Implemented": StorageDeniedError,
    "InvalidRange": StorageTornError,
    "BadDigest": StorageTornError,
    "XAmzContentSHA256Mismatch": StorageTornError,
    "StorageFull": StorageFullError,
    "QuotaExceeded": StorageFullError,
    "InsufficientStorage": StorageFullError,
    "NoSpaceLeft": StorageFullError,
}


class ObjectStorage:
    """Objects below one prefix of a bucket. `store` is an obstore store of the bucket."""

    def __init__(
        self, store: Any, prefix: str, uri: str, exclusive: bool = True, uploads: Uploads | None = None
    ) -> None:
        """`exclusive`: whether the store honours conditional puts; `opening` finds out. `uploads`: those of the bucket
        that are not completed, where they can be listed."""
        self._store = store
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._uri = uri
        self._exclusive = exclusive
        self._uploads = uploads
        self._slots = threading.BoundedSemaphore(_REQUESTS_AT_ONCE)

    requests = Requests(longest=8 << 20, at_once=8, buffered=True)
    """Longer ones take more time: memory that is given back and taken again must be cleared by the kernel each time."""

    @property
    def uri(self) -> str:
        return self._uri

    @property
    def exclusive(self) -> bool:
        return self._exclusive

    def write(self, name: str, parts: Parts, size: int) -> None:
        import obstore

        if size <= _SINGLE_BYTES:
            self.create(name, b"".join(parts()))
            return
        self._request(
            name,
            lambda key: obstore.put(
                self._store,
                key,
                iter(parts()),
                use_multipart=True,
                chunk_size=_PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            ),
        )

    def create(self, name: str, data: bytes) -> None:
        import obstore

        if not self._exclusive and self.size(name) is not None:
            raise StorageConflictError(f"{name} is there already")
        mode: Any = "create" if self._exclusive else "overwrite"
        self._request(name, lambda key: obstore.put(self._store, key, data, mode=mode, use_multipart=False))

    def replace(self, name: str, data: bytes) -> None:
        import obstore

        self._request(name, lambda key: obstore.put(self._store, key, data, use_multipart=False))

    def read(self, name: str) -> bytes:
        import obstore

        data: bytes = self._request(name, lambda key: bytes(obstore.get(self._store, key).bytes()))
        return data

    def read_range(self, name: str, start: int, end: int) -> memoryview:
        import obstore

        if start == end:
            return memoryview(b"")
        data: memoryview = self._request(
            name, lambda key: memoryview(obstore.get_range(self._store, key, start=start, end=end))
        )
        check_whole(name, start, end - start, len(data))
        return data

    def read_into(self, name: str, start: int, parts: Sequence[memoryview]) -> None:
        fill(parts, self.read_range(name, start, start + sum(map(len, parts))))

    def size(self, name: str) -> int | None:
        import obstore

        try:
            return int(self._request(name, lambda key: obstore.head(self._store, key))["size"])
        except StorageMissingError:
            return None

    def list(self, prefix: str) -> Iterator[Stored]:
        import obstore

        pages = iter(obstore.list(self._store, self._prefix + prefix, chunk_size=1000))
        while (page := self._request(prefix, lambda _: next(pages, None))) is not None:
            for item in page:
                yield Stored(item["path"][len(self._prefix) :], int(item["size"]))

    def delete(self, names: Sequence[str]) -> None:
        import obstore

        for first in range(0, len(names), 1000):
            keys = [self._prefix + name for name in names[first : first + 1000]]
            try:
                self._request(names[first], lambda _, keys=keys: obstore.delete(self._store, keys))  # type: ignore[misc]
            except StorageMissingError:
                continue

    def prune(self, folder: str) -> None:
        """A bucket has no folders."""

    def unfinished(self, older_than_seconds: float) -> Sequence[str] | None:
        """As `name#upload`."""
        if self._uploads is None or (found := self._uploads.open(self._prefix)) is None:
            return None
        old = [upload for upload in found if upload.age_seconds > older_than_seconds]
        return [f"{upload.key[len(self._prefix) :]}#{upload.id}" for upload in old]

    def discard(self, unfinished: Sequence[str]) -> None:
        assert self._uploads is not None, "it has told of them"
        for told in unfinished:
            name, _, upload = told.rpartition("#")
            self._uploads.abort(self._prefix + name, upload)

    def free_bytes(self) -> int | None:
        return None

    def _request(self, name: str, call: Callable[[str], Any]) -> Any:
        with self._slots, _named(name):
            return call(self._prefix + name)


@contextmanager
def _named(name: str) -> Iterator[None]:
    """obstore's errors become StorageErrors that name the object. The cause is not kept: its text holds headers."""
    from obstore import exceptions

    try:
        yield
    except (exceptions.AlreadyExistsError, exceptions.PreconditionError):
        raise StorageConflictError(f"{name} is there already") from None
    except (exceptions.BaseError, OSError) as error:
        raise _kind(error)(f"{name}: {_brief(error)}") from None


def _kind(error: Exception) -> type[StorageError]:
    """By the store's own words first: object_store has few errors of its own."""
    from obstore import exceptions

    text = str(error)
    for word, kind in _BY_WORD.items():
        if word in text:
            return kind
    if isinstance(error, FileNotFoundError):
        return StorageMissingError
    refused = (
        exceptions.InvalidPathError,
        exceptions.NotSupportedError,
        exceptions.PermissionDeniedError,
        exceptions.UnauthenticatedError,
        exceptions.UnknownConfigurationKeyError,
    )
    return StorageDeniedError if isinstance(error, refused) else StorageUnavailableError


def _brief(error: Exception) -> str:
    """The store's code and sentence, or the first line: obstore appends the chain of causes, headers included."""
    said = re.search(r"<Code>([^<]*)</Code>(?:\s*<Message>([^<]*)</Message>)?", str(error))
    if said:
        return ": ".join(part for part in said.groups() if part)
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:500]
