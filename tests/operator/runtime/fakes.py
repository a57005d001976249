"""An API server of one kind for reflectors, and one Lease for electors: the real protocols, with faults to order.

Both keep resource versions as a server does. A fault is given to the next calls of its kind, in order.
"""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable

from finetune_operator.errors import AlreadyExists, Conflict, Gone
from finetune_operator.kinds import Key
from finetune_operator.raw import Document, key_of, version_of
from finetune_operator.runtime.reflector import Page, WatchEvent

__all__ = ["FakeLease", "FakeServer", "gone", "thing"]


def thing(name: str, **fields: object) -> Document:
    """An object before the server has seen it."""
    return {"metadata": {"name": name, "namespace": "default"}, **fields}


def gone() -> Gone:
    """What the server says of a version that it no longer keeps."""
    return Gone(410, "Expired", "too old resource version")


class FakeServer:
    """A ListWatch whose history is kept in full until it is compacted."""

    def __init__(self) -> None:
        self.version = 100
        self.objects: dict[Key, Document] = {}
        self.list_faults: deque[Exception | None] = deque()
        self.watch_faults: deque[Exception] = deque()
        self.lists: list[tuple[float, int, str | None]] = []
        self.watches: list[tuple[float, str, float]] = []
        self.silent = False
        self.bookmark_seconds: float | None = 60.0
        self._history: list[tuple[int, WatchEvent]] = []
        self._compacted = 0
        self._dropped = 0
        self._news = asyncio.Event()
        self._cuts: list[asyncio.Future[Exception | None]] = []

    def put(self, document: Document) -> Document:
        """Creates or changes an object."""
        self.version += 1
        stored = copy.deepcopy(document)
        stored["metadata"]["resourceVersion"] = str(self.version)
        known = key_of(stored) in self.objects
        self.objects[key_of(stored)] = stored
        self._happened(WatchEvent("MODIFIED" if known else "ADDED", stored))
        return stored

    def delete(self, name: str) -> None:
        """Deletes an object."""
        self.version += 1
        last = copy.deepcopy(self.objects.pop(Key("default", name)))
        last["metadata"]["resourceVersion"] = str(self.version)
        self._happened(WatchEvent("DELETED", last))

    def happened_elsewhere(self) -> None:
        """The version moves on, as it does when objects of other kinds change."""
        self.version += 1

    def compact(self) -> None:
        """Forgets the history: who watches from before now is told 410, and so is an open watch that lagged behind."""
        self._compacted = self.version
        self._dropped = self._history[-1][0] if self._history else self._dropped
        self._history.clear()

    def cut(self, error: Exception | None = None) -> None:
        """Ends all open watches, in order or with an error."""
        for cut in self._cuts:
            if not cut.done():
                cut.set_result(error)

    @property
    def num_open_watches(self) -> int:
        """Watches that have not been closed."""
        return len(self._cuts)

    async def list(self, limit: int, continue_token: str | None) -> Page:
        """Pages of what is there now; `limit` 0 gives all."""
        self.lists.append((_now(), limit, continue_token))
        await asyncio.sleep(0)
        if self.silent:
            await asyncio.Event().wait()
        if self.list_faults and (fault := self.list_faults.popleft()) is not None:
            raise fault
        items = [self.objects[key] for key in sorted(self.objects)]
        begin = int(continue_token or 0)
        end = begin + limit if limit else len(items)
        token = str(end) if end < len(items) else None
        return Page(copy.deepcopy(items[begin:end]), str(self.version), token)

    async def watch(self, resource_version: str, timeout_seconds: float) -> AsyncIterator[WatchEvent]:
        """All events after the version, then what happens, with bookmarks, until the timeout."""
        self.watches.append((_now(), resource_version, timeout_seconds))
        await asyncio.sleep(0)
        if self.watch_faults:
            raise self.watch_faults.popleft()
        if int(resource_version) < self._compacted:
            raise gone()
        ends_at = _now() + timeout_seconds
        cut: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._cuts.append(cut)
        try:
            seen = int(resource_version)
            while not cut.done() and _now() < ends_at:
                if seen < self._dropped:
                    raise gone()
                news = self._news
                for version, event in [entry for entry in self._history if entry[0] > seen]:
                    seen = version
                    yield WatchEvent(event.type, copy.deepcopy(event.object))
                if await self._quiet_until(ends_at, news, cut):
                    seen = self.version
                    yield WatchEvent("BOOKMARK", {"metadata": {"resourceVersion": str(seen)}})
            if cut.done() and (error := cut.result()) is not None:
                raise error
        finally:
            self._cuts.remove(cut)

    async def _quiet_until(self, ends_at: float, news: asyncio.Event, cut: asyncio.Future[Exception | None]) -> bool:
        """Waits for news; whether it is time for a bookmark instead."""
        waiting = asyncio.ensure_future(news.wait())
        pause = min(self.bookmark_seconds or ends_at - _now(), ends_at - _now())
        try:
            done, _ = await asyncio.wait((waiting, cut), timeout=pause, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiting.cancel()
        if self.silent:
            await asyncio.Event().wait()
        return not done and self.bookmark_seconds is not None and _now() < ends_at

    def _happened(self, event: WatchEvent) -> None:
        self._history.append((self.version, event))
        news, self._news = self._news, asyncio.Event()
        news.set()


class FakeLease:
    """A LeaseClient factory: what candidates share. `around` may delay or fail any request, before or after it acts."""

    def __init__(self) -> None:
        self.document: Document | None = None
        self.num_writes = 0
        self._version = 0

    def client(self, around: Callable[[Callable[[], Document | None]], Awaitable[Document | None]]) -> FakeLeaseClient:
        """One candidate's way to the Lease."""
        return FakeLeaseClient(self, around)

    def read(self) -> Document | None:
        """The Lease as it is."""
        return copy.deepcopy(self.document)

    def write(self, document: Document, *, new: bool) -> Document:
        """Optimistic concurrency, as a server has it."""
        if new and self.document is not None:
            raise AlreadyExists(409, "AlreadyExists", "the lease exists")
        if not new and (self.document is None or version_of(document) != version_of(self.document)):
            raise Conflict(409, "Conflict", "the lease has changed")
        self._version += 1
        self.num_writes += 1
        self.document = copy.deepcopy(document)
        self.document["metadata"]["resourceVersion"] = str(self._version)
        return copy.deepcopy(self.document)


class FakeLeaseClient:
    """The LeaseClient of one candidate."""

    def __init__(
        self,
        lease: FakeLease,
        around: Callable[[Callable[[], Document | None]], Awaitable[Document | None]],
    ) -> None:
        self._lease = lease
        self._around = around

    async def get(self) -> Document | None:
        """The Lease."""
        return await self._around(self._lease.read)

    async def create(self, document: Document) -> Document:
        """AlreadyExists if it is there."""
        return _present(await self._around(lambda: self._lease.write(document, new=True)))

    async def update(self, document: Document) -> Document:
        """Conflict if it has changed."""
        return _present(await self._around(lambda: self._lease.write(document, new=False)))


def _present(document: Document | None) -> Document:
    assert document is not None
    return document


def _now() -> float:
    return asyncio.get_running_loop().time()
