"""The status of a RayJob as KubeRay 1.6 writes it, one step at a time. Pure.

    "" ──▶ Initializing ──▶ Running ──▶ Complete    the job SUCCEEDED, or was STOPPED
                 │             │    └──▶ Failed      the job FAILED: reason AppFailed
                 └─────────────┴──▶ Suspending ──▶ Suspended ──▶ ""      while spec.suspend holds

Called by `local.kubelet`. The sentences are Ray's own, because policies look for them.
"""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Any

from finetune_operator.times import written

__all__ = ["ended", "initializing", "is_finished", "new", "running", "submitted", "suspended", "suspending"]

Status = dict[str, Any]

_LOGS = 20_000
"""Characters of the log's end that Ray puts into its message."""


def initializing(name: str, now: datetime) -> Status:
    """The cluster is being made."""
    suffix = secrets.token_hex(3)[:5]
    return {
        "jobDeploymentStatus": "Initializing",
        "jobId": f"{name}-{suffix}",
        "rayClusterName": f"{name}-{suffix}",
        "startTime": written(now),
        "succeeded": 0,
        "failed": 0,
    }


def submitted(status: Status) -> Status:
    """The cluster is there and the entrypoint was handed over."""
    return status | {"jobDeploymentStatus": "Running", "jobStatus": "PENDING", "message": "Job has not started yet."}


def running(status: Status, now: datetime) -> Status:
    """The entrypoint runs."""
    info = {"rayJobInfo": {"startTime": written(now)}}
    return status | {"jobStatus": "RUNNING", "message": "Job is currently running."} | info


def ended(status: Status, exit_code: int | None, was_stopped: bool, log: str, now: datetime) -> Status:
    """The entrypoint has ended; `exit_code` None where nobody was there to see it end."""
    end = {"endTime": written(now), "rayJobInfo": status.get("rayJobInfo", {}) | {"endTime": written(now)}}
    if exit_code == 0:
        message = "Job finished successfully."
        return status | end | _job("Complete", "SUCCEEDED", message) | {"succeeded": 1}
    if was_stopped:
        return status | end | _job("Complete", "STOPPED", "Job was intentionally stopped.")
    failed = _job("Failed", "FAILED", _failure(exit_code, log)) | {"reason": "AppFailed", "failed": 1}
    return status | end | failed


def suspending(status: Status) -> Status:
    """The cluster is being taken down."""
    return status | {"jobDeploymentStatus": "Suspending"}


def suspended() -> Status:
    """It is gone, and with it all that was known of the job."""
    return {"jobDeploymentStatus": "Suspended"}


def new() -> Status:
    """Suspended no longer: everything begins again."""
    return {"jobDeploymentStatus": ""}


def is_finished(status: Status) -> bool:
    """Nothing will come of it any more."""
    return status.get("jobDeploymentStatus") in ("Complete", "Failed")


def _job(deployment: str, job: str, message: str) -> Status:
    return {"jobDeploymentStatus": deployment, "jobStatus": job, "message": message}


def _failure(exit_code: int | None, log: str) -> str:
    if exit_code is None:
        return "Job supervisor died: the program that ran this entrypoint ended before it did."
    if not log:
        return f"Job entrypoint command failed with exit code {exit_code}. No logs available."
    return (
        f"Job entrypoint command failed with exit code {exit_code}, "
        f"last available logs (truncated to 20,000 chars):\n{log[-_LOGS:]}"
    )
