"""Of several replicas one leads: the one whose name is in a Lease, for as long as it keeps renewing it.

`__main__` runs one elector around the controllers. Why no two ever lead at once:

- A leader's right ends `renew_seconds` after it *sent* the last renewal that was answered, whatever happened since.
- Others take over no sooner than `lease_seconds` after they *saw* that renewal, which is later than it was sent.
- Every write carries the version that was read, so of two that take over at once one is refused.

Only intervals on one machine's clock are compared; the times written into the Lease are for people. What is left of
the lease when the right ends is the time that the led task has to wind down.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, Protocol

from finetune_operator.errors import AlreadyExists, ClusterError, Conflict, Unreachable
from finetune_operator.kinds import LEASE
from finetune_operator.metrics import Metrics
from finetune_operator.raw import Document, version_of

__all__ = ["LeaderElector", "LeaseClient"]

_log = logging.getLogger(__name__)


class LeaseClient(Protocol):
    """Reads and writes one Lease. All raise ClusterError."""

    async def get(self) -> Document | None:
        """The Lease, None where there is none."""
        ...

    async def create(self, document: Document) -> Document:
        """Raises AlreadyExists."""
        ...

    async def update(self, document: Document) -> Document:
        """Replaces the Lease if its resourceVersion is still that of `document`; otherwise raises Conflict."""
        ...


class LeaderElector:
    """One candidate. `identity` is in no other process, and in none before it on the same machine."""

    def __init__(
        self,
        leases: LeaseClient,
        name: str,
        namespace: str,
        identity: str,
        lease_seconds: int = 15,
        renew_seconds: float = 10,
        retry_seconds: float = 2,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        rng: random.Random | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        """ValueError unless retry < renew < lease. `clock` gives the times that are written for people."""
        if not 0 < retry_seconds < renew_seconds < lease_seconds:
            raise ValueError(
                f"retry, renew and lease seconds are {retry_seconds}, {renew_seconds} and {lease_seconds}: "
                "each must be larger than the one before"
            )
        self.identity = identity
        self._leases = leases
        self._metadata = {"name": name, "namespace": namespace}
        self._lease_seconds = lease_seconds
        self._renew_seconds = renew_seconds
        self._retry_seconds = retry_seconds
        self._clock = clock
        self._rng = rng or random.Random()
        self._lease: Document | None = None
        self._seen_at = -math.inf
        self._leads_until = -math.inf
        (metrics or Metrics()).leader.labels(name).set_function(lambda: float(self.is_leader))

    @property
    def is_leader(self) -> bool:
        """Whether this candidate may act as leader at this moment."""
        return self._leads_until > -math.inf and _now() < self._leads_until

    async def run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Waits for the lease, then runs `lead`; returns or raises as it does, with the lease given back.

        When the lease is lost, `lead` is cancelled and awaited, and waiting begins again. When this is cancelled,
        so is `lead`, which keeps the lease while it winds down; then the lease is given back.
        """
        while True:
            await self._acquire()
            _log.info("%s leads", self.identity)
            if await self._while_leading(lead):
                return
            _log.warning("%s has lost the lease", self.identity)

    async def _while_leading(self, lead: Callable[[], Awaitable[None]]) -> bool:
        """Whether `lead` came to its own end."""
        work = asyncio.create_task(_awaited(lead), name="the led task")
        renewing = asyncio.create_task(self._renew_until_lost(), name="renewing the lease")
        ended_by_itself = False
        try:
            await asyncio.wait((work, renewing), return_when=asyncio.FIRST_COMPLETED)
            ended_by_itself = work.done()
        finally:
            await _end(work)
            await _end(renewing)
            await self._give_back()
            for task in (renewing,) if ended_by_itself else (renewing, work):
                _log_failure(task)
        if ended_by_itself:
            work.result()
        return ended_by_itself

    async def _acquire(self) -> None:
        while True:
            try:
                sent_at = _now()
                if await self._in_time(self._take()):
                    self._leads_until = sent_at + self._renew_seconds
                    return
            except ClusterError as error:
                _log.warning("%s cannot read or take the lease: %s", self.identity, error)
            await asyncio.sleep(self._until_next_look())

    def _until_next_look(self) -> float:
        """Less than a retry, so that a lease given back is soon noticed; and on time for one that runs out."""
        pause = self._retry_seconds * self._rng.uniform(0.4, 0.8)
        left = self._expires_at() - _now()
        return min(pause, left) if left > 0 else pause

    async def _take(self) -> bool:
        """One attempt to become the leader."""
        lease = await self._leases.get()
        self._see(lease)
        try:
            if lease is None:
                self._see(await self._leases.create(self._document(None)))
            elif self._is_free():
                self._see(await self._leases.update(self._document(lease)))
            else:
                return False
        except (AlreadyExists, Conflict):
            return False
        return True

    def _is_free(self) -> bool:
        holder = _spec(self._lease).get("holderIdentity")
        return not holder or holder == self.identity or _now() >= self._expires_at()

    def _expires_at(self) -> float:
        """By the duration that the holder has written: it may run with other settings than we do."""
        seconds = _spec(self._lease).get("leaseDurationSeconds")
        return self._seen_at + (seconds if isinstance(seconds, int) and seconds > 0 else self._lease_seconds)

    def _see(self, lease: Document | None) -> None:
        """Any write to the Lease counts as a sign of life, whoever made it."""
        if self._lease is None or lease is None or version_of(lease) != version_of(self._lease):
            self._seen_at = _now()
        self._lease = lease

    async def _renew_until_lost(self) -> None:
        """Ends when the lease is another's, or when the last renewal is too old."""
        while self.is_leader:
            try:
                async with asyncio.timeout_at(self._leads_until):
                    await asyncio.sleep(self._retry_seconds)
                    await self._renew()
            except TimeoutError:
                break
            except ClusterError as error:
                _log.warning("%s could not renew the lease: %s", self.identity, error)
        self._leads_until = -math.inf

    async def _renew(self) -> None:
        sent_at = _now()
        try:
            lease = await self._in_time(self._leases.update(self._document(self._lease)))
        except Conflict:
            # Perhaps an answer to us was lost on its way; perhaps the lease is another's by now.
            sent_at = _now()
            lease = await self._in_time(self._leases.get())
            if _spec(lease).get("holderIdentity") != self.identity:
                self._leads_until = -math.inf
                return
            lease = await self._in_time(self._leases.update(self._document(lease)))
        self._see(lease)
        self._leads_until = sent_at + self._renew_seconds

    async def _give_back(self) -> None:
        """So that another need not wait for the lease to run out."""
        if not self.is_leader or self._lease is None:
            return
        self._leads_until = -math.inf
        lease = self._document(self._lease)
        lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
        try:
            await self._in_time(self._leases.update(lease))
        except ClusterError as error:
            _log.warning("%s could not give the lease back: %s", self.identity, error)

    async def _in_time(self, answer: Awaitable[Any]) -> Any:
        """Half of the time for renewing, so that one lost request leaves room for another."""
        try:
            async with asyncio.timeout(self._renew_seconds / 2):
                return await answer
        except TimeoutError:
            raise Unreachable("the API server did not answer in time") from None

    def _document(self, lease: Document | None) -> Document:
        """The Lease as held by this candidate from now on."""
        before, now = _spec(lease), self._clock().isoformat(timespec="microseconds").replace("+00:00", "Z")
        mine = before.get("holderIdentity") == self.identity
        return {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.name,
            "metadata": (lease or {}).get("metadata") or self._metadata,
            "spec": {
                "holderIdentity": self.identity,
                "leaseDurationSeconds": self._lease_seconds,
                "acquireTime": (before.get("acquireTime") if mine else None) or now,
                "renewTime": now,
                "leaseTransitions": (before.get("leaseTransitions") or 0) + (lease is not None and not mine),
            },
        }


def _now() -> float:
    return asyncio.get_running_loop().time()


def _spec(lease: Document | None) -> Document:
    return (lease or {}).get("spec") or {}


async def _awaited(lead: Callable[[], Awaitable[None]]) -> None:
    await lead()


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        _log.error("%s failed while it was ended: %s", task.get_name(), error, exc_info=error)
