"""What an attempt needs before it can start: a spec that holds, a runtime, other jobs' models, a plan, its objects.

`decide` calls it when an attempt should start, and again when one that goes on lost an object. Pure: it says what to
create, or what stands in the way. The runtime is copied into a ConfigMap with the first attempt, and what other jobs
wrote is noted on the plan: a job keeps both to its end, whatever becomes of their origins.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from finetune_api.base import API_VERSION
from finetune_api.failures import Problem
from finetune_api.job import FineTuneJob, Resolved
from finetune_api.plan import RunPlan
from finetune_api.problems import InvalidManifest, validate_document
from finetune_api.progress import Artifact
from finetune_api.runtime import FineTuneRuntime, FineTuneRuntimeSpec
from finetune_operator import names
from finetune_operator.conditions import Finding
from finetune_operator.decision import Create, Delete
from finetune_operator.kinds import (
    CONFIG_MAP,
    NETWORK_POLICY,
    POD_DISRUPTION_BUDGET,
    RAY_JOB,
    ROLE,
    ROLE_BINDING,
    SERVICE_ACCOUNT,
    Key,
    Kind,
)
from finetune_operator.observe import Document, Header, Observed
from finetune_operator.planning import plan_run
from finetune_operator.policies.dependencies import dependency_paths, misfits, resolve
from finetune_operator.raw import at
from finetune_operator.resources.config_map import (
    plan_config_map,
    progress_config_map,
    read_runtime_config_map,
    runtime_config_map,
    runtime_hash,
)
from finetune_operator.resources.disruption import pod_disruption_budget
from finetune_operator.resources.metadata import Owner
from finetune_operator.resources.network import network_policy
from finetune_operator.resources.rayjob import build_rayjob
from finetune_operator.resources.rbac import role, role_binding, service_account
from finetune_operator.resources.storage import check_shared_files, loss_of_model
from finetune_operator.settings import Settings
from finetune_operator.starts import sealed

__all__ = ["Blocked", "Launch", "Prepared", "expected_config_maps", "judge_spec", "prepare"]


@dataclass(frozen=True)
class Launch:
    """Which attempt to prepare."""

    attempt: int
    micro_batch_size: int | None
    """Instead of the job's, after an attempt that ran out of memory."""
    runtime_hash: str | None
    """Of the runtime that earlier attempts had."""
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    """What other jobs wrote that it is planned with, by their names; `prepare` finds them."""


@dataclass(frozen=True)
class Prepared:
    """Nothing stands in the way."""

    plan: RunPlan
    resolved: Resolved
    create: tuple[Create, ...]
    """What does not exist yet; the RayJob is the last."""
    delete: tuple[Delete, ...]
    """Objects of ours whose contents are not what the attempt needs: they must go before anything is created."""
    queued: bool
    """The RayJob waits in a queue first."""
    warning: str | None = None
    """What a person should hear of before machines are used."""


@dataclass(frozen=True)
class Blocked:
    """What stands in the way, as the condition that says so."""

    finding: Finding
    failed: bool = False
    """For good: another job failed."""


def judge_spec(document: Document, header: Header) -> FineTuneJob | Finding:
    """The job as a model, whatever its status; or condition Valid with every problem of its spec."""
    metadata = document["metadata"]
    kept = {name: metadata[name] for name in ("name", "namespace", "labels", "annotations") if name in metadata}
    bare = {"apiVersion": API_VERSION, "kind": "FineTuneJob", "metadata": kept, "spec": document.get("spec")}
    try:
        own = [path for path, name in dependency_paths(document).items() if name == header.name]
        if own:
            source, message = f"job://{header.name}", "names the job itself"
            raise InvalidManifest([Problem(path=path, value=source, message=message) for path in own])
        return validate_document(FineTuneJob, bare)
    except InvalidManifest as invalid:
        return Finding("Valid", "False", "InvalidSpec", str(invalid))


def expected_config_maps(seen: Observed, attempt: int, runtime_hash: str | None) -> Iterator[str]:
    """Names of the ConfigMaps that must be there while `attempt` goes on."""
    yield names.plan_config_map(seen.job.name, attempt)
    yield names.progress_config_map(seen.job.name)
    if runtime_hash is not None:
        yield names.runtime_config_map(seen.job.name)


def prepare(
    job: FineTuneJob, document: Document, seen: Observed, launch: Launch, settings: Settings
) -> Prepared | Blocked:
    """Everything for one attempt of `job`, whose raw `document` it is."""
    runtime = _runtime(job, seen, launch.runtime_hash)
    if isinstance(runtime, Blocked):
        return runtime
    needed = set(dependency_paths(document).values())
    kept = _earlier_artifacts(seen)
    dependencies = resolve(sorted(needed - kept.keys()), seen.dependencies)
    if dependencies.failed:
        finding = Finding("Failed", "True", "DependencyFailed", "\n".join(dependencies.failed))
        return Blocked(finding, failed=True)
    if wrong := misfits(document, {name: seen.dependencies.get(name) for name in needed - kept.keys()}):
        return Blocked(Finding("Valid", "False", "DependencyUnfit", str(InvalidManifest(wrong))))
    if dependencies.waiting:
        return Blocked(Finding("Admitted", "False", "DependencyPending", "\n".join(dependencies.waiting)))
    artifacts = {**kept, **dependencies.artifacts}
    launch = replace(launch, artifacts={name: artifacts[name] for name in sorted(needed)})
    try:
        plan = plan_run(job, runtime, artifacts=launch.artifacts, micro_batch_size=launch.micro_batch_size)
        if not seen.one_machine:
            check_shared_files(plan)
    except InvalidManifest as refused:
        return Blocked(Finding("Valid", "False", "PlanRefused", str(refused)))
    return _objects(job, plan, runtime, seen, launch, settings)


def _runtime(job: FineTuneJob, seen: Observed, recorded: str | None) -> FineTuneRuntime | Blocked | None:
    """The runtime as it was when the first attempt started; for that one, as it is now. None: the job names none."""
    if job.spec.runtime_ref is None:
        return None
    kept = read_runtime_config_map(seen.snapshot) if seen.snapshot is not None else None
    if kept is not None and recorded in (None, runtime_hash(kept)):
        return kept
    name = job.spec.runtime_ref.name
    if seen.runtime is None:
        message = f"spec.runtimeRef.name: there is no FineTuneRuntime {name}; the job starts once there is one"
        return Blocked(Finding("Valid", "False", "RuntimeNotFound", message))
    try:
        bare = {"apiVersion": API_VERSION, "kind": "FineTuneRuntime"}
        return validate_document(FineTuneRuntime, bare | {key: seen.runtime.get(key) for key in ("metadata", "spec")})
    except InvalidManifest as invalid:
        message = f"FineTuneRuntime {name} cannot be used:\n{invalid}"
        return Blocked(Finding("Valid", "False", "RuntimeInvalid", message))


def _earlier_artifacts(seen: Observed) -> dict[str, Artifact]:
    """What other jobs had written when an earlier attempt was planned, by their names."""
    for number in sorted(seen.plans, reverse=True):
        noted = at(seen.plans[number], "metadata", "annotations", names.ARTIFACTS_ANNOTATION)
        try:
            found = {name: Artifact.model_validate(one) for name, one in json.loads(noted or "{}").items()}
        except (AttributeError, RecursionError, TypeError, ValueError):  # somebody's hand
            continue
        if found:
            return found
    return {}


def _objects(
    job: FineTuneJob,
    plan: RunPlan,
    runtime: FineTuneRuntime | None,
    seen: Observed,
    launch: Launch,
    settings: Settings,
) -> Prepared | Blocked:
    wanted = sealed(list(_wanted(job, plan, runtime, seen, launch, settings)))
    for create in wanted:
        name = create.document["metadata"]["name"]
        if (create.kind, name) in seen.foreign:
            message = (
                f"{create.kind.name} {name} exists and is not this job's: delete it, or give the job another name."
            )
            return Blocked(Finding("ClusterReady", "False", "NameTaken", message))
    wrong = tuple(_wrong(runtime, seen, launch, wanted))
    return Prepared(
        plan,
        _resolved(plan, runtime),
        tuple(one for one in wanted if (one.kind, one.document["metadata"]["name"]) not in seen.own),
        wrong,
        queued=wanted[-1].document["spec"].get("suspend") is True,
        warning=None if seen.one_machine else loss_of_model(plan),
    )


def _wanted(
    job: FineTuneJob,
    plan: RunPlan,
    runtime: FineTuneRuntime | None,
    seen: Observed,
    launch: Launch,
    settings: Settings,
) -> Iterator[Create]:
    """Every object of the attempt, the RayJob last. In which order they are made says `starts`."""
    owner = Owner(seen.job.name, seen.job.namespace, seen.job.uid)
    spec = runtime.spec if runtime is not None else FineTuneRuntimeSpec()
    if runtime is not None:
        yield Create(CONFIG_MAP, runtime_config_map(owner, runtime))
    yield Create(SERVICE_ACCOUNT, service_account(owner))
    yield Create(ROLE, role(owner))
    yield Create(ROLE_BINDING, role_binding(owner))
    yield Create(CONFIG_MAP, progress_config_map(owner))
    if spec.network_policy:
        yield Create(NETWORK_POLICY, network_policy(owner))
    yield Create(POD_DISRUPTION_BUDGET, pod_disruption_budget(owner))
    yield Create(CONFIG_MAP, _annotated(plan_config_map(owner, plan, launch.attempt), plan, launch.artifacts))
    yield Create(RAY_JOB, build_rayjob(owner, job, plan, spec, launch.attempt, settings))


def _annotated(document: Document, plan: RunPlan, artifacts: Mapping[str, Artifact]) -> Document:
    """The plan's ConfigMap with its digest, with what it writes, and with what other jobs wrote."""
    metadata = document["metadata"]
    digest = hashlib.sha256(repr(sorted(document["data"].items())).encode()).hexdigest()[:16]
    annotations = {**metadata.get("annotations", {}), names.DIGEST_ANNOTATION: digest}
    annotations[names.OUTPUTS_ANNOTATION] = json.dumps([one.to_document() for one in plan.outputs])
    if artifacts:
        noted = {name: one.to_document() for name, one in artifacts.items()}
        annotations[names.ARTIFACTS_ANNOTATION] = json.dumps(noted, sort_keys=True)
    return {**document, "metadata": {**metadata, "annotations": annotations}}


def _wrong(runtime: FineTuneRuntime | None, seen: Observed, launch: Launch, wanted: list[Create]) -> Iterator[Delete]:
    """ConfigMaps of ours that a broken-off pass, or a person, left with other contents."""
    snapshot = seen.snapshot
    if runtime is not None and snapshot is not None:
        kept = read_runtime_config_map(snapshot)
        if kept is None or runtime_hash(kept) != runtime_hash(runtime):
            yield _deletion(CONFIG_MAP, snapshot, seen)
    plan = seen.plans.get(launch.attempt)
    if plan is not None and launch.attempt not in seen.ray_jobs:
        expected = next(one.document for one in wanted if one.document["metadata"]["name"] == plan["metadata"]["name"])
        if _digest(plan) != _digest(expected):
            yield _deletion(CONFIG_MAP, plan, seen)


def _digest(document: Document) -> Any:
    annotations = document["metadata"].get("annotations")
    return annotations.get(names.DIGEST_ANNOTATION) if isinstance(annotations, Mapping) else None


def _deletion(kind: Kind, document: Document, seen: Observed) -> Delete:
    name = document["metadata"]["name"]
    return Delete(kind, Key(seen.job.namespace, name), seen.own.get((kind, name)) or None)


def _resolved(plan: RunPlan, runtime: FineTuneRuntime | None) -> Resolved:
    return Resolved(
        world_size=plan.workers.world_size,
        gpus=plan.workers.replicas * plan.workers.gpus,
        global_batch_size=plan.batch.global_batch_size,
        micro_batch_size=plan.batch.micro_batch_size,
        gradient_accumulation_steps=plan.batch.gradient_accumulation_steps,
        zero_stage=plan.deepspeed.zero_stage,
        precision=plan.precision.value,
        runtime_hash=runtime_hash(runtime) if runtime is not None else None,
    )
