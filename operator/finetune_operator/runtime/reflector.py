"""Keeps a store equal to what the API server holds of one kind, and tells of every change.

`handlers` makes one for each kind that it needs and turns the changes into keys for the work queue. A reflector
lists in pages, then watches from the version of that list. What it can rely on and what it cannot:

- A watch that is cut goes on from the last version seen; bookmarks keep that version young on a quiet kind.
- A version that the server has forgotten (410) means a new list. It tells what really differs, deletions included.
- A connection may be dead and look alive. After `idle_seconds` without a word the watch is given up, and the next
  one is asked to end soon: the orderly end of a short watch proves what silence cannot.
- Failures are met with growing, jittered delays, and with at least the delay that the server asks for.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from finetune_operator.errors import ApiError, ClusterError, Gone, Unreachable
from finetune_operator.kinds import Key
from finetune_operator.metrics import Metrics
from finetune_operator.raw import Document, key_of, version_of
from finetune_operator.runtime.limits import exponential
from finetune_operator.runtime.store import Documents, Indexer, Store

__all__ = ["Change", "ListWatch", "Page", "Reflector", "WatchEvent"]

_FIRST_DELAY = 0.2
_LONGEST_DELAY = 30.0
_SHORTEST_WATCH = 1.0  # one that ends sooner without a word counts as failed, or we would ask in a loop
_REFUSALS_BEFORE_LIST = 5  # e.g. the server's store was restored from a backup and does not know our version
_SILENCES_BEFORE_STALE = 3  # idle time, the short watch after it, and some delay between the two

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list. `continue_token` asks for the next part; None after the last."""

    items: Documents
    resource_version: str
    continue_token: str | None = None


@dataclass(frozen=True, slots=True)
class WatchEvent:
    """What the server tells of one object; of a BOOKMARK's object only the resourceVersion means something."""

    type: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    object: Document


class ListWatch(Protocol):
    """Where a reflector reads: one kind, in one namespace or all, perhaps narrowed by labels."""

    async def list(self, limit: int, continue_token: str | None) -> Page:
        """One page of at most `limit` objects, 0 for all. Raises Gone where the token has expired, ClusterError."""
        ...

    def watch(self, resource_version: str, timeout_seconds: float) -> AsyncIterator[WatchEvent]:
        """Events after that version, with bookmarks. Ends at the timeout; raises Gone, ApiError, Unreachable."""
        ...


@dataclass(frozen=True, slots=True)
class Change:
    """An object was added (`old` is None), changed, or deleted (`new` is None). Both are as the store holds them."""

    old: Document | None
    new: Document | None

    @property
    def key(self) -> Key:
        """The key of the object."""
        document = self.new if self.new is not None else self.old
        assert document is not None, "a change has two sides, and one of them is there"
        return key_of(document)


class Reflector:
    """Lists and watches one kind until it is cancelled."""

    def __init__(
        self,
        source: ListWatch,
        kind_name: str,
        *,
        on_change: Callable[[Change], None],
        indexers: Mapping[str, Indexer] | None = None,
        project: Callable[[Document], Document] | None = None,
        page_size: int = 100,
        watch_seconds: tuple[float, float] = (300, 600),
        idle_seconds: float = 70,
        rng: random.Random | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """`project` makes what is stored out of what was read; it keeps metadata's name, namespace, resourceVersion.

        `on_change` is called after the store has changed and must not wait. `synced` is set once the first list was
        told, so a change told earlier belongs to that list. A server sends bookmarks about once a minute:
        `idle_seconds` is more than that.
        """
        self.store = Store(indexers)
        self.synced = asyncio.Event()
        self._source = source
        self._kind_name = kind_name
        self._on_change = on_change
        self._project = project or _whole
        self._page_size = page_size
        self._watch_seconds = watch_seconds
        self._idle_seconds = idle_seconds
        self._rng = rng or random.Random()
        self._version: str | None = None
        self._in_pages = True
        self._was_silent = False
        self._failures = 0
        self._refusals = 0
        self._failure = ""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._alive_at = -math.inf
        self._count(metrics or Metrics())

    def stale_seconds(self) -> float:
        """Seconds since the server last proved that it answers: by a list, an event, or a watch ended in order."""
        return self._loop.time() - self._alive_at if self._loop is not None else math.inf

    def problem(self) -> str | None:
        """Why the store must not be trusted, in a sentence; None where it may. A check for /readyz."""
        because = f": {self._failure}" if self._failure else ""
        if not self.synced.is_set():
            return f"{self._kind_name} has not been listed yet{because}"
        stale = self.stale_seconds()
        if stale > _SILENCES_BEFORE_STALE * self._idle_seconds:
            return f"nothing was heard of {self._kind_name} for {stale:.0f} s{because}"
        return None

    async def run(self) -> None:
        """Goes on until cancelled, whatever the server does."""
        self._loop = asyncio.get_running_loop()
        while True:
            try:
                if self._version is None:
                    await self._list()
                await self._watch()
                self._failure = ""
            except ClusterError as error:
                self._note(error)
                _log.warning("%s: %s", self._kind_name, error)
                await asyncio.sleep(self._delay(error))
            except Exception as error:
                self._note(error)
                self._version = None
                _log.exception("%s: the watch broke and begins anew", self._kind_name)
                await asyncio.sleep(self._delay(error))

    def _note(self, error: Exception) -> None:
        self._failure = str(error) or type(error).__name__
        self._failures_total.inc()
        self._refusals = self._refusals + 1 if isinstance(error, ApiError) else 0
        if isinstance(error, Gone) or self._refusals >= _REFUSALS_BEFORE_LIST:
            self._version, self._refusals = None, 0

    def _delay(self, error: Exception) -> float:
        delay = exponential(self._failures, _FIRST_DELAY, _LONGEST_DELAY) * self._rng.uniform(1, 2)
        self._failures += 1
        return max(delay, getattr(error, "retry_after", None) or 0.0)

    def _alive(self) -> None:
        self._alive_at = asyncio.get_running_loop().time()

    def _watch_works(self) -> None:
        """A list alone does not end a row of failures: a server that lists and never watches is not to be hurried."""
        self._alive()
        self._failures = self._refusals = 0
        self._was_silent = False

    async def _list(self) -> None:
        self._lists_total.inc()
        limit = self._page_size if self._in_pages else 0
        found: dict[Key, Document] = {}
        token: str | None = None
        version: str | None = None
        while version is None or token:
            try:
                page = await self._in_time(self._source.list(limit, token))
            except Gone:
                # The pages took longer than the server keeps a snapshot: next time all at once.
                self._in_pages = False
                raise
            version = version or page.resource_version
            token = page.continue_token
            for item in page.items:
                self._collect(item, found)
        self._replace(found)
        self._version = version
        self._in_pages = True
        self._alive()
        self.synced.set()

    async def _in_time(self, answer: Awaitable[Page]) -> Page:
        try:
            async with asyncio.timeout(self._idle_seconds):
                return await answer
        except TimeoutError:
            raise Unreachable(f"a list was not answered within {self._idle_seconds:.0f} s") from None

    def _collect(self, item: Document, found: dict[Key, Document]) -> None:
        """What is stored already is kept as it is: a new list costs no second copy of what has not changed."""
        key = key_of(item)
        stored = self.store.get(key)
        found[key] = stored if stored is not None and _same(stored, item) else self._projected(item)

    def _replace(self, found: Mapping[Key, Document]) -> None:
        for key in sorted(self.store.keys() - found.keys()):
            self._remove(key)
        for key, document in found.items():
            if self.store.get(key) is not document:
                self._put(document)

    async def _watch(self) -> None:
        self._watches_total.inc()
        assert self._version is not None, "a list comes first"
        begun_at = asyncio.get_running_loop().time()
        num_events = await self._follow(self._source.watch(self._version, self._watch_for()))
        if num_events is None:
            return
        if not num_events and asyncio.get_running_loop().time() - begun_at < _SHORTEST_WATCH:
            raise Unreachable("the watch ended at once")
        self._watch_works()

    def _watch_for(self) -> float:
        return self._idle_seconds / 2 if self._was_silent else self._rng.uniform(*self._watch_seconds)

    async def _follow(self, stream: AsyncIterator[WatchEvent]) -> int | None:
        """Takes events until the watch ends, and says how many there were; None where it fell silent instead.

        One silence may be a quiet kind on a server without bookmarks. Another in the short watch after it is a fault.
        """
        loop = asyncio.get_running_loop()
        num_events = 0
        silence = asyncio.timeout(self._idle_seconds)
        try:
            async with silence:
                async for event in stream:
                    num_events += 1
                    silence.reschedule(loop.time() + self._idle_seconds)
                    self._watch_works()
                    self._take(event)
        except TimeoutError:
            if not silence.expired():
                raise
            if self._was_silent:
                raise Unreachable(f"watches stay silent for {self._idle_seconds:.0f} s") from None
            self._was_silent = True
            return None
        finally:
            # Now rather than when the generator is collected: an open response keeps its connection.
            if (close := getattr(stream, "aclose", None)) is not None:
                await close()
        return num_events

    def _take(self, event: WatchEvent) -> None:
        if event.type == "DELETED":
            self._remove(key_of(event.object))
        elif event.type in ("ADDED", "MODIFIED"):
            stored = self.store.get(key_of(event.object))
            if stored is None or not _same(stored, event.object):
                self._put(self._projected(event.object))
        self._version = version_of(event.object) or self._version

    def _projected(self, document: Document) -> Document:
        try:
            return self._project(document)
        except Exception:
            _log.exception("%s %s/%s: could not be projected, is held whole", self._kind_name, *key_of(document))
            return document

    def _put(self, document: Document) -> None:
        try:
            old = self.store.put(document)
        except Exception:
            _log.exception("%s %s/%s: could not be indexed, is left out", self._kind_name, *key_of(document))
        else:
            self._tell(Change(old, document))

    def _remove(self, key: Key) -> None:
        old = self.store.remove(key)
        if old is not None:
            self._tell(Change(old, None))

    def _tell(self, change: Change) -> None:
        try:
            self._on_change(change)
        except Exception:
            _log.exception("%s %s/%s: a change could not be told", self._kind_name, *change.key)

    def _count(self, metrics: Metrics) -> None:
        self._lists_total = metrics.lists.labels(self._kind_name)
        self._watches_total = metrics.watches.labels(self._kind_name)
        self._failures_total = metrics.reflector_failures.labels(self._kind_name)
        metrics.stored.labels(self._kind_name).set_function(lambda: len(self.store))
        metrics.stale_seconds.labels(self._kind_name).set_function(self.stale_seconds)


def _whole(document: Document) -> Document:
    return document


def _same(stored: Document, read: Document) -> bool:
    version = version_of(read)
    return version != "" and version == version_of(stored)
