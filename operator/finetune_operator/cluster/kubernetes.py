"""The `Cluster` that is an API server: each method one request, or a few where the API makes it so.

`__main__` makes it over a `Connection`; the runtime and the reconcile pass use it by its protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from finetune_operator.cluster.connection import Connection
from finetune_operator.cluster.protocol import FIELD_MANAGER, Document
from finetune_operator.errors import Conflict, NotFound, api_error
from finetune_operator.kinds import LEASE, Key, Kind
from finetune_operator.runtime.limits import TokenBucket
from finetune_operator.runtime.reflector import ListWatch, Page, WatchEvent

__all__ = ["KubernetesCluster", "KubernetesLeases"]

_MERGE_PATCH = "application/merge-patch+json"
_APPLY_PATCH = "application/apply-patch+yaml"  # JSON is YAML
_MANAGED = {"fieldManager": FIELD_MANAGER}
_LIST_SECONDS = 60.0
_KEPT_FOR_STATUS = ("name", "namespace", "uid", "resourceVersion")


class KubernetesCluster:
    """Implements `Cluster`. Requests wait their turn in a bucket; watches and lists do not."""

    def __init__(self, connection: Connection, bucket: TokenBucket) -> None:
        """`bucket` bounds the rate of requests, so that a mistake of ours is no attack on the server."""
        self._connection = connection
        self._bucket = bucket

    async def get(self, kind: Kind, key: Key) -> Document | None:
        """See Cluster."""
        try:
            return await self._send("GET", kind.path(*key))
        except NotFound:
            return None

    async def create(self, kind: Kind, document: Document) -> Document:
        """See Cluster."""
        path = kind.path(document["metadata"].get("namespace"))
        return await self._send("POST", path, query=_MANAGED, body=document)

    async def apply(self, kind: Kind, document: Document) -> Document:
        """See Cluster."""
        metadata = document["metadata"]
        path = kind.path(metadata.get("namespace"), metadata["name"])
        query = _MANAGED | {"force": "true"}
        return await self._send("PATCH", path, query=query, body=document, content_type=_APPLY_PATCH)

    async def merge(self, kind: Kind, key: Key, patch: Document) -> Document:
        """See Cluster."""
        return await self._send("PATCH", kind.path(*key), query=_MANAGED, body=patch, content_type=_MERGE_PATCH)

    async def replace_status(self, kind: Kind, document: Document) -> Document:
        """See Cluster. Only what the server looks at is sent: it takes the rest from the stored object anyway."""
        metadata = document["metadata"]
        body = {
            "apiVersion": kind.api_version,
            "kind": kind.name,
            "metadata": {name: metadata[name] for name in _KEPT_FOR_STATUS if name in metadata},
            "status": document["status"],
        }
        path = kind.path(metadata.get("namespace"), metadata["name"])
        return await self._send("PUT", f"{path}/status", query=_MANAGED, body=body)

    async def delete(self, kind: Kind, key: Key, uid: str | None, propagation: str = "Background") -> None:
        """See Cluster."""
        body: Document = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        if uid is not None:
            body["preconditions"] = {"uid": uid}
        try:
            await self._send("DELETE", kind.path(*key), body=body)
        except NotFound:
            return
        except Conflict:
            there = await self.get(kind, key)
            if uid is not None and there is not None and there["metadata"].get("uid") == uid:
                raise

    def source(self, kind: Kind, namespace: str | None = None, label_selector: str | None = None) -> ListWatch:
        """See Cluster."""
        return _Source(self._connection, kind.path(namespace), label_selector)

    async def _send(self, method: str, path: str, **how: Any) -> Document:
        await asyncio.sleep(self._bucket.reserve(asyncio.get_running_loop().time()))
        answer: Document = await self._connection.send(method, path, **how)
        return answer


class KubernetesLeases:
    """One Lease, for the elector. Past the bucket: a busy operator must not lose its lease for being busy."""

    def __init__(self, connection: Connection, namespace: str, name: str) -> None:
        """The elector itself bounds how long it waits."""
        self._connection = connection
        self._namespace = namespace
        self._name = name

    async def get(self) -> Document | None:
        """The Lease, None where there is none."""
        try:
            found: Document = await self._connection.send("GET", LEASE.path(self._namespace, self._name))
        except NotFound:
            return None
        return found

    async def create(self, document: Document) -> Document:
        """Raises AlreadyExists."""
        written: Document = await self._connection.send("POST", LEASE.path(self._namespace), body=document)
        return written

    async def update(self, document: Document) -> Document:
        """Raises Conflict where the Lease has changed."""
        path = LEASE.path(self._namespace, self._name)
        written: Document = await self._connection.send("PUT", path, body=document)
        return written


class _Source:
    """Lists and watches one kind."""

    def __init__(self, connection: Connection, path: str, label_selector: str | None) -> None:
        self._connection = connection
        self._path = path
        self._selector = {"labelSelector": label_selector} if label_selector else {}

    async def list(self, limit: int, continue_token: str | None) -> Page:
        query = {**self._selector, "limit": str(limit)} | ({"continue": continue_token} if continue_token else {})
        answer = await self._connection.send("GET", self._path, query=query, seconds=_LIST_SECONDS)
        metadata = answer["metadata"]
        return Page(answer.get("items") or [], metadata["resourceVersion"], metadata.get("continue") or None)

    async def watch(self, resource_version: str, timeout_seconds: float) -> AsyncIterator[WatchEvent]:
        query = self._selector | {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": resource_version,
            "timeoutSeconds": str(max(1, round(timeout_seconds))),
        }
        lines = self._connection.lines(self._path, query)
        try:
            async for line in lines:
                yield _event(line)
        finally:
            await lines.aclose()


def _event(line: Document) -> WatchEvent:
    """Raises what the server reports in the stream: by then its answer has long been 200."""
    if line["type"] == "ERROR":
        status = line["object"]
        reason, message = str(status.get("reason", "")), str(status.get("message", ""))
        raise api_error(int(status.get("code") or 500), reason, message)
    return WatchEvent(line["type"], line["object"])
