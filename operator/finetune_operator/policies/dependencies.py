"""What a job waits for: the artifacts of other jobs that its URIs name by job://name.

A chain (fine-tune, then a reward model from it, then PPO) is so many FineTuneJobs that are all created at once. Each
waits until the one it names has written its model, and fails with that one's reason when it fails. A name that no job
has is waited for too: `kubectl apply` of a folder creates jobs in any order.

A model is named as the one to start from, as a teacher or as a reward. `dependency_names` is also what the handlers
index jobs by, so that the end of one wakes those that wait for it.

A model that will not do is refused while it is waited for, by what the other job says of itself (`misfits`): nobody
trains for hours to find out. Of a job that trains its present attempt's plan counts (`with_plan`), since outputs may be
edited at any time and are those of the next attempt then.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from finetune_api.failures import Problem
from finetune_api.progress import Artifact
from finetune_operator import names as naming
from finetune_operator.names import SCRATCH
from finetune_operator.raw import Document, at, controller_uid, items, text

__all__ = ["Dependencies", "dependency_names", "dependency_paths", "misfits", "resolve", "with_plan"]

_PREFIX = "job://"
_PLANNED = "planned"
"""Beside a raw job's spec: the same of its present attempt."""
_POD_DISK = f"file://{SCRATCH}/"
"""What is there nobody else can read, and soon nobody at all."""


@dataclass(frozen=True)
class Dependencies:
    """What became of the jobs that a job names. It can start when nothing is waiting and nothing has failed."""

    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    """By the other job's name."""
    waiting: tuple[str, ...] = ()
    """A sentence for each job that has not ended yet."""
    failed: tuple[str, ...] = ()
    """A sentence for each job that ended without a model."""


def dependency_names(job: Any) -> tuple[str, ...]:
    """Names of the jobs whose artifacts `job`, a raw FineTuneJob, needs. Total."""
    return tuple(dict.fromkeys(dependency_paths(job).values()))


def dependency_paths(job: Any) -> dict[str, str]:
    """The same by the fields that name them, such as spec.method.distill.teacher.source. Total."""
    named = {path: source.removeprefix(_PREFIX) for path, source in _sources(job) if source.startswith(_PREFIX)}
    return {path: name for path, name in named.items() if name}


def _sources(job: Any) -> Iterator[tuple[str, str]]:
    """Every field that may name another job's model, and what stands there."""
    yield "spec.model.source", text(job, "spec", "model", "source")
    method = at(job, "spec", "method")
    yield "spec.method.distill.teacher.source", text(method, "distill", "teacher", "source")
    for online in ("ppo", "grpo"):
        for index, reward in enumerate(items(at(method, online), "rewards")):
            yield f"spec.method.{online}.rewards[{index}].model.source", text(reward, "model", "source")


def misfits(job: Any, jobs: Mapping[str, Any]) -> list[Problem]:
    """The fields of `job`, a raw FineTuneJob, that name a job whose model will not do there.

    `jobs` are the raw FineTuneJobs by name; one that is not among them, or None, is not judged. Total."""
    verdicts = ((path, name, _misfit(path, name, jobs.get(name))) for path, name in dependency_paths(job).items())
    return [
        Problem(path=path, value=f'"{_PREFIX}{name}"', message=message)
        for path, name, message in verdicts
        if message is not None
    ]


def _misfit(path: str, name: str, other: Any) -> str | None:
    methods = at(other, "spec", "method")
    method = next((one for one in methods if methods[one] is not None), None) if isinstance(methods, Mapping) else None
    if method is None:
        return None
    if ".rewards[" in path:
        if method != "reward":
            return f"is a job of method {method}, whose model gives no scores; name a job of method reward"
        return None
    if method == "reward":
        return "is a job of method reward, whose model gives scores and writes nothing; name a job of another method"
    if _is_whole(other):
        return None
    if _artifacts(other):
        return (
            f"wrote an adapter and not a whole model; submit {name} anew, by another name and with merge: true in an"
            " output, and name that job"
        )
    if _merges(at(other, "spec")):
        return (
            f"will be an adapter and not a whole model: {name} got an output with merge: true after its attempt had"
            " begun; suspend that job and resume it"
        )
    return f"will be an adapter and not a whole model; give {name} an output with merge: true"


def _is_whole(other: Any) -> bool:
    """Whether it has written a whole model; as long as it has written nothing, whether it is going to."""
    if written := _artifacts(other):
        return any(one.kind == "model" for one in written)
    return at(other, "spec", "tuning", "lora") is None or _merges(at(other, _PLANNED) or at(other, "spec"))


def _merges(block: Any) -> bool:
    return any(at(one, "merge") is True for one in items(block, "outputs"))


def with_plan(job: Document, config_maps: Iterable[Document]) -> Document:
    """The raw FineTuneJob with what its present attempt was planned with, if that is among the `config_maps`. Total."""
    last = next(reversed([*items(at(job, "status"), "attempts")]), None)
    number = at(last, "number")
    if not isinstance(number, int) or at(last, "endedAt") is not None:
        return job
    uid, plan = text(job, "metadata", "uid"), naming.plan_config_map(text(job, "metadata", "name"), number)
    for one in config_maps:
        if text(one, "metadata", "name") == plan and controller_uid(one) == uid:
            try:
                outputs = json.loads(text(one, "metadata", "annotations", naming.OUTPUTS_ANNOTATION))
            except (RecursionError, ValueError):  # somebody's hand, or an operator's that noted nothing
                return job
            return {**job, _PLANNED: {"outputs": outputs}}
    return job


def resolve(names: Iterable[str], jobs: Mapping[str, Any]) -> Dependencies:
    """What became of the jobs called `names`; `jobs` are the raw FineTuneJobs by name, None where there is none."""
    artifacts: dict[str, Artifact] = {}
    waiting: list[str] = []
    failed: list[str] = []
    for name in names:
        other = jobs.get(name)
        written = _artifacts(other)
        if other is None:
            waiting.append(f"job://{name}: there is no FineTuneJob of that name in this namespace.")
        elif (failure := _condition(other, "Failed")) is not None:
            failed.append(f"job://{name} failed: {_reason(failure)}")
        elif _condition(other, "Complete") is None:
            waiting.append(f"job://{name} is {at(other, 'status', 'phase') or 'Pending'}.")
        elif not written:
            failed.append(f"job://{name} succeeded without writing a model.")
        elif not (kept := [one for one in written if not one.uri.startswith(_POD_DISK)]):
            failed.append(
                f"job://{name} succeeded, and its model went with its pods: give it spec.outputs, or a runtime with a"
                " storage."
            )
        else:
            artifacts[name] = next((one for one in kept if one.kind == "model"), kept[0])
    return Dependencies(artifacts, tuple(waiting), tuple(failed))


def _condition(job: Any, name: str) -> Any:
    """The condition of that type, when it holds."""
    listed = at(job, "status", "conditions")
    held = (one for one in (listed if isinstance(listed, list) else ()) if at(one, "status") == "True")
    return next((one for one in held if at(one, "type") == name), None)


def _reason(condition: Any) -> str:
    reason, message = at(condition, "reason"), at(condition, "message")
    return ": ".join(str(part) for part in (reason, message) if part) or "no reason is known"


def _artifacts(job: Any) -> list[Artifact]:
    listed = at(job, "status", "artifacts")
    found = []
    for one in listed if isinstance(listed, list) else ():
        try:
            found.append(Artifact.model_validate(one))
        except ValidationError:
            continue
    return found
