"""Sorts what was seen of a job into named buckets, once: decisions read the buckets and never a raw object.

`World` is what the handlers take from their stores, without any I/O: raw documents in no order, some of them perhaps
older than others, some not ours. `observe` is total: whatever the documents hold, it returns an `Observed`. What counts
as ours is decided by the owner reference's uid and never by a name: a label can be copied, and a job can be deleted
and created again under its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from finetune_api.job import Status
from finetune_api.spec import MANAGER
from finetune_operator import names
from finetune_operator.kinds import CONFIG_MAP, RAY_JOB, Key, Kind
from finetune_operator.states import PodState, RayJobState, Report, read_pod, read_ray_job, read_report
from finetune_operator.status import read_status
from finetune_operator.times import sane

__all__ = ["Document", "Header", "Observed", "World", "observe"]

Document = dict[str, Any]


@dataclass(frozen=True)
class World:
    """What was seen of one job, raw."""

    job: Document
    runtime: Document | None = None
    """The FineTuneRuntime that the job names; None when it names none, or there is none."""
    children: Mapping[Kind, Sequence[Document]] = field(default_factory=dict)
    """Objects with the job's label, by kind. A kind that is no key is not watched: its objects may or may not exist.

    An object that turned out to have a name that the job needs belongs here too, whoever made it.
    """
    pods: Sequence[Document] = ()
    """Pods with the job's label, whole or projected."""
    dependencies: Mapping[str, Document | None] = field(default_factory=dict)
    """FineTuneJobs that the job's URIs name, by name; None where there is none."""


@dataclass(frozen=True)
class Header:
    """What the raw FineTuneJob says of itself, read without judging its spec."""

    name: str
    namespace: str
    uid: str
    generation: int
    deleting: bool
    is_ours: bool
    """This operator looks after it: `managedBy` names no other."""
    suspend: bool

    @property
    def key(self) -> Key:
        """Where it is."""
        return Key(self.namespace, self.name)


@dataclass(frozen=True)
class Observed:
    """What was seen of one job, sorted."""

    job: Header
    status: Status | None
    """The status that stands, as far as it can be read."""
    runtime: Document | None = None
    ray_jobs: Mapping[int, RayJobState] = field(default_factory=dict)
    """The job's own RayJobs by attempt, oldest first."""
    plans: Mapping[int, Document] = field(default_factory=dict)
    """The job's own plan ConfigMaps by attempt."""
    snapshot: Document | None = None
    """The ConfigMap that holds the runtime as it was."""
    report: Report = field(default_factory=Report)
    """What the trainers wrote last, of whichever attempt."""
    pods: Mapping[int, tuple[PodState, ...]] = field(default_factory=dict)
    """By attempt; pods of no attempt are left out."""
    own: Mapping[tuple[Kind, str], str] = field(default_factory=dict)
    """The job's own objects: kind and name, and their uid."""
    foreign: frozenset[tuple[Kind, str]] = frozenset()
    """Objects of somebody else; those whose name the job needs stand in its way."""
    watched: frozenset[Kind] = frozenset()
    """Kinds of which an object that is not in `own` does not exist."""
    dependencies: Mapping[str, Document | None] = field(default_factory=dict)


def observe(world: World) -> Observed:
    """`world`, sorted. Never raises."""
    job = _header(world.job)
    own: dict[tuple[Kind, str], Document] = {}
    foreign: set[tuple[Kind, str]] = set()
    for kind, documents in world.children.items():
        for document in documents:
            metadata = _mapping(_mapping(document).get("metadata"))
            where = (kind, _text(metadata.get("name")))
            if job.uid and _controller(metadata) == job.uid:
                own[where] = document
            else:
                foreign.add(where)
    return Observed(
        job=job,
        status=read_status(_mapping(world.job).get("status")),
        runtime=world.runtime,
        ray_jobs=_ray_jobs(job.name, own),
        plans=_plans(job.name, own),
        snapshot=own.get((CONFIG_MAP, names.runtime_config_map(job.name))),
        report=_sane_report(read_report(own.get((CONFIG_MAP, names.progress_config_map(job.name))))),
        pods=_pods(world.pods),
        own={where: _text(_mapping(document["metadata"]).get("uid")) for where, document in own.items()},
        foreign=frozenset(foreign),
        watched=frozenset(world.children),
        dependencies=world.dependencies,
    )


def _header(document: Any) -> Header:
    metadata, spec = _mapping(_mapping(document).get("metadata")), _mapping(_mapping(document).get("spec"))
    generation = metadata.get("generation")
    return Header(
        name=_text(metadata.get("name")),
        namespace=_text(metadata.get("namespace")),
        uid=_text(metadata.get("uid")),
        generation=generation if isinstance(generation, int) and generation > 0 else 1,
        deleting=metadata.get("deletionTimestamp") is not None,
        is_ours=spec.get("managedBy", MANAGER) == MANAGER,
        suspend=spec.get("suspend") is True,
    )


def _ray_jobs(job: str, own: Mapping[tuple[Kind, str], Document]) -> dict[int, RayJobState]:
    found = {}
    for (kind, name), document in own.items():
        number = names.attempt_from(name.removeprefix(f"{job}-")) if kind == RAY_JOB else None
        if number is not None and names.ray_job(job, number) == name:
            found[number] = read_ray_job(document)
    return dict(sorted(found.items()))


def _plans(job: str, own: Mapping[tuple[Kind, str], Document]) -> dict[int, Document]:
    found = {}
    for (kind, name), document in own.items():
        text = name.removeprefix(f"{job}-").removesuffix("-plan")
        number = names.attempt_from(text) if kind == CONFIG_MAP else None
        if number is not None and names.plan_config_map(job, number) == name:
            found[number] = document
    return found


def _pods(documents: Iterable[Document]) -> dict[int, tuple[PodState, ...]]:
    found: dict[int, tuple[PodState, ...]] = {}
    for pod in map(read_pod, documents):
        if pod.attempt is not None:
            found[pod.attempt] = (*found.get(pod.attempt, ()), pod)
    return found


def _sane_report(report: Report) -> Report:
    progress = report.progress
    if progress is None or sane(progress.updated_at) is progress.updated_at:
        return report
    moment: datetime = sane(progress.updated_at)
    return Report(report.attempt, progress.model_copy(update={"updated_at": moment}), report.outcome)


def _controller(metadata: Mapping[str, Any]) -> str | None:
    owners: Any = metadata.get("ownerReferences")
    listed: Iterable[Any] = owners if isinstance(owners, list) else ()
    controllers = (owner for owner in map(_mapping, listed) if owner.get("controller") is True)
    return next((_text(owner.get("uid")) for owner in controllers), None)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
