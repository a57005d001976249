"""What is watched, and which job a change is about.

`__main__` makes one `Operator`, runs its watches on every replica and its workers on the one that leads; `local` does
the same for a single job. A change only ever names a job: what to do about it is decided from all that is known then.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from finetune_operator import names, views
from finetune_operator.cluster.presence import OptionalKind, RequiredKind
from finetune_operator.cluster.protocol import Cluster, Document
from finetune_operator.kinds import CONFIG_MAP, FINETUNE_JOB, FINETUNE_RUNTIME, POD, RAY_JOB, Key, Kind
from finetune_operator.metrics import Metrics
from finetune_operator.observe import World
from finetune_operator.policies.dependencies import dependency_names, with_plan
from finetune_operator.reconcile import Reconciler
from finetune_operator.runtime.controller import Controller
from finetune_operator.runtime.reflector import Change, ListWatch, Reflector
from finetune_operator.runtime.store import Store
from finetune_operator.runtime.workqueue import CHANGED, RESYNC, WorkQueue
from finetune_operator.settings import Settings
from finetune_operator.states import project_pod

__all__ = ["Operator"]

ECHO = CHANGED - 10
"""Priority of what follows from our own writes: jobs that nobody has looked at yet come before."""
PROGRESS = (CHANGED + RESYNC) // 2
"""Priority of a change that only brings figures."""

_NAME = "finetunejob"
_STUCK_SECONDS = 300.0  # a pass is cut off long before
_INSTALL_CRDS = (
    "the cluster does not know {}: install the CRDs, with the chart or by "
    "`kubectl apply --server-side -f manifests/crd`"
)
_OWNED: dict[Kind, Callable[[Document], Document]] = {
    RAY_JOB: views.project_ray_job,
    CONFIG_MAP: views.project_config_map,
    POD: project_pod,
}
"""What belongs to jobs and is watched, by its label, with what is kept of it. Other children are created and left."""


class Operator:
    """Watches a cluster and works on its jobs."""

    def __init__(
        self,
        cluster: Cluster,
        settings: Settings,
        metrics: Metrics | None = None,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Nothing is asked of the cluster before `watch`."""
        self._cluster = cluster
        self._settings = settings
        self._metrics = metrics or Metrics()
        self._clock = clock
        self._queue: WorkQueue[Key] | None = None
        self._begun: dict[Key, float] = {}
        self._optional: list[OptionalKind] = []
        namespaces: tuple[str | None, ...] = settings.watch_namespaces or (None,)
        self._reflectors = {
            (kind, namespace): self._reflector(kind, namespace)
            for kind in (FINETUNE_JOB, *_OWNED)
            for namespace in namespaces
        } | {(FINETUNE_RUNTIME, None): self._reflector(FINETUNE_RUNTIME, None)}
        self._metrics.count_jobs_with(self._count_jobs)

    async def watch(self) -> None:
        """Keeps the stores up to date until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for (kind, namespace), reflector in self._reflectors.items():
                tasks.create_task(reflector.run(), name=f"watching {kind.plural} {namespace or ''}")

    async def work(self) -> None:
        """Brings every job to what it should be, until cancelled. On one replica at a time."""
        for reflector in self._reflectors.values():
            await reflector.synced.wait()
        reconciler = Reconciler(
            *(self._cluster, self.world, self._clock, self._settings, self._metrics),
            knows_ray_jobs=lambda: all(one.is_known for one in self._optional),
        )

        async def timed(key: Key) -> float | None:
            self._begun[key] = asyncio.get_running_loop().time()
            try:
                return await reconciler.reconcile(key)
            finally:
                del self._begun[key]

        self._queue = WorkQueue(_NAME, metrics=self._metrics)
        try:
            self._add_all()
            await Controller(_NAME, self._queue, timed, self._settings.workers, self._metrics).run()
        finally:
            self._queue.shut_down()
            self._queue = None

    def world(self, key: Key) -> World | None:
        """What is known of a job and of all it depends on; None where there is no such job, or it is another's."""
        jobs = self._store(FINETUNE_JOB, key.namespace)
        job = jobs.get(key) if jobs is not None else None
        if jobs is None or job is None or not views.is_ours(job):
            return None
        runtime = views.runtime_name(job)
        return World(
            job=job,
            runtime=None if runtime is None else self._runtimes.get(Key("", runtime)),
            children={kind: self._owned(kind, key) for kind in _OWNED if kind != POD},
            pods=self._owned(POD, key),
            dependencies={name: self._other(jobs, Key(key.namespace, name)) for name in dependency_names(job)},
        )

    def _other(self, jobs: Store, key: Key) -> Document | None:
        job = jobs.get(key)
        return None if job is None else with_plan(job, self._owned(CONFIG_MAP, key))

    def unready(self) -> str | None:
        """Why what is known cannot be trusted; None where it can. For /readyz."""
        return next((problem for one in self._reflectors.values() if (problem := one.problem())), None)

    def stuck(self) -> str | None:
        """What only a restart mends; None where nothing does. For /healthz, whose answer shows that the loop turns."""
        now = asyncio.get_running_loop().time()
        for key, begun_at in self._begun.items():
            if now - begun_at > _STUCK_SECONDS:
                return f"a pass over {key.namespace}/{key.name} has lasted {now - begun_at:.0f} s"
        return None

    @property
    def _runtimes(self) -> Store:
        return self._reflectors[FINETUNE_RUNTIME, None].store

    def _store(self, kind: Kind, namespace: str) -> Store | None:
        reflector = self._reflectors.get((kind, None)) or self._reflectors.get((kind, namespace))
        return None if reflector is None else reflector.store

    def _owned(self, kind: Kind, key: Key) -> list[Document]:
        store = self._store(kind, key.namespace)
        return store.by_index(views.BY_JOB, f"{key.namespace}/{key.name}") if store is not None else []

    def _jobs(self) -> Iterable[Document]:
        for (kind, _), reflector in self._reflectors.items():
            if kind == FINETUNE_JOB:
                yield from reflector.store.list()

    def _count_jobs(self) -> Mapping[tuple[str, str], int]:
        statuses = (job.get("status") or {} for job in self._jobs())
        return Counter((status.get("phase", "Pending"), status.get("method", "")) for status in statuses)

    def _reflector(self, kind: Kind, namespace: str | None) -> Reflector:
        how: dict[str, Any] = {"metrics": self._metrics}
        if kind in _OWNED:
            how |= {"indexers": views.owned_indexers(), "project": _OWNED[kind], "on_change": self._child_changed}
        elif kind == FINETUNE_JOB:
            how |= {"indexers": views.job_indexers(), "project": views.project_object, "on_change": self._job_changed}
        else:
            how |= {"project": views.project_object, "on_change": self._runtime_changed}
        return Reflector(self._source(kind, namespace), kind.name, **how)

    def _source(self, kind: Kind, namespace: str | None) -> ListWatch:
        selector = names.managed_selector() if kind in _OWNED else None
        source = self._cluster.source(kind, namespace, selector)
        if kind == RAY_JOB:
            optional = OptionalKind(source, self._add_all)
            self._optional.append(optional)
            return optional
        return source if kind in _OWNED else RequiredKind(source, _INSTALL_CRDS.format(kind.name))

    def _add(self, key: Key, priority: int = CHANGED) -> None:
        """Only the leader works; a new one begins with all jobs anyway."""
        if self._queue is not None:
            self._queue.add(key, priority)

    def _add_all(self) -> None:
        for job in self._jobs():
            self._add(_key(job), RESYNC if job.get("status") else CHANGED)

    def _job_changed(self, change: Change) -> None:
        self._add(change.key, ECHO if _only_status(change) else CHANGED)
        if _outcome(change.old) != _outcome(change.new):
            store = self._store(FINETUNE_JOB, change.key.namespace)
            for job in store.by_index(views.NEEDED_BY, f"{change.key.namespace}/{change.key.name}") if store else ():
                self._add(_key(job))

    def _runtime_changed(self, change: Change) -> None:
        """A job that has begun keeps the runtime as it was then."""
        for (kind, _), reflector in self._reflectors.items():
            if kind == FINETUNE_JOB:
                for job in reflector.store.by_index(views.BY_RUNTIME, change.key.name):
                    if not ((job.get("status") or {}).get("resolved") or {}).get("runtimeHash"):
                        self._add(_key(job))

    def _child_changed(self, change: Change) -> None:
        """KubeRay and the kubelet write often; what reads as before is no news."""
        if change.old is not None and change.new is not None and _content(change.old) == _content(change.new):
            return
        document = change.new if change.new is not None else change.old
        job = names.job_of(document["metadata"].get("labels")) if document is not None else None
        if job is None:
            return
        only_progress = change.key.name == names.progress_config_map(job) and change.new is not None
        priority = PROGRESS if only_progress else ECHO if change.old is None else CHANGED
        self._add(Key(change.key.namespace, job), priority)


def _key(job: Document) -> Key:
    return Key(job["metadata"].get("namespace", ""), job["metadata"]["name"])


def _only_status(change: Change) -> bool:
    """Whether the job is the same to a person, which leaves our own writes."""
    if change.old is None or change.new is None:
        return False
    old, new = change.old["metadata"], change.new["metadata"]
    return all(old.get(name) == new.get(name) for name in ("uid", "generation", "deletionTimestamp"))


def _outcome(job: Document | None) -> Any:
    """Of a job, what another that needs its artifact waits for, and by what that one judges whether it will do."""
    if job is None:
        return None
    status = job.get("status") or {}
    return job["metadata"].get("generation"), *(status.get(name) for name in ("phase", "finishedAt", "artifacts"))


def _content(document: Document) -> Document:
    """All but the version."""
    metadata = {name: value for name, value in document["metadata"].items() if name != "resourceVersion"}
    return {**document, "metadata": metadata}
