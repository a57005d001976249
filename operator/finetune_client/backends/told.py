"""What is common to places where a driver tells of a job: names that are taken, and ends that nobody told.

Pure; used by the backends for Ray.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from finetune_api.base import API_VERSION
from finetune_api.failures import FailureClass, Problem
from finetune_api.job import Phase
from finetune_api.problems import InvalidManifest
from finetune_api.progress import Result
from finetune_client.commands import about, listing
from finetune_client.errors import NoSuchJob
from finetune_client.folders import SUBMITTED
from finetune_client.output import ATTEMPT_MARK, JOB_MARK
from finetune_operator.kinds import Key

__all__ = ["absent", "ended_without_a_word", "new_folder", "not_settled", "not_told_yet", "taken"]

_LONGEST = 4096


def not_told_yet(key: Key, at: str) -> dict[str, Any]:
    """A job of which only the name is known, and since when."""
    running = {
        "type": "Running",
        "status": "False",
        "reason": "NotStarted",
        "message": "Its driver is starting.",
        "lastTransitionTime": at,
    }
    metadata = {"name": key.name, "namespace": key.namespace, "generation": 1}
    status = {"observedGeneration": 0, "conditions": [running]}
    return {"apiVersion": API_VERSION, "kind": "FineTuneJob", "metadata": metadata, "spec": {}, "status": status}


def not_settled(document: dict[str, Any]) -> dict[str, Any]:
    """A job that is told as suspended while its driver works: it is about to end, or to go on. More is to come."""
    metadata = document["metadata"]
    return {**document, "metadata": {**metadata, "generation": int(metadata.get("generation") or 0) + 1}}


def ended_without_a_word(document: dict[str, Any], why: str, cancelled: bool, at: str, output: str) -> dict[str, Any]:
    """The job whose driver is gone and has not said how it ended. `output` is what it printed last."""
    reason = Result.CANCELLED if cancelled else FailureClass.UNKNOWN
    marks = (JOB_MARK, ATTEMPT_MARK)
    last = "\n".join(line for line in output.splitlines() if not line.startswith(marks))
    message = "The job was stopped." if cancelled else f"The driver on the Ray cluster ended: {why}\n{last}".strip()
    failed = {
        "type": "Failed",
        "status": "True",
        "reason": reason,
        "message": message[:_LONGEST],
        "lastTransitionTime": at,
    }
    status = dict(document.get("status") or {})
    status["phase"], status["finishedAt"] = Phase.FAILED, at
    status["conditions"] = [*(status.get("conditions") or []), failed]
    if not cancelled:
        status["failure"] = FailureClass.UNKNOWN
    return {**document, "status": status}


def new_folder(workdir: str, key: Key, now: datetime | None = None) -> str:
    """For the files of a new job; one of the same name before it keeps its own."""
    return f"{workdir}/{key.namespace}/{key.name}/{now or datetime.now(UTC):{SUBMITTED}}"


def taken(key: Key, place: str) -> InvalidManifest:
    """The name of a job that is to be submitted is one's that is there. `place` is the backend's."""
    message = f"is the name of a job that is there already; choose another, or type: {about('cancel', key, place)}"
    return InvalidManifest([Problem(path="metadata.name", value=f'"{key.name}"', message=message)])


def absent(key: Key, where: str, place: str) -> NoSuchJob:
    """There is no such job there. `place` is the backend's."""
    return NoSuchJob(
        f"there is no job {key.name} in namespace {key.namespace} at {where}; {listing(place)} shows those there are"
    )
