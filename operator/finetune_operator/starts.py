"""In which order an attempt begins: its RayJob first, and last of all the plan, which its pods wait for.

KubeRay needs seconds to make pods, and of a thousand jobs that arrive together each should have its place in the queue
before all the rest is made for any. So the first pass over a new attempt creates the RayJob alone, and a later one,
when KubeRay has touched it or no other is being made, everything else. No container runs meanwhile: each mounts the
plan, which comes when the account, the policies and the place for progress are there.

Until then the RayJob does not count. Decisions are made as if it were not there; what wants the very same RayJob, to
the last field of everything that belongs to the attempt, goes on with this one, and what wants anything else deletes
it. So a job that is edited, suspended, or met by another version of the operator between the two passes loses nothing.

Pure; called by the reconcile pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from finetune_operator import names
from finetune_operator.decision import Create, Decision, Delete
from finetune_operator.kinds import CONFIG_MAP, RAY_JOB, ROLE_BINDING, Key
from finetune_operator.observe import World
from finetune_operator.raw import Document, at, controller_uid, items, text

__all__ = [
    "beginning",
    "begun",
    "furnished",
    "ray_job_of",
    "sealed",
    "stages",
    "with_uid",
    "withdrawn",
    "without",
]

_RUNTIME = names.runtime_config_map("")
_GONE_SECONDS = 5.0  # the watch tells of a deletion; this is for the case that it does not


def sealed(wanted: Sequence[Create]) -> list[Create]:
    """The objects of an attempt, of which the last, its RayJob, bears the digest of all."""
    *others, last = wanted
    metadata = last.document["metadata"]
    digest = hashlib.sha256(json.dumps([one.document for one in wanted]).encode()).hexdigest()[:16]
    annotations = {**metadata.get("annotations", {}), names.DIGEST_ANNOTATION: digest}
    return [*others, Create(last.kind, {**last.document, "metadata": {**metadata, "annotations": annotations}})]


def begun(world: World) -> Document | None:
    """The job's own RayJob that waits for its plan, of an attempt that its status does not know yet; None: no such."""
    if CONFIG_MAP not in world.children:
        return None
    job, uid = text(world.job, "metadata", "name"), text(world.job, "metadata", "uid")
    newest = max(_numbers(world.job), default=0)
    planned = {text(one, "metadata", "name") for one in world.children[CONFIG_MAP]}
    for one in world.children.get(RAY_JOB, ()):
        name = text(one, "metadata", "name")
        number = names.attempt_from(name.removeprefix(f"{job}-"))
        if number is None or number <= newest or names.ray_job(job, number) != name:
            continue
        if uid and controller_uid(one) == uid and names.plan_config_map(job, number) not in planned:
            return one
    return None


def without(world: World, ray_job: Document | None) -> World:
    """The world in which that RayJob is not there."""
    if ray_job is None:
        return world
    others = [one for one in world.children[RAY_JOB] if one is not ray_job]
    return replace(world, children={**world.children, RAY_JOB: others})


def ray_job_of(wanted: Iterable[Create]) -> Document | None:
    """The RayJob among what is to be created."""
    return next((one.document for one in wanted if one.kind == RAY_JOB), None)


def beginning(wanted: Iterable[Create]) -> list[Create]:
    """The part that comes first: the RayJob, and the copy of the runtime that it was made with."""
    return [one for one in wanted if one.kind == RAY_JOB or (one.kind == CONFIG_MAP and _name(one).endswith(_RUNTIME))]


def withdrawn(ray_job: Document | None) -> tuple[Delete, ...]:
    """The RayJob of which nothing has run is deleted, unless it is being so already."""
    if ray_job is None or at(ray_job, "metadata", "deletionTimestamp") is not None:
        return ()
    key = Key(text(ray_job, "metadata", "namespace"), text(ray_job, "metadata", "name"))
    return (Delete(RAY_JOB, key, text(ray_job, "metadata", "uid") or None),)


def stages(wanted: Iterable[Create]) -> list[list[Create]]:
    """What can be created side by side, one stage after the other: all else, what binds a Role, the plan, the RayJob.

    The server looks at the Role of a binding, to see whether its maker may do as much, and does not find one that is
    made beside it.
    """
    found: list[list[Create]] = [[], [], [], []]
    for one in wanted:
        found[_stage(one)].append(one)
    return [stage for stage in found if stage]


def furnished(decision: Decision, ray_job: Document) -> Decision:
    """`decision`, which was made as if `ray_job` were not there: what is left to do of it, now that it is."""
    wanted = ray_job_of(decision.create)
    is_leaving = at(ray_job, "metadata", "deletionTimestamp") is not None
    if wanted is not None and not is_leaving and _digest(wanted) == _digest(ray_job):
        others = tuple(one for one in decision.create if one.kind != RAY_JOB)
        return with_uid(replace(decision, create=others), ray_job)
    if wanted is not None:  # another one under the same name: first this one must be gone
        return Decision(delete=withdrawn(ray_job), requeue_after=_GONE_SECONDS)
    return replace(decision, delete=(*decision.delete, *withdrawn(ray_job)))


def with_uid(decision: Decision, ray_job: Document | None) -> Decision:
    """The decision, whose new attempt knows the RayJob that was made for it: one write of the status less."""
    if decision.status is None or ray_job is None:
        return decision
    *before, last = decision.status["attempts"]
    known = {**last, "uid": ray_job["metadata"]["uid"]}
    return replace(decision, status={**decision.status, "attempts": [*before, known]})


def _stage(one: Create) -> int:
    if one.kind == CONFIG_MAP and names.attempt_of(one.document["metadata"]["labels"]) is not None:
        return 2
    return {ROLE_BINDING: 1, RAY_JOB: 3}.get(one.kind, 0)


def _numbers(job: Document) -> Iterator[int]:
    """Of the attempts that the status knows."""
    for attempt in items(at(job, "status"), "attempts"):
        number = at(attempt, "number")
        if isinstance(number, int):
            yield number


def _digest(ray_job: Document) -> str:
    return text(ray_job, "metadata", "annotations", names.DIGEST_ANNOTATION)


def _name(one: Create) -> str:
    return str(one.document["metadata"]["name"])
