"""Objects in memory under the rules of an API server's storage: one counter of versions, a short history for those
who watch, and no object without its owner.

Used by `local.cluster`. Documents go in and stay as they are: whoever changes one puts a new one in its place.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from finetune_operator.errors import Gone
from finetune_operator.kinds import Key, Kind
from finetune_operator.raw import Document, key_of

__all__ = ["Documents", "Objects", "Record"]


@dataclass(frozen=True, slots=True)
class Record:
    """One change: `old` is None for a new object; `gone` where the object was deleted, `new` being its last state."""

    version: int
    kind: Kind
    old: Document | None
    new: Document
    gone: bool = False


Records = list[Record]
Documents = list[Document]
"""Named here: within a class that has a method `list`, that name means the method."""


class Objects:
    """All objects of all kinds."""

    def __init__(self, history: int) -> None:
        """`history` is how many changes are remembered."""
        self.version = 1
        self._objects: dict[Kind, dict[Key, Document]] = {}
        self._dependents: dict[str, dict[tuple[Kind, Key], None]] = {}
        self._history: deque[Record] = deque(maxlen=history)
        self._uids: set[str] = set()
        self._waiting: set[asyncio.Future[None]] = set()

    def get(self, kind: Kind, key: Key) -> Document | None:
        """The object, or None."""
        return self._objects.get(kind, {}).get(key)

    def all(self) -> Iterator[tuple[Kind, Document]]:
        """Every object of every kind."""
        for kind, objects in self._objects.items():
            for document in objects.values():
                yield kind, document

    def list(self, kind: Kind, namespace: str | None = None) -> Documents:
        """The objects of a kind in the order of their keys, as etcd has them."""
        objects = self._objects.get(kind, {})
        return [objects[key] for key in sorted(objects) if namespace in (None, key.namespace)]

    def put(self, kind: Kind, document: Document) -> Document:
        """Store an object, new or changed, under the next version."""
        self.version += 1
        stored = document | {"metadata": document["metadata"] | {"resourceVersion": str(self.version)}}
        old = self._forget(kind, key_of(stored))
        self._keep(kind, stored)
        self._record(Record(self.version, kind, old, stored))
        if old is None and self._is_orphan(stored):
            self.remove(kind, key_of(stored))
        return stored

    def remove(self, kind: Kind, key: Key, *, orphan: bool = False) -> None:
        """Delete an object, and what it owned unless that is to be orphaned."""
        if (old := self._forget(kind, key)) is None:
            return
        self.version += 1
        last = old | {"metadata": old["metadata"] | {"resourceVersion": str(self.version)}}
        self._record(Record(self.version, kind, old, last, gone=True))
        self._uids.discard(old["metadata"]["uid"])
        for owned_kind, owned_key in list(self._dependents.get(old["metadata"]["uid"], ())):
            self._disown(owned_kind, owned_key, old["metadata"]["uid"], orphan)

    def restore(self, kind: Kind, document: Document) -> None:
        """Put back an object with the version it had; there is no history of it."""
        self.version = max(self.version, int(document["metadata"]["resourceVersion"]))
        self._keep(kind, document)

    def since(self, version: int) -> Records:
        """The changes after `version`. Gone where they are not all remembered."""
        if version < self.version and (not self._history or version + 1 < self._history[0].version):
            raise Gone(410, "Expired", f"too old resource version: {version} ({self.version})")
        news = itertools.takewhile(lambda record: record.version > version, reversed(self._history))
        return [*news][::-1]

    async def changed(self, seconds: float) -> bool:
        """Wait for the next change, `seconds` at most. Returns whether there was one."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        try:
            async with asyncio.timeout(seconds):
                await waiting
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(waiting)
        return True

    def _keep(self, kind: Kind, document: Document) -> None:
        self._objects.setdefault(kind, {})[key_of(document)] = document
        self._uids.add(document["metadata"]["uid"])
        for owner in _owners(document):
            self._dependents.setdefault(owner, {})[kind, key_of(document)] = None

    def _forget(self, kind: Kind, key: Key) -> Document | None:
        old = self._objects.get(kind, {}).pop(key, None)
        for owner in _owners(old) if old is not None else ():
            self._dependents[owner].pop((kind, key), None)
            if not self._dependents[owner]:
                del self._dependents[owner]
        return old

    def _record(self, record: Record) -> None:
        self._history.append(record)
        for waiting in self._waiting:
            if not waiting.done():
                waiting.set_result(None)

    def _is_orphan(self, document: Document) -> bool:
        """It names owners, and none of them is there: the garbage collector of a cluster would find it too."""
        owners = _owners(document)
        return bool(owners) and self._uids.isdisjoint(owners)

    def _disown(self, kind: Kind, key: Key, owner: str, orphan: bool) -> None:
        """The owner is gone: so is the object, unless it has another owner or was to be left an orphan."""
        document = self._objects[kind][key]
        if not orphan and self._is_orphan(document):
            return self.remove(kind, key)
        others = [one for one in document["metadata"]["ownerReferences"] if one["uid"] != owner]
        metadata = {name: value for name, value in document["metadata"].items() if name != "ownerReferences"}
        self.put(kind, document | {"metadata": metadata | ({"ownerReferences": others} if others else {})})
        return None


def _owners(document: Document) -> list[str]:
    return [owner["uid"] for owner in document["metadata"].get("ownerReferences") or ()]
