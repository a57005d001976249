"""What can go wrong with a storage. All end a run as StorageError if nobody does better.

StorageError
  ├── StorageFullError          no space, or over quota
  ├── StorageDeniedError        no permission, wrong credentials, read-only, or it cannot do what is needed
  ├── StorageMissingError       the file is not there
  ├── StorageConflictError      the file is there already, and must not be
  ├── StorageTornError          bytes that were written or read may not be the ones meant; never tried again
  └── StorageUnavailableError   it may work in a moment: timeouts, 503, stale handles, lost connections
"""

from __future__ import annotations

import errno

from finetune_trainers.errors import StorageError

__all__ = [
    "StorageConflictError",
    "StorageDeniedError",
    "StorageError",
    "StorageFullError",
    "StorageMissingError",
    "StorageTornError",
    "StorageUnavailableError",
    "from_os_error",
]


class StorageFullError(StorageError):
    """No space is left, or a quota is used up."""


class StorageDeniedError(StorageError):
    """The storage refuses, and will refuse again."""


class StorageMissingError(StorageError):
    """There is no such file."""


class StorageConflictError(StorageError):
    """There is such a file already."""


class StorageTornError(StorageError):
    """Bytes may be lost or changed: a failed fsync, a file that ends early."""


class StorageUnavailableError(StorageError):
    """Worth another try."""


_BY_ERRNO: dict[int, type[StorageError]] = {
    errno.ENOSPC: StorageFullError,
    errno.EDQUOT: StorageFullError,
    errno.EFBIG: StorageFullError,
    errno.EACCES: StorageDeniedError,
    errno.EPERM: StorageDeniedError,
    errno.EROFS: StorageDeniedError,
    errno.ENAMETOOLONG: StorageDeniedError,
    errno.ENOTDIR: StorageDeniedError,
    errno.EISDIR: StorageDeniedError,
    errno.ELOOP: StorageDeniedError,
    errno.ENOENT: StorageMissingError,
    errno.EEXIST: StorageConflictError,
}


def from_os_error(error: OSError, name: str) -> StorageError:
    """The same as a StorageError that names the file. What is not known to be final is worth another try."""
    kind = _BY_ERRNO.get(error.errno or 0, StorageUnavailableError)
    return kind(f"{name}: {error.strerror or error}")
