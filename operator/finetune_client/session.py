"""The operator on this machine: the same passes as in a cluster, over objects in memory, until the jobs have ended.

`finetune run` makes one. Several times a second it lets the kubelet look after the processes, and lets the reconciler
make a pass over every job when anything has changed or is due. All of it happens in one task, one thing after another.

    with RunFolder.create(...) as folder:
        session = Session(folder, Attempts(folder, on_report, 30.0))
        await session.submit(jobs, runtimes)
        await session.run(every_look)
        session.status(key)
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any

from finetune_api.job import FineTuneJob, Phase, Status
from finetune_api.runtime import FineTuneRuntime
from finetune_client.folders import NoRun, RunFolder, jobs_in
from finetune_operator.conditions import find
from finetune_operator.errors import Conflict
from finetune_operator.kinds import CONFIG_MAP, FINETUNE_JOB, FINETUNE_RUNTIME, RAY_JOB, Key, Kind
from finetune_operator.local import LocalCluster
from finetune_operator.local.kubelet import Kubelet, Launcher
from finetune_operator.names import JOB_LABEL
from finetune_operator.observe import World
from finetune_operator.policies.dependencies import dependency_names, with_plan
from finetune_operator.reconcile import Reconciler
from finetune_operator.settings import Settings
from finetune_operator.status import read_status
from finetune_operator.views import runtime_name

__all__ = ["Session", "key_of_job"]

_LOOK_SECONDS = 0.1
_SAVE_SECONDS = 1.0
_PASSES = 20
"""Passes over a job in one look, at most: each may make the next one necessary."""
_CHILDREN: tuple[Kind, ...] = (RAY_JOB, CONFIG_MAP)


class Session:
    """One run of one or several jobs. For one event loop."""

    def __init__(
        self,
        folder: RunFolder,
        launcher: Launcher,
        *,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        """`folder` has been entered. `clock` gives the time of day, `timer` seconds that only grow."""
        self.folder = folder
        self.jobs: list[Key] = []
        """In the order in which they were given."""
        self.stopping = False
        """A person has asked for the end."""
        self.now = clock
        self._timer = timer
        self._cluster = LocalCluster(clock=clock)
        self._kubelet = Kubelet(self._cluster, launcher, clock, timer)
        self._reconciler = Reconciler(self._cluster, self._world, clock, Settings())
        self._to_suspend: list[Key] = []
        self._reconciled = 0
        self._due = float("inf")
        self._saved = 0
        self._saved_at = float("-inf")

    async def submit(self, jobs: Iterable[FineTuneJob], runtimes: Iterable[FineTuneRuntime]) -> None:
        """What `kubectl apply` does with a file."""
        for runtime in runtimes:
            document = runtime.to_document()
            document["metadata"].pop("namespace", None)  # a model's default, for an object that has none
            await self._cluster.create(FINETUNE_RUNTIME, document)
        for job in jobs:
            self.jobs.append(key_of_job(job))
            await self._cluster.create(FINETUNE_JOB, _for_this_machine(job))

    async def go_on(self) -> None:
        """Take up what the folder's state tells, where it was interrupted. Suspended jobs are suspended no longer.

        Raises NoRun when all jobs have ended.
        """
        self._cluster.restore(self.folder.state.objects)
        self.jobs = [key_of_job(job) for job in jobs_in(self.folder.state)]
        phases = {key.name: self.status(key).phase for key in self.jobs if self.status(key).finished_at is not None}
        if len(phases) == len(self.jobs):
            ends = ", ".join(f"{name} {phase}" for name, phase in phases.items())
            raise NoRun(f"the run in {self.folder.path} has ended ({ends}); start another one")
        for key in self.jobs:
            if self.status(key).phase is Phase.SUSPENDED:
                # One that its failure policy holds is let go by a person who suspends it and takes that back.
                await self._suspend(key, True)
                await self._reconciler.reconcile(key)
                await self._suspend(key, False)

    async def run(self, every_look: Callable[[], None]) -> None:
        """Until nothing more will come of any job, or `stop` was called; then no process is left."""
        while True:
            await self._kubelet.look()
            await self._reconcile()
            every_look()
            while self._to_suspend:
                await self._suspend(self._to_suspend.pop(), True)
            is_over = self._kubelet.idle and (self.stopping or all(map(self._is_settled, self.jobs)))
            self._save(at_once=is_over)
            if is_over:
                return
            await asyncio.sleep(_LOOK_SECONDS)

    @property
    def version(self) -> int:
        """Grows with every change of any object."""
        return self._cluster.version

    @property
    def is_training(self) -> bool:
        """Whether an attempt has processes now."""
        return not self._kubelet.idle

    def stop(self) -> None:
        """Ask the present attempt to stop cleanly, and start no other."""
        self.stopping = True
        self._kubelet.stop()

    def suspend(self, key: Key) -> None:
        """Suspend a job, at the next look."""
        self._to_suspend.append(key)

    def job(self, key: Key) -> FineTuneJob:
        """The job as it stands."""
        return FineTuneJob.model_validate(self._document(key))

    def status(self, key: Key) -> Status:
        """The job's status, as kubectl would show it."""
        return read_status(self._document(key).get("status")) or Status()

    async def _suspend(self, key: Key, value: bool) -> None:
        await self._cluster.merge(FINETUNE_JOB, key, {"spec": {"suspend": value}})

    async def _reconcile(self) -> None:
        """Passes over every job that has not ended, until nothing changes any more."""
        for _ in range(_PASSES):
            if self._cluster.version == self._reconciled and self._timer() < self._due:
                return
            self._reconciled, self._due = self._cluster.version, float("inf")
            for key in self.jobs:
                # One that has ended is left as it is, and not deleted when its time is over: its status is the result.
                if self.status(key).finished_at is None:
                    self._due = min(self._due, self._timer() + await self._pass(key))

    async def _pass(self, key: Key) -> float:
        """One pass. In how many seconds to make another, whatever happens until then."""
        try:
            wait = await self._reconciler.reconcile(key)
        except Conflict:
            return 0.0
        return float("inf") if wait is None else wait

    def _world(self, key: Key) -> World | None:
        job = self._cluster.peek(FINETUNE_JOB, key)
        if job is None:
            return None
        runtime, label = runtime_name(job), f"{JOB_LABEL}={key.name}"
        return World(
            job=job,
            runtime=None if runtime is None else self._cluster.peek(FINETUNE_RUNTIME, Key("", runtime)),
            children={kind: self._cluster.select(kind, key.namespace, label) for kind in _CHILDREN},
            dependencies={name: self._other(Key(key.namespace, name)) for name in dependency_names(job)},
            one_machine=True,
        )

    def _other(self, key: Key) -> dict[str, Any] | None:
        job = self._cluster.peek(FINETUNE_JOB, key)
        plans = self._cluster.select(CONFIG_MAP, key.namespace, f"{JOB_LABEL}={key.name}")
        return None if job is None else with_plan(job, plans)

    def _is_settled(self, key: Key) -> bool:
        """Nothing more will come of the job by itself."""
        status = self.status(key)
        if status.finished_at is not None or status.phase is Phase.SUSPENDED:
            return True
        if (valid := find(status.conditions, "Valid")) is not None and valid.status == "False":
            return True
        needed = [Key(key.namespace, name) for name in dependency_names(self._document(key))]
        return any(self._is_settled(one) and find(self.status(one).conditions, "Complete") is None for one in needed)

    def _save(self, at_once: bool) -> None:
        """Keep on disk what `go_on` needs, not more often than it changes, nor than makes sense."""
        if self._cluster.version == self._saved or not (at_once or self._timer() >= self._saved_at + _SAVE_SECONDS):
            return
        self.folder.state.objects = self._cluster.dump()
        self.folder.save()
        self._saved, self._saved_at = self._cluster.version, self._timer()

    def _document(self, key: Key) -> dict[str, Any]:
        found = self._cluster.peek(FINETUNE_JOB, key)
        assert found is not None, "nobody deletes the jobs of a session"
        return found


def key_of_job(job: FineTuneJob) -> Key:
    """Where the cluster has it."""
    return Key(job.metadata.namespace, job.metadata.name)


def _for_this_machine(job: FineTuneJob) -> dict[str, Any]:
    """The job as it is submitted here: there are no pods to look around in after a failure."""
    document = job.to_document()
    document["spec"].get("lifecycle", {}).pop("keepFailedClusterSeconds", None)
    for given_by_the_cluster in ("generation", "uid", "resourceVersion", "creationTimestamp"):
        document["metadata"].pop(given_by_the_cluster, None)
    document.pop("status", None)
    return document
