"""A URI -> a storage that is ready to use: with retries, and after a look at what the store can do.

file:///folder         this machine's disk
pvc://claim/folder     a folder below where the claim is mounted: <pvc root>/<claim>
s3://bucket/prefix     credentials, region and endpoint as AWS programs take them (AWS_ACCESS_KEY_ID, AWS_REGION,
                       AWS_ENDPOINT_URL, ...), a profile or an instance's role
gs://bucket/prefix     GOOGLE_APPLICATION_CREDENTIALS, or the instance's account
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from finetune_api.uris import Scheme, Uri, parse_uri
from finetune_trainers.checkpoint.storage.errors import StorageConflictError, StorageDeniedError
from finetune_trainers.checkpoint.storage.objects import ObjectStorage
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.storage.resilient import Patience, ResilientStorage

if TYPE_CHECKING:
    from finetune_trainers.checkpoint.storage.multiparts import Uploads

__all__ = ["SCHEMES", "open_storage", "refuses_to_overwrite"]

SCHEMES = (Scheme.FILE, Scheme.PVC, Scheme.S3, Scheme.GS)

_RETRIES = {
    "max_retries": 8,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(milliseconds=200), "max_backoff": timedelta(seconds=20), "base": 2},
}
_FEW_RETRIES = {**_RETRIES, "max_retries": 2}
"""Of a request that may be answered by 501, which the library takes for something that will pass."""
_REQUESTS = {"connect_timeout": timedelta(seconds=10), "read_timeout": timedelta(seconds=60), "timeout": "10 minutes"}


def open_storage(
    text: str,
    pvc_root: str = "/mnt/pvc",
    options: Mapping[str, Any] | None = None,
    exclusive: bool | None = None,
    patience: Patience | None = None,
) -> Storage:
    """The storage at a URI. `options` are obstore's for the bucket (`endpoint`, `access_key_id`, ...), over the
    environment's.

    `exclusive` None: a bucket is asked whether its conditional puts hold, which takes three requests and write
    access. Whoever publishes must ask; ranks are told by their coordinator, and readers say True. Raises StorageError
    when the bucket cannot be reached, ValueError for a URI of another scheme.
    """
    uri = parse_uri(text, SCHEMES)
    if uri.scheme is Scheme.FILE:
        if not uri.path.startswith("/"):
            raise ValueError(f"{text} is relative; a place for checkpoints is named by its whole path, file:///...")
        return ResilientStorage(PosixStorage(uri.path), patience)
    if uri.scheme is Scheme.PVC:
        return ResilientStorage(PosixStorage(f"{pvc_root}/{uri.authority}/{uri.path}".rstrip("/")), patience)
    store = _bucket(uri, options or {})
    if exclusive is None:
        asked = _bucket(uri, {"retry_config": _FEW_RETRIES, **(options or {})})
        exclusive = refuses_to_overwrite(ResilientStorage(ObjectStorage(asked, uri.path, str(uri)), patience))
    return ResilientStorage(ObjectStorage(store, uri.path, str(uri), exclusive, _uploads(uri, options or {})), patience)


def refuses_to_overwrite(storage: Storage) -> bool:
    """Whether the store honours a conditional put, found by trying: some that speak like S3 ignore the condition, and
    some refuse it."""
    name = f"probe-{secrets.token_hex(8)}"
    try:
        storage.create(name, b"1")
    except StorageDeniedError:
        storage.replace(name, b"1")  # refused again, it is not for the condition
    try:
        storage.create(name, b"2")
    except StorageConflictError:
        return True
    except StorageDeniedError:
        return False
    finally:
        storage.delete([name])
    return False


def _uploads(uri: Uri, options: Mapping[str, Any]) -> Uploads | None:
    """Brings what a disk does not need."""
    if uri.scheme is not Scheme.S3:
        return None
    from finetune_trainers.checkpoint.storage.multiparts import uploads_of

    return uploads_of(uri.authority, options)


def _bucket(uri: Uri, options: Mapping[str, Any]) -> Any:
    try:
        from obstore import store
    except ImportError:
        raise StorageDeniedError(
            f"{uri}: buckets need the package obstore; install finetune-operator[trainers]"
        ) from None
    chosen: Any = {"retry_config": _RETRIES, **options}
    endpoint = str(options.get("endpoint") or os.environ.get("AWS_ENDPOINT_URL") or "")
    plain = {"allow_http": True} if endpoint.startswith("http://") else {}
    chosen["client_options"] = {**_REQUESTS, **plain, **options.get("client_options", {})}
    if uri.scheme is Scheme.GS:
        return store.GCSStore(uri.authority, **chosen)
    return store.S3Store(uri.authority, **{"checksum_algorithm": "SHA256", **chosen})
