"""A cluster in memory: what `finetune run` has in place of an API server, and what controller tests run against.

It keeps the promises that the operator lives by, and a test gives the same requests to it and to a real API server:
names are taken once; a stale resourceVersion conflicts; generation grows with the spec and with nothing else; status
is written apart; a write that changes nothing is no change; watches go on from a version, or are Gone; what has lost
its owner is deleted. It has no schemas, no access control and no finalizers, and everything in it happens at once.
"""

from __future__ import annotations

import asyncio
import re
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from datetime import UTC, datetime

from finetune_operator import kinds
from finetune_operator.errors import AlreadyExists, ApiError, Conflict, Gone, Invalid, NotFound
from finetune_operator.kinds import Key, Kind
from finetune_operator.local.patches import applied, copied, merged
from finetune_operator.local.selectors import Selector, parse_selector
from finetune_operator.local.store import Documents, Objects, Record
from finetune_operator.raw import Document, key_of
from finetune_operator.runtime.reflector import ListWatch, Page, WatchEvent
from finetune_operator.times import written

__all__ = ["Admission", "LocalCluster"]

Admission = Callable[[Kind, Document], Document]
"""Looks at every object before it is created and returns what to create, as a mutating webhook does."""

_WITH_STATUS = {kinds.FINETUNE_JOB, kinds.RAY_JOB, kinds.POD, kinds.POD_DISRUPTION_BUDGET}
"""Kinds whose status is a subresource."""
_WITH_GENERATION = {*_WITH_STATUS, kinds.FINETUNE_RUNTIME, kinds.NETWORK_POLICY}
_SERVERS_OWN = ("name", "namespace", "uid", "creationTimestamp", "generation", "resourceVersion")
_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
_BOOKMARK_SECONDS = 60.0
_SNAPSHOTS = 16
"""Lists whose further pages may still be asked for."""


class LocalCluster:
    """Implements `cluster.protocol.Cluster`. For one event loop at a time."""

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] | None = None,
        admission: Admission | None = None,
        history: int = 10_000,
    ) -> None:
        """`history` is how many changes a watch may lie behind before it is Gone."""
        self.admission = admission
        self._clock = clock or (lambda: datetime.now(UTC))
        self._objects = Objects(history)
        self._applied: dict[str, Document] = {}
        self._snapshots: dict[int, list[Document]] = {}

    @property
    def version(self) -> int:
        """Grows with every change of any object."""
        return self._objects.version

    async def get(self, kind: Kind, key: Key) -> Document | None:
        """The object, or None."""
        return self.peek(kind, key)

    async def create(self, kind: Kind, document: Document) -> Document:
        """Store a new object. AlreadyExists, Invalid; `status` is not taken over where it is written apart."""
        new = copied(document)
        self._name(kind, new)
        if self.admission is not None:
            new = self.admission(kind, new)
        if self._objects.get(kind, key_of(new)) is not None:
            raise AlreadyExists(409, "AlreadyExists", f'{kind.plural} "{key_of(new).name}" already exists')
        if kind in _WITH_STATUS:
            new.pop("status", None)
        metadata = {name: value for name, value in new["metadata"].items() if value is not None}
        metadata |= {"uid": str(uuid.uuid4()), "creationTimestamp": self._now()}
        metadata |= {"generation": 1} if kind in _WITH_GENERATION else {}
        new = {"apiVersion": kind.api_version, "kind": kind.name} | new | {"metadata": metadata}
        return self._out(self._objects.put(kind, new))

    async def apply(self, kind: Kind, document: Document) -> Document:
        """Server-side apply under one manager, by force. Creates the object where there is none."""
        wanted = copied(document)
        self._name(kind, wanted)
        if kind in _WITH_STATUS:
            wanted.pop("status", None)
        live = self._objects.get(kind, key_of(wanted))
        if live is None:
            stored = await self.create(kind, wanted)
        else:
            self._check_preconditions(kind, live, wanted["metadata"])
            before = self._applied.get(live["metadata"]["uid"], {})
            stored = self._out(self._write(kind, live, applied(live, before, wanted)))
        self._applied[stored["metadata"]["uid"]] = wanted
        return stored

    async def merge(self, kind: Kind, key: Key, patch: Document) -> Document:
        """JSON merge patch of all but the status, where that is written apart. NotFound, Conflict."""
        live = self._live(kind, key)
        self._check_preconditions(kind, live, patch.get("metadata") or {})
        changed = merged(live, copied(patch))
        if kind in _WITH_STATUS:
            changed = _with(changed, "status", live.get("status"))
        return self._out(self._write(kind, live, changed))

    async def replace_status(self, kind: Kind, document: Document) -> Document:
        """Write `status` and nothing else. NotFound, Conflict; Invalid without a resourceVersion."""
        live = self._live(kind, key_of(document))
        if not document["metadata"].get("resourceVersion"):
            message = f'{kind.plural} "{key_of(document).name}" is invalid: metadata.resourceVersion: must be specified'
            raise Invalid(422, "Invalid", message)
        self._check_preconditions(kind, live, document["metadata"])
        return self._out(self._write(kind, live, _with(live, "status", copied(document.get("status")))))

    async def delete(self, kind: Kind, key: Key, uid: str | None = None, propagation: str = "Background") -> None:
        """Delete the object if its uid is the one given, and what it owns; with Orphan, that stays."""
        live = self._objects.get(kind, key)
        if live is not None and uid in (None, live["metadata"]["uid"]):
            self._objects.remove(kind, key, orphan=propagation == "Orphan")

    def source(self, kind: Kind, namespace: str | None = None, label_selector: str | None = None) -> ListWatch:
        """What a reflector reads."""
        return _Source(self._objects, self._snapshots, kind, namespace, parse_selector(label_selector))

    def peek(self, kind: Kind, key: Key) -> Document | None:
        """As `get`, without waiting: there is nothing to wait for."""
        found = self._objects.get(kind, key)
        return None if found is None else self._out(found)

    def select(self, kind: Kind, namespace: str | None = None, label_selector: str | None = None) -> list[Document]:
        """The objects of a kind, in the order of their keys."""
        chosen = parse_selector(label_selector)
        return [self._out(found) for found in self._objects.list(kind, namespace) if chosen(_labels(found))]

    def dump(self) -> list[Document]:
        """Every object, for `restore`."""
        return [self._out(document) for _, document in self._objects.all()]

    def restore(self, documents: Iterable[Document]) -> None:
        """Put back what `dump` gave, with the same uids and versions. KeyError for a kind that is not ours."""
        known = {(kind.api_version, kind.name): kind for kind in vars(kinds).values() if isinstance(kind, Kind)}
        for document in documents:
            self._objects.restore(known[document["apiVersion"], document["kind"]], copied(document))

    def _live(self, kind: Kind, key: Key) -> Document:
        if (live := self._objects.get(kind, key)) is None:
            raise NotFound(404, "NotFound", f'{kind.plural} "{key.name}" not found')
        return live

    def _check_preconditions(self, kind: Kind, live: Document, wanted: Document) -> None:
        """A uid or a resourceVersion in what is written must be the object's own."""
        for name in ("uid", "resourceVersion"):
            if wanted.get(name) not in (None, "", live["metadata"][name]):
                message = f'Operation cannot be fulfilled on {kind.plural} "{live["metadata"]["name"]}": '
                raise Conflict(409, "Conflict", message + f"its {name} is not {wanted[name]}; read it again")

    def _write(self, kind: Kind, live: Document, changed: Document) -> Document:
        """Store `changed` in the place of `live`, if it differs."""
        kept = {name: live["metadata"][name] for name in _SERVERS_OWN if name in live["metadata"]}
        changed = changed | {"apiVersion": kind.api_version, "kind": kind.name}
        changed["metadata"] = changed["metadata"] | kept
        if changed == live:
            return live
        if kind == kinds.CONFIG_MAP and live.get("immutable") and _content(changed) != _content(live):
            name = live["metadata"]["name"]
            message = f'ConfigMap "{name}" is invalid: data: Forbidden: field is immutable when `immutable` is set'
            raise Invalid(422, "Invalid", message)
        if kind in _WITH_GENERATION and _content(changed) != _content(live):
            changed["metadata"]["generation"] += 1
        return self._objects.put(kind, changed)

    def _name(self, kind: Kind, document: Document) -> None:
        metadata = document.setdefault("metadata", {})
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = metadata["generateName"] + uuid.uuid4().hex[:5]
        if kind.namespaced and not metadata.get("namespace"):
            raise ApiError(400, "BadRequest", "an empty namespace may not be set during creation")
        if not _NAME.fullmatch(str(metadata.get("name") or "")):
            message = f'{kind.name} "{metadata.get("name")}" is invalid: metadata.name: must be a DNS-1123 subdomain'
            raise Invalid(422, "Invalid", message)

    def _now(self) -> str:
        return written(self._clock())

    def _out(self, document: Document) -> Document:
        """A copy: a reader that changes what it got must not change what is stored."""
        result: Document = copied(document)
        return result


class _Source:
    """Lists and watches one kind."""

    def __init__(
        self,
        objects: Objects,
        snapshots: dict[int, list[Document]],
        kind: Kind,
        namespace: str | None,
        selector: Selector,
    ) -> None:
        self._objects = objects
        self._snapshots = snapshots
        self._kind = kind
        self._namespace = namespace
        self._selector = selector

    async def list(self, limit: int, continue_token: str | None) -> Page:
        """One page; later pages show the objects as they were when the first one was read."""
        version, start = self._objects.version, 0
        if continue_token is not None:
            version, start = map(int, continue_token.split(":"))
            if version not in self._snapshots:
                raise Gone(410, "Expired", "the continue token is too old: list anew")
            found = self._snapshots[version]
        else:
            listed = self._objects.list(self._kind, self._namespace)
            found = [one for one in listed if self._selector(_labels(one))]
        end = start + limit if limit else len(found)
        token = f"{version}:{end}" if end < len(found) else None
        if token is not None:
            self._keep(version, found)
        return Page([copied(one) for one in found[start:end]], str(version), token)

    async def watch(self, resource_version: str, timeout_seconds: float) -> AsyncIterator[WatchEvent]:
        """Events after a version, a bookmark a minute, and one before the end."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        version = int(resource_version)
        while True:
            for record in self._objects.since(version):
                version = record.version
                if (event := self._event(record)) is not None:
                    yield event
            if (left := deadline - loop.time()) <= 0:
                break
            if version == self._objects.version and not await self._objects.changed(min(left, _BOOKMARK_SECONDS)):
                yield self._bookmark()

    def _keep(self, version: int, found: Documents) -> None:
        self._snapshots[version] = found
        while len(self._snapshots) > _SNAPSHOTS:
            self._snapshots.pop(next(iter(self._snapshots)))

    def _bookmark(self) -> WatchEvent:
        metadata = {"resourceVersion": str(self._objects.version)}
        document = {"apiVersion": self._kind.api_version, "kind": self._kind.name, "metadata": metadata}
        return WatchEvent("BOOKMARK", document)

    def _event(self, record: Record) -> WatchEvent | None:
        """What one who watches these objects is told: an object that no longer matches is deleted to them."""
        if record.kind != self._kind or self._namespace not in (None, key_of(record.new).namespace):
            return None
        before = record.old is not None and self._selector(_labels(record.old))
        after = not record.gone and self._selector(_labels(record.new))
        if not before and not after:
            return None
        if not after:
            return WatchEvent("DELETED", copied(record.new))
        return WatchEvent("MODIFIED" if before else "ADDED", copied(record.new))


def _labels(document: Document) -> dict[str, str]:
    return document["metadata"].get("labels") or {}


def _content(document: Document) -> Document:
    """All that generation counts the changes of."""
    return {name: value for name, value in document.items() if name not in ("metadata", "status")}


def _with(document: Document, name: str, value: object) -> Document:
    """`document` with one field set, or without it when `value` is None."""
    rest = {key: old for key, old in document.items() if key != name}
    return rest if value is None else rest | {name: value}
