"""What a storage is: names and bytes, in a dozen verbs. Implemented by `posix` and `objects`, wrapped by `resilient`.

Synchronous on purpose. Its caller is a writer in a process of its own with a handful of threads; system calls, digests
and the object store's library all release the interpreter's lock, and no disk has an asynchronous interface anyway.

One primitive carries the whole commit protocol: `create`, which of all who try at once lets one succeed. POSIX has it
as link(2), S3 as `If-None-Match: *`, GCS as generation 0. Compare-and-swap is not needed, since nothing that decides
is ever changed in place: a newer fence is another file. So it also works where only creating is conditional.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from finetune_trainers.checkpoint.storage.errors import StorageTornError

__all__ = ["Parts", "Requests", "Storage", "Stored", "check_whole", "fill"]

Parts = Callable[[], Iterable[bytes | memoryview]]
"""Makes the content of a file, part by part; called again when writing starts again."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A file as a listing has it."""

    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class Requests:
    """How a large amount is best read."""

    longest: int
    """Bytes of each."""
    at_once: int
    buffered: bool
    """Whether each brings memory of its own beside what it is to fill."""


class Storage(Protocol):
    """Files under one root. Names are relative, with `/` between parts (`layout`). Errors are those of `errors`.

    What a call has written is durable when it returns. A file is there whole or not at all.
    """

    @property
    def uri(self) -> str:
        """Where the root is, for people."""

    @property
    def exclusive(self) -> bool:
        """Whether `create` holds against everybody. Where it does not, two attempts that run at once may both publish;
        readers then take the later attempt's, and nothing is torn."""

    @property
    def requests(self) -> Requests:
        """How much is best read from it."""

    def write(self, name: str, parts: Parts, size: int) -> None:
        """A large file of `size` bytes under a name that nobody else writes."""

    def create(self, name: str, data: bytes) -> None:
        """A small file. StorageConflictError when there is one of that name, which then stays as it is. (`resilient`
        takes one with the very same bytes for its own.)"""

    def replace(self, name: str, data: bytes) -> None:
        """A small file in the place of any that is there."""

    def read(self, name: str) -> bytes:
        """A small file."""

    def read_range(self, name: str, start: int, end: int) -> bytes | memoryview:
        """Bytes [start, end). StorageTornError when the file ends before."""

    def read_into(self, name: str, start: int, parts: Sequence[memoryview]) -> None:
        """Fill one part after the other with the bytes from `start` on. StorageTornError when the file ends before."""

    def size(self, name: str) -> int | None:
        """Bytes; None when there is no such file."""

    def list(self, prefix: str) -> Iterator[Stored]:
        """All files whose names begin with `prefix`, which ends with a slash or is empty; in no order."""

    def delete(self, names: Sequence[str]) -> None:
        """Those that are not there are no error."""

    def prune(self, folder: str) -> None:
        """Remove what is left of a folder whose files are deleted: unfinished files, the folder itself."""

    def unfinished(self, older_than_seconds: float) -> Sequence[str] | None:
        """What writers left that died in the middle, by the storage's own clock; None when there is no telling."""

    def discard(self, unfinished: Sequence[str]) -> None:
        """Remove what `unfinished` told. What is gone meanwhile is no error."""

    def free_bytes(self) -> int | None:
        """Space left; None when there is no telling."""


def check_whole(name: str, start: int, wanted: int, found: int) -> None:
    """StorageTornError when fewer bytes were found than wanted."""
    if found != wanted:
        raise StorageTornError(f"{name}: bytes [{start}, {start + wanted}) are wanted and it ends at {start + found}")


def fill(parts: Sequence[memoryview], data: bytes | memoryview) -> None:
    """One part after the other with as many bytes of `data`."""
    given, upto = memoryview(data), 0
    for part in parts:
        part[:] = given[upto : upto + len(part)]
        upto += len(part)
