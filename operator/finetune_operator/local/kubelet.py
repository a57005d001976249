"""Runs the RayJobs of a cluster in memory on this machine, and writes their status as KubeRay would.

`finetune_client.session` makes one and calls `look` several times a second. It is three things that a real cluster
has: a queue (this machine trains one job at a time, the others wait suspended, as in Kueue), KubeRay (a RayJob becomes
a running entrypoint), and the trainers' progress sink (what they report is copied into the job's ConfigMap, and a wish
in there is obeyed). How an entrypoint is run is not known here: whoever makes the kubelet brings a `Launcher`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

from finetune_api.progress import Outcome, Progress
from finetune_operator import names
from finetune_operator.kinds import CONFIG_MAP, RAY_JOB, Key, Kind
from finetune_operator.local import ray_job
from finetune_operator.local.cluster import LocalCluster
from finetune_operator.raw import Document, key_of, text
from finetune_operator.resources.config_map import PLAN_KEY
from finetune_operator.states import ATTEMPT_KEY, OUTCOME_KEY, PROGRESS_KEY, STOP_KEY

__all__ = ["CannotLaunch", "Entrypoint", "Kubelet", "Launch", "Launcher"]

_WAITS = "finetune-operator.io/waits-for-this-machine"
"""Annotation of a RayJob that is suspended because another one has the machine; its value is its place in the queue."""
_REPORT_SECONDS = 1.0
"""At least so long between two reports into the ConfigMap."""


class CannotLaunch(Exception):
    """The entrypoint could not be started; the message says why."""


@dataclass(frozen=True)
class Launch:
    """What is to be run."""

    job: Key
    attempt: int
    plan: str
    """The RunPlan, as JSON."""


class Entrypoint(Protocol):
    """One attempt as it runs."""

    @property
    def progress(self) -> Progress | None:
        """The last report."""

    @property
    def outcome(self) -> Outcome | None:
        """What the trainers themselves wrote as their last word."""

    @property
    def log_tail(self) -> str:
        """The last lines that they printed."""

    def poll(self) -> int | None:
        """None while it runs. Once it has ended, and all that it started: the exit code, 128 + n after signal n."""

    def stop(self, patiently: bool = False) -> None:
        """Ask it to end cleanly; `poll` kills it when it takes too long. Returns at once.

        `patiently`: it is saving, and takes what time it needs until it is asked without.
        """


Launcher = Callable[[Launch], Entrypoint]
"""Starts an entrypoint. Raises CannotLaunch."""


@dataclass
class _Running:
    """An entrypoint and the RayJob that it was started for."""

    launch: Launch
    entrypoint: Entrypoint
    was_stopped: bool = False
    reported: tuple[Any, Any] = (None, None)
    reported_at: float = float("-inf")


class Kubelet:
    """The one node of a local cluster. Not for use by several tasks at once."""

    def __init__(
        self, cluster: LocalCluster, launcher: Launcher, clock: Callable[[], datetime], timer: Callable[[], float]
    ) -> None:
        """`clock` gives the time of day, `timer` seconds that only grow. The cluster's admission becomes this one's."""
        self._cluster = cluster
        self._launcher = launcher
        self._clock = clock
        self._timer = timer
        self._running: dict[str, _Running] = {}
        self._starts = True
        cluster.admission = self._admit

    @property
    def idle(self) -> bool:
        """No process of ours is left."""
        return not self._running

    async def look(self) -> None:
        """Bring every RayJob one step further, and end what nobody wants any more."""
        there = {document["metadata"]["uid"]: document for document in self._cluster.select(RAY_JOB)}
        for uid, running in list(self._running.items()):
            if uid not in there:
                running.entrypoint.stop()
                await self._follow(uid, running)
        for uid, document in there.items():
            status = await self._step(uid, document)
            if status is not None:
                await self._cluster.replace_status(RAY_JOB, document | {"status": status})
        await self._admit_next()

    def stop(self) -> None:
        """A person ends it all: what runs is asked to stop, and nothing is started any more."""
        self._starts = False
        for running in self._running.values():
            running.was_stopped = True
            running.entrypoint.stop()

    async def _step(self, uid: str, document: Document) -> Document | None:
        """The next status, None for the present one."""
        status, now = document.get("status") or {}, self._clock()
        wanted = not document["spec"].get("suspend")
        match status.get("jobDeploymentStatus", ""):
            case "":
                return ray_job.initializing(document["metadata"]["name"], now) if self._starts else None
            case "Initializing" if wanted:
                return self._launch(uid, document, status) if self._starts and self.idle else None
            case "Running" if wanted:
                return await self._watch(uid, status)
            case "Initializing" | "Running":
                return ray_job.suspending(status)
            case "Suspending":
                return ray_job.suspended() if await self._is_gone(uid) else None
            case "Suspended" if wanted:
                return ray_job.new()
        return None

    def _launch(self, uid: str, document: Document, status: Document) -> Document:
        try:
            launch = self._described(document)
            self._running[uid] = _Running(launch, self._launcher(launch))
        except CannotLaunch as error:
            return ray_job.ended(status, 1, False, str(error), self._clock())
        return ray_job.submitted(status)

    def _described(self, document: Document) -> Launch:
        labels, key = document["metadata"].get("labels"), key_of(document)
        job, attempt = names.job_of(labels), names.attempt_of(labels)
        if job is None or attempt is None:
            raise CannotLaunch(f"RayJob {key.name} is of no job: it lacks the labels that the operator gives")
        name = names.plan_config_map(job, attempt)
        plan = self._cluster.peek(CONFIG_MAP, Key(key.namespace, name))
        if plan is None:
            raise CannotLaunch(f"ConfigMap {name} with the plan is not there")
        return Launch(Key(key.namespace, job), attempt, plan["data"][PLAN_KEY])

    async def _watch(self, uid: str, status: Document) -> Document | None:
        if (running := self._running.get(uid)) is None:
            return ray_job.ended(status, None, False, "", self._clock())
        if self._is_asked_to_stop(running.launch):
            running.entrypoint.stop(patiently=True)  # the operator ends the attempt when its time is over
        code = await self._follow(uid, running)
        if code is not None:
            return ray_job.ended(status, code, running.was_stopped, running.entrypoint.log_tail, self._clock())
        return ray_job.running(status, self._clock()) if status.get("jobStatus") == "PENDING" else None

    def _is_asked_to_stop(self, launch: Launch) -> bool:
        """By the operator, which wants it suspended: rank 0 reads that in the same place in a cluster."""
        report = self._cluster.peek(CONFIG_MAP, Key(launch.job.namespace, names.progress_config_map(launch.job.name)))
        return text(report, "data", STOP_KEY) == str(launch.attempt)

    async def _is_gone(self, uid: str) -> bool:
        """Whether nothing is left of a suspended RayJob's entrypoint; it is asked to end."""
        if (running := self._running.get(uid)) is None:
            return True
        running.entrypoint.stop()
        return await self._follow(uid, running) is not None

    async def _follow(self, uid: str, running: _Running) -> int | None:
        """Copy what was reported; an entrypoint that has ended is forgotten. Its exit code, None while it runs."""
        code = running.entrypoint.poll()
        await self._report(running, at_once=code is not None)
        if code is not None:
            del self._running[uid]
        return code

    async def _report(self, running: _Running, at_once: bool) -> None:
        """As rank 0 does in a cluster: into the one ConfigMap that it may write, not more often than makes sense.

        The outcome is written before the RayJob ends, so that whoever sees the end knows its reason.
        """
        said = (running.entrypoint.progress, running.entrypoint.outcome)
        now = self._timer()
        if said == running.reported or not (at_once or now >= running.reported_at + _REPORT_SECONDS):
            return
        key = Key(running.launch.job.namespace, names.progress_config_map(running.launch.job.name))
        if self._cluster.peek(CONFIG_MAP, key) is None:
            return  # the job was deleted
        progress, outcome = (None if one is None else json.dumps(one.to_document()) for one in said)
        data = {ATTEMPT_KEY: str(running.launch.attempt), PROGRESS_KEY: progress, OUTCOME_KEY: outcome}
        await self._cluster.merge(CONFIG_MAP, key, {"data": data})
        running.reported, running.reported_at = said, now

    def _admit(self, kind: Kind, document: Document) -> Document:
        """A RayJob that must wait for the machine is created suspended, as Kueue's webhook does it."""
        if kind != RAY_JOB or not (document["spec"].get("suspend") or self._taken()):
            return document
        metadata = document["metadata"]
        annotations = {**(metadata.get("annotations") or {}), _WAITS: str(self._cluster.version)}
        spec = document["spec"] | {"suspend": True}
        return document | {"metadata": metadata | {"annotations": annotations}, "spec": spec}

    async def _admit_next(self) -> None:
        """Give the free machine to the RayJob that has waited longest."""
        waiting = [one for one in self._cluster.select(RAY_JOB) if _place(one) is not None]
        if waiting and self._starts and not self._taken():
            first = min(waiting, key=lambda one: _place(one) or 0)
            patch = {"metadata": {"annotations": {_WAITS: None}}, "spec": {"suspend": False}}
            await self._cluster.merge(RAY_JOB, key_of(first), patch)

    def _taken(self) -> bool:
        """Whether a RayJob has the machine, or is about to."""
        active = (
            not one["spec"].get("suspend") and not ray_job.is_finished(one.get("status") or {})
            for one in self._cluster.select(RAY_JOB)
        )
        return not self.idle or any(active)


def _place(document: Document) -> int | None:
    """A RayJob's place in the queue, None for one that does not wait in it."""
    place = (document["metadata"].get("annotations") or {}).get(_WAITS)
    return int(place) if place is not None and document["spec"].get("suspend") else None
