"""Reading a kind that the cluster may not know yet: its CRD comes with another program, or is still to be installed.

`handlers` wraps its sources in these. A kind that must be there is asked for again and again, and the log says what to
install. A kind that others bring reads as empty until it appears, so that the operator is ready without it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from finetune_operator.errors import Gone, NotFound
from finetune_operator.runtime.reflector import ListWatch, Page, WatchEvent

__all__ = ["OptionalKind", "RequiredKind"]

_LOOK_SECONDS = 10.0


class RequiredKind:
    """Implements `ListWatch`; says what to do where the cluster does not know the kind."""

    def __init__(self, source: ListWatch, hint: str) -> None:
        """`hint` is the sentence that helps."""
        self._source = source
        self._hint = hint

    async def list(self, limit: int, continue_token: str | None) -> Page:
        """See ListWatch."""
        try:
            return await self._source.list(limit, continue_token)
        except NotFound as error:
            raise NotFound(error.status, error.reason, self._hint, error.retry_after) from error

    def watch(self, resource_version: str, timeout_seconds: float) -> AsyncIterator[WatchEvent]:
        """See ListWatch."""
        return self._source.watch(resource_version, timeout_seconds)


class OptionalKind:
    """Implements `ListWatch`; a kind that the cluster does not know has no objects until it does."""

    def __init__(self, source: ListWatch, appeared: Callable[[], None]) -> None:
        """`appeared` is called when the cluster has begun to know the kind."""
        self.is_known = True
        self._source = source
        self._appeared = appeared

    async def list(self, limit: int, continue_token: str | None) -> Page:
        """See ListWatch."""
        try:
            page = await self._source.list(limit, continue_token)
        except NotFound:
            self.is_known = False
            return Page([], "0")
        if not self.is_known:
            self.is_known = True
            self._appeared()
        return page

    async def watch(self, resource_version: str, timeout_seconds: float) -> AsyncIterator[WatchEvent]:
        """See ListWatch. While the kind is unknown, bookmarks show that somebody is looking."""
        if self.is_known:
            events = self._source.watch(resource_version, timeout_seconds)
            try:
                async for event in events:
                    yield event
            finally:
                # As the reflector does: now rather than when the generator is collected.
                if (close := getattr(events, "aclose", None)) is not None:
                    await close()
            return
        ends_at = asyncio.get_running_loop().time() + timeout_seconds
        while asyncio.get_running_loop().time() < ends_at:
            await asyncio.sleep(_LOOK_SECONDS)
            try:
                await self._source.list(1, None)
            except NotFound:
                yield WatchEvent("BOOKMARK", {"metadata": {}})
            else:
                raise Gone(410, "Expired", "the cluster knows the kind now")
