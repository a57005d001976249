"""One pass over one job: observe, decide, act, report.

`handlers` calls it for each key that its watches name, `local` does so on a laptop. What is decided stands in `decide`;
here is only what keeps a decision from being made on old news, and what happens when the cluster says no.

- Nothing is decided on a job that is older than our own last write to its status: the watch will bring the newer one.
  No RayJob is created for a job that is older than the server's.
- A RayJob that the watch does not show is looked up before anybody concludes that it was deleted.
- A name that is taken is looked at: ours, and merely not seen yet, or somebody else's.
- A new attempt takes two passes, in the order that `starts` gives: its RayJob, and then everything else.
- Objects are created first and the status, which tells of them, written after. A pass that is cut off between the two
  is made good by the next, which finds the objects by their names.
- The RayJob of an attempt that is ended early is deleted after the status has told why. The other way round, a pass
  that is cut off in between would leave a RayJob that is gone and nobody knows the reason of.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from finetune_operator import names, starts
from finetune_operator.cluster.protocol import Cluster, Document
from finetune_operator.decide import decide
from finetune_operator.decision import Create, Decision, Delete
from finetune_operator.errors import AlreadyExists, ApiError, Conflict, Invalid, NotFound
from finetune_operator.events import EventRecorder
from finetune_operator.kinds import CONFIG_MAP, FINETUNE_JOB, RAY_JOB, Key, Kind
from finetune_operator.logs import about
from finetune_operator.metrics import Metrics
from finetune_operator.observe import World, observe
from finetune_operator.outdated import dropped_fields, is_there, outdated_message, place_of
from finetune_operator.raw import controller_uid, version_of
from finetune_operator.refusals import (
    KUBERAY_MISSING,
    Refusal,
    is_left_over,
    name_taken,
    refusal_of,
    refused_status,
    was_refused,
)
from finetune_operator.settings import Settings
from finetune_operator.status import without
from finetune_operator.transitions import count_transition

__all__ = ["Reconciler"]

PROGRESS_SECONDS = 15.0
"""At least so long between two writes of a status in which only progress differs."""

_WATCH_SECONDS = 5.0  # the watch names the key when it brings the job; this is for the case that it does not
_LULL_SECONDS = 0.5  # without another RayJob made, the rest is made of those that are there
_PATIENCE_SECONDS = 30.0
_LOOKS = 12  # one more for each object that turns out to be there
_log = logging.getLogger(__name__)


@dataclass
class _Memory:
    """What was last done for a job: its status written, from which version and when; its RayJob made, likewise."""

    replaced: str = ""
    written_at: datetime | None = None
    begun: str = ""
    begun_at: datetime | None = None
    unkept: tuple[str, ...] | None = None
    """Fields of the status that the cluster does not keep; None before the first write."""


@dataclass(frozen=True)
class _Created:
    """What came of creating: the RayJob, and what turned out to be there and must be decided on first."""

    ray_job: Document | None = None
    unseen: tuple[Kind, Document] | None = None


class Reconciler:
    """Brings one job at a time to what it should be."""

    def __init__(
        self,
        cluster: Cluster,
        worlds: Callable[[Key], World | None],
        clock: Callable[[], datetime],
        settings: Settings,
        metrics: Metrics | None = None,
        *,
        knows_ray_jobs: Callable[[], bool] = lambda: True,
    ) -> None:
        """`worlds` gives what was seen of a job, None where there is none. `knows_ray_jobs`: KubeRay is installed."""
        self._cluster = cluster
        self._worlds = worlds
        self._clock = clock
        self._settings = settings
        self._metrics = metrics or Metrics()
        self._knows_ray_jobs = knows_ray_jobs
        self._events = EventRecorder(cluster, clock, settings.pod_name)
        self._memories: dict[Key, _Memory] = {}
        self._last_begun_at: datetime | None = None

    async def reconcile(self, key: Key) -> float | None:
        """One pass. In how many seconds to look again; None for when something changes. Raises ClusterError."""
        world = self._worlds(key)
        if world is None:
            self._memories.pop(key, None)
            return None
        memory = self._memories.setdefault(key, _Memory())
        if version_of(world.job) == memory.replaced:
            return _WATCH_SECONDS
        with about(namespace=key.namespace, job=key.name, attempt=_present_attempt(world.job).get("number")):
            unkept = memory.unkept
            again = await self._pass(key, await self._with_present_attempt(replace(world, unkept=unkept)))
            # Of what a write has found out no watch may tell.
            return again if (memory.unkept or ()) == (unkept or ()) else _sooner(again, _WATCH_SECONDS)

    async def _pass(self, key: Key, world: World) -> float | None:
        for _ in range(_LOOKS):
            begun = starts.begun(world)
            if begun is not None and (wait := self._until_others_have_begun(key, world, begun)) > 0:
                return wait
            decision = decide(world.job, observe(starts.without(world, begun)), self._clock(), self._settings)
            if begun is not None:
                decision = starts.furnished(decision, begun)
            try:
                begins = await self._begins(world, decision)
                created = await self._create(world, starts.beginning(decision.create) if begins else decision.create)
            except _Refused as refused:
                # Without the rest, a RayJob would hold machines for pods that wait for their plan.
                await self._delete(starts.withdrawn(begun))
                return await self._report_refusal(key, world.job, decision, refused.refusal)
            if created.unseen is None and begins:
                return self._note_beginning(key, world.job)
            if created.unseen is None:
                return await self._carry_out(key, world.job, starts.with_uid(decision, created.ray_job))
            world = _with_child(world, *created.unseen)
        raise AssertionError("what the world shows is not created")

    def _note_beginning(self, key: Key, job: Document) -> float:
        memory = self._memories.setdefault(key, _Memory())
        memory.begun, memory.begun_at = version_of(job), self._clock()
        self._last_begun_at = memory.begun_at
        return _LULL_SECONDS

    def _until_others_have_begun(self, key: Key, world: World, ray_job: Document) -> float:
        """Seconds that the rest of an attempt can wait, because RayJobs are being made for others; 0 for no longer.

        Nobody misses the rest before KubeRay has touched the RayJob. The older the RayJob, the longer until it is
        looked at again, so that waiting for a thousand others costs a dozen looks.
        """
        memory, now = self._memories.setdefault(key, _Memory()), self._clock()
        if memory.begun_at is None or memory.begun != version_of(world.job) or ray_job.get("status"):
            return 0.0
        if world.one_machine:
            return 0.0  # whoever looks next would find a job without its attempt
        age = (now - memory.begun_at).total_seconds()
        since_last = (now - self._last_begun_at).total_seconds() if self._last_begun_at else age
        if age >= _PATIENCE_SECONDS or since_last >= _LULL_SECONDS:
            return 0.0
        return max(_LULL_SECONDS, age / 4)

    async def _begins(self, world: World, decision: Decision) -> bool:
        """Whether a new attempt's RayJob is made now, and all the rest later. Raises Conflict for old news.

        The RayJob comes last instead, when all that it needs is there, where something was refused before, and where
        the plan that its pods wait for is there already: it would be somebody else's.
        """
        ray_job = starts.ray_job_of(decision.create)
        if ray_job is None:
            return False
        if not self._knows_ray_jobs():
            raise _Refused(KUBERAY_MISSING)
        plan = Key(_namespace(world.job), names.plan_of(ray_job["metadata"]["name"]))
        there, _ = await asyncio.gather(
            self._cluster.get(CONFIG_MAP, plan), self._check_that_nothing_changed(world.job)
        )
        return there is None and not was_refused(world.job.get("status"))

    async def _with_present_attempt(self, world: World) -> World:
        """The world, in which the RayJob of an attempt that has not ended is missing only if it is really gone."""
        name = _present_attempt(world.job).get("rayJob")
        if not name or name in _names(world.children.get(RAY_JOB, ())):
            return world
        there = await self._cluster.get(RAY_JOB, Key(_namespace(world.job), name))
        return world if there is None else _with_child(world, RAY_JOB, there)

    async def _create(self, world: World, wanted: Sequence[Create]) -> _Created:
        """Creates what is wanted, stage by stage; a stage begins when all of the one before is there."""
        created = _Created()
        for stage in starts.stages(wanted):
            steps = [self._create_one(world, one) for one in stage]
            # Each is waited for, whatever the others come to: nothing of this pass goes on behind the next one's back.
            for result in await asyncio.gather(*steps, return_exceptions=True):
                if isinstance(result, BaseException):
                    raise result
                if result.unseen is not None:
                    return result
                created = result
        return created

    async def _check_that_nothing_changed(self, job: Document) -> None:
        """Raises Conflict where the job is not what the watch shows.

        A watch can hang for a minute before anybody notices, here or in the replica that has just taken over. What is
        old news for a status is refused by the server; a RayJob for an attempt of the past would be started.
        """
        there = await self._cluster.get(FINETUNE_JOB, Key(_namespace(job), job["metadata"]["name"]))
        if there is None or version_of(there) != version_of(job):
            raise Conflict(409, "Conflict", "the job has changed since it was last seen")

    async def _create_one(self, world: World, one: Create) -> _Created:
        name = one.document["metadata"]["name"]
        try:
            created = await self._cluster.create(one.kind, one.document)
            _log.log(logging.INFO if one.kind == RAY_JOB else logging.DEBUG, "created %s %s", one.kind.name, name)
        except AlreadyExists:
            unseen = await self._holder(world, one.kind, name)
            return _Created(unseen=None if unseen is None else (one.kind, unseen))
        except ApiError as error:
            refusal = refusal_of(error, one.kind, name)
            if refusal is None:
                raise
            raise _Refused(refusal) from error
        return _Created(ray_job=created) if one.kind == RAY_JOB else _Created()

    async def _holder(self, world: World, kind: Kind, name: str) -> Document | None:
        """Who has a name that the job needs. None: the job itself, and that is fine; raises _Refused: another.

        Returned is what the world does not show and `decide` must know of: a RayJob of ours, which is an attempt, or
        an object of somebody else.
        """
        there = await self._cluster.get(kind, Key(_namespace(world.job), name))
        if there is None:
            raise Conflict(409, "Conflict", f"{kind.name} {name} was there, and is gone")
        is_ours = controller_uid(there) == world.job["metadata"].get("uid")
        is_news = name not in _names(world.children.get(kind, ()))
        if is_news and not is_left_over(there, world.job) and (kind == RAY_JOB or not is_ours):
            return there
        if is_ours and not there["metadata"].get("deletionTimestamp"):
            return None
        raise _Refused(name_taken(kind, there, world.job))

    async def _carry_out(self, key: Key, job: Document, decision: Decision) -> float | None:
        wait = self._until_progress_is_due(key, job, decision)
        if wait is not None:
            return _sooner(decision.requeue_after, wait)
        present = _present_attempt(job).get("rayJob")
        last = [one for one in decision.delete if one.kind == RAY_JOB and one.key.name == present]
        await self._delete(one for one in decision.delete if one not in last)
        if decision.status is not None:
            await self._write_status(key, job, decision.status)
        await self._delete(last)
        for event in decision.events:
            await self._events.record(job, event.type, event.reason, event.message)
        for one in decision.merge:
            with suppress(NotFound):  # what is gone is asked of nobody
                await self._cluster.merge(one.kind, one.key, one.patch)
        return decision.requeue_after

    async def _delete(self, unwanted: Iterable[Delete]) -> None:
        for one in unwanted:
            _log.info("deleting %s %s", one.kind.name, one.key.name)
            await self._cluster.delete(one.kind, one.key, one.uid)

    async def _report_refusal(self, key: Key, job: Document, decision: Decision, refusal: Refusal) -> float:
        status = refused_status(job.get("status"), decision.status, refusal, job, self._clock())
        _log.log(logging.DEBUG if status is None else logging.WARNING, "%s: %s", refusal.reason, refusal.message)
        if status is not None:
            await self._write_status(key, job, status)
            await self._events.record(job, "Warning", refusal.reason, refusal.message)
        return refusal.wait

    async def _write_status(self, key: Key, job: Document, status: Document) -> None:
        """Raises Conflict where the job has changed: the next pass decides anew."""
        try:
            written, refused = await self._kept_status(job, status)
        except NotFound:
            return  # deleted meanwhile, and what it owned goes with it
        memory = self._memories.setdefault(key, _Memory())
        # A server that finds nothing changed leaves the version as it is; there is nothing newer to wait for then.
        memory.replaced = version_of(job) if version_of(written) != version_of(job) else ""
        memory.written_at = self._clock()
        count_transition(self._metrics, job, status)
        kept = written.get("status")
        earlier = [path for path in memory.unkept or () if not is_there(path, kept)]
        unkept = tuple(dict.fromkeys([*earlier, *refused, *dropped_fields(status, kept)]))
        if unkept and unkept != memory.unkept:
            _log.warning(outdated_message(list(unkept)))
        memory.unkept = unkept

    async def _kept_status(self, job: Document, status: Document) -> tuple[Document, list[str]]:
        """The job as the server has it after the write, and the fields that it did not take.

        Raises Invalid where what it refuses is no field of the status.
        """
        refused: list[str] = []
        while True:
            try:
                return await self._cluster.replace_status(FINETUNE_JOB, {**job, "status": status}), refused
            except Invalid as error:
                fields = [field for field, _ in error.causes if field.startswith("status.")]
                rest = without(status, map(place_of, fields))
                if rest == status:
                    raise
                _log.debug("a status is written without %s: %s", ", ".join(fields), error.message)
                refused += fields
                status = rest

    def _until_progress_is_due(self, key: Key, job: Document, decision: Decision) -> float | None:
        """Seconds until a status that only brings news of progress may be written; None for now."""
        written_at = self._memories[key].written_at
        if decision.status is None or decision.delete or decision.events or decision.merge or written_at is None:
            return None
        left = PROGRESS_SECONDS - (self._clock() - written_at).total_seconds()
        if left <= 0 or _without_progress(decision.status) != _without_progress(job.get("status") or {}):
            return None
        return left


class _Refused(Exception):
    """An object that the job needs was not created."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def _without_progress(status: Document) -> Document:
    """What a person would call a change of state."""
    return {
        **{name: value for name, value in status.items() if name not in ("message", "progress")},
        "attempts": [{**attempt, "step": None} for attempt in status.get("attempts") or []],
        "conditions": [{**condition, "message": None} for condition in status.get("conditions") or []],
    }


def _present_attempt(job: Document) -> Document:
    """The attempt in the status that has not ended; empty where there is none."""
    attempts: list[Document] = (job.get("status") or {}).get("attempts") or [{}]
    return {} if attempts[-1].get("endedAt") else attempts[-1]


def _with_child(world: World, kind: Kind, document: Document) -> World:
    name = document["metadata"]["name"]
    seen = [one for one in world.children.get(kind, ()) if one["metadata"]["name"] != name]
    return replace(world, children={**world.children, kind: [*seen, document]})


def _names(documents: Sequence[Document]) -> set[Any]:
    return {document["metadata"]["name"] for document in documents}


def _namespace(job: Document) -> str:
    return str(job["metadata"].get("namespace") or "")


def _sooner(first: float | None, second: float) -> float:
    return second if first is None else min(first, second)
