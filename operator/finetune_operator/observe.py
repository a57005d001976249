"""Sorts what was seen of a job into named buckets, once: decisions read the buckets and never a raw object.

`World` is what the handlers take from their stores, without any I/O: raw documents in no order, some of them perhaps
older than others, some not ours. `observe` is total: whatever the documents hold, it returns an `Observed`. What counts
as ours is decided by the owner reference's uid and never by a name: a label can be copied, and a job can be deleted
and created again under its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import ValidationError

from finetune_api.base import Contract
from finetune_api.job import Status
from finetune_api.spec import MANAGER, FailurePolicy, Lifecycle
from finetune_operator import names
from finetune_operator.kinds import CONFIG_MAP, RAY_JOB, Key, Kind
from finetune_operator.raw import Document, at, controller_uid, only, text
from finetune_operator.remembered import Remembered
from finetune_operator.states import PodState, RayJobState, Report, read_pod, read_ray_job, read_report
from finetune_operator.status import read_status

__all__ = ["Document", "Header", "Observed", "World", "observe"]

_Block = TypeVar("_Block", bound=Contract)


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
    one_machine: bool = False
    """All that the job starts runs on one machine and sees the same files; pods do not."""
    unkept: tuple[str, ...] | None = None
    """Fields of the status that the cluster does not keep; None where none was written yet."""


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
    policy: FailurePolicy = field(default_factory=FailurePolicy)
    lifecycle: Lifecycle = field(default_factory=Lifecycle)
    """Blocks of the spec that hold while an attempt goes on, also when another block is wrong."""
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
    one_machine: bool = False
    unkept: tuple[str, ...] | None = None


def observe(world: World) -> Observed:
    """`world`, sorted. Never raises."""
    job, status, policy, lifecycle = _READ_JOB(world.job)
    own: dict[tuple[Kind, str], Document] = {}
    uids: dict[tuple[Kind, str], str] = {}
    foreign: set[tuple[Kind, str]] = set()
    for kind, documents in world.children.items():
        for document in documents:
            name, uid, controller = _READ_CHILD(document)
            if job.uid and controller == job.uid:
                own[kind, name], uids[kind, name] = document, uid
            else:
                foreign.add((kind, name))
    return Observed(
        job=job,
        status=status,
        policy=policy,
        lifecycle=lifecycle,
        runtime=world.runtime,
        ray_jobs=_ray_jobs(job.name, own),
        plans=_plans(job.name, own),
        snapshot=own.get((CONFIG_MAP, names.runtime_config_map(job.name))),
        report=_READ_REPORT(own.get((CONFIG_MAP, names.progress_config_map(job.name)))),
        pods=_pods(world.pods),
        own=uids,
        foreign=frozenset(foreign),
        watched=frozenset(world.children),
        dependencies=world.dependencies,
        one_machine=world.one_machine,
        unkept=world.unkept,
    )


def _read_job(document: Any) -> tuple[Header, Status | None, FailurePolicy, Lifecycle]:
    return (
        _header(document),
        read_status(at(document, "status")),
        _block(FailurePolicy, at(document, "spec", "failurePolicy")),
        _block(Lifecycle, at(document, "spec", "lifecycle")),
    )


def _block(model: type[_Block], value: Any) -> _Block:
    """A block of the spec on its own; its defaults where it is absent or, for now, wrong."""
    try:
        return model.model_validate(value or {})
    except ValidationError:
        return model()


def _header(document: Any) -> Header:
    metadata, spec = at(document, "metadata"), at(document, "spec")
    generation = at(metadata, "generation")
    return Header(
        name=text(metadata, "name"),
        namespace=text(metadata, "namespace"),
        uid=text(metadata, "uid"),
        generation=generation if isinstance(generation, int) and generation > 0 else 1,
        deleting=at(metadata, "deletionTimestamp") is not None,
        is_ours=only(spec, "managedBy").get("managedBy", MANAGER) == MANAGER,
        suspend=at(spec, "suspend") is True,
    )


def _ray_jobs(job: str, own: Mapping[tuple[Kind, str], Document]) -> dict[int, RayJobState]:
    found = {}
    for (kind, name), document in own.items():
        if kind == RAY_JOB:
            number = names.attempt_from(name.removeprefix(f"{job}-"))
            if number is not None and names.ray_job(job, number) == name:
                found[number] = _READ_RAY_JOB(document)
    return dict(sorted(found.items())) if len(found) > 1 else found


def _plans(job: str, own: Mapping[tuple[Kind, str], Document]) -> dict[int, Document]:
    found = {}
    for (kind, name), document in own.items():
        if name.endswith("-plan") and kind == CONFIG_MAP:
            number = names.attempt_from(name.removeprefix(f"{job}-").removesuffix("-plan"))
            if number is not None and names.plan_config_map(job, number) == name:
                found[number] = document
    return found


def _pods(documents: Iterable[Document]) -> dict[int, tuple[PodState, ...]]:
    found: dict[int, tuple[PodState, ...]] = {}
    # By name, so that what is said of the first of them does not change with the order of a store.
    for pod in sorted(map(_READ_POD, documents), key=lambda pod: pod.name):
        if pod.attempt is not None:
            found[pod.attempt] = (*found.get(pod.attempt, ()), pod)
    return found


def _read_child(document: Any) -> tuple[str, str, str | None]:
    """Name, uid, and the uid of the object that controls it."""
    return text(document, "metadata", "name"), text(document, "metadata", "uid"), controller_uid(document)


# The jobs that are active at one time, with their pods; a status takes much more memory than a pod.
_READ_JOB = Remembered(_read_job, 1024)
_READ_CHILD = Remembered(_read_child, 8192)
_READ_RAY_JOB = Remembered(read_ray_job, 4096)
_READ_REPORT = Remembered(read_report, 2048)
_READ_POD = Remembered(read_pod, 16_384)
