"""Checkpoints under the real operator and a real API server: told, asked for, and gone on from.

The trainers' part is their own sink, with the token of the job's own service account: what it may see and write is what
a pod may.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path

import pytest

from finetune_api.progress import Outcome, Progress, Result, SavedCheckpoint, Stage
from finetune_trainers.cluster_sink import ClusterSink
from tests.cluster.server import Server
from tests.cluster.tools import Tool
from tests.control_plane.operators import Jobs, Operator, operator

pytestmark = pytest.mark.control_plane

SAVES = {"checkpoint": {"everySteps": 10}}


class Trainers:
    """Rank 0 of an attempt, and the driver's last word."""

    def __init__(self, server: Server, jobs: Jobs, job: str, attempt: int, folder: Path) -> None:
        path = f"/api/v1/namespaces/{jobs.namespace}/serviceaccounts/{job}-trainer/token"
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        folder.mkdir()
        (folder / "token").write_text(server.client.create(path, asked)["status"]["token"])
        (folder / "ca.crt").write_bytes(server.ca_file.read_bytes())
        self.asked = threading.Event()
        url = f"{server.url}/api/v1/namespaces/{jobs.namespace}/configmaps/{job}-progress"
        self._sink = ClusterSink(url, str(attempt), folder, on_stop=self.asked.set)
        self._stages = cycle([Stage.TRAINING, Stage.EVALUATING])  # a new stage does not wait for the next report

    def report(self, step: int, saved: int | None = None, resumed: int | None = None) -> None:
        self._sink.report(
            Progress(
                stage=next(self._stages),
                step=step,
                total_steps=100,
                resumed_from_step=resumed,
                checkpoint=None if saved is None else checkpoint(saved),
                updated_at=datetime.now(UTC),
            )
        )

    def stop(self, step: int) -> None:
        """As they were asked to: with a checkpoint."""
        self.report(step, saved=step)
        assert self._sink.finish(Outcome(result=Result.CANCELLED, step=step))


def checkpoint(step: int) -> SavedCheckpoint:
    uri = f"pvc://runs/team/tiny/checkpoints/step-{step}"
    return SavedCheckpoint(uri=uri, step=step, saved_at=datetime.now(UTC), world_size=2, bytes=1000)


def may_report(jobs: Jobs, job: str) -> bool:
    """Whether the server lets the job's own account write its progress."""
    asked = {"verb": "patch", "resource": "configmaps", "name": f"{job}-progress", "namespace": jobs.namespace}
    user = f"system:serviceaccount:{jobs.namespace}:{job}-trainer"
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {"user": user, "resourceAttributes": asked},
    }
    answer = jobs.api.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
    return bool(answer["status"]["allowed"])


Begin = Callable[[str, int], Trainers]


@pytest.fixture
def running(jobs: Jobs, server: Server, tmp_path: Path) -> Iterator[Operator]:
    with operator(tmp_path, server.kubeconfig, jobs.namespace) as one:
        yield one


@pytest.fixture
def begin(jobs: Jobs, server: Server, running: Operator, tmp_path: Path) -> Begin:
    """An attempt's trainers, once its RayJob and their account are there."""

    def trainers(job: str, attempt: int) -> Trainers:
        running.wait(jobs.has(f"{job}-{attempt}"), "its RayJob")
        running.wait(lambda: jobs.knows_its_ray_job(job, attempt), "the attempt to know its RayJob")
        # Pods need seconds to start; here a report would come before the server knows the role, and is not repeated.
        running.wait(lambda: may_report(jobs, job), "the role to be known")
        jobs.kuberay(f"{job}-{attempt}", "Running", "RUNNING")
        return Trainers(server, jobs, job, attempt, tmp_path / f"{job}-{attempt}")

    return trainers


def test_a_checkpoint_is_shown_by_kubectl_and_stays_with_the_job(
    jobs: Jobs, running: Operator, begin: Begin, kubectl: Tool
) -> None:
    jobs.submit("tiny", SAVES | jobs.with_storage() | {"failurePolicy.backoff": {"initialSeconds": 1, "maxSeconds": 1}})
    first = begin("tiny", 1)
    first.report(3)
    running.wait(
        lambda: jobs.condition("tiny", "Checkpointed") == ("False", "NotYet"), "the job to say that there is none"
    )
    first.report(12, saved=10)
    running.wait(
        lambda: jobs.condition("tiny", "Checkpointed") == ("True", "Saved"), "the job to say that there is one"
    )
    head, row = kubectl("get", "ftj", "tiny", "-n", jobs.namespace).splitlines()
    assert row[head.index("CKPT") :].split()[0] == "10"
    jobs.fail("tiny")
    second = begin("tiny", 2)
    second.report(11, saved=10, resumed=10)
    running.wait(lambda: jobs.status("tiny")["attempts"][-1].get("resumedFromStep") == 10, "the attempt to go on")
    assert jobs.status("tiny")["checkpoint"]["step"] == 10
    running.wait(
        lambda: {"CheckpointSaved", "ResumedFromCheckpoint"} <= set(jobs.events("tiny")), "events that tell of both"
    )


def test_suspending_asks_the_trainers_who_save_and_stop_and_the_next_attempt_goes_on(
    jobs: Jobs, running: Operator, begin: Begin
) -> None:
    jobs.submit("tiny", SAVES | jobs.with_storage() | {"lifecycle.suspendGraceSeconds": 600})
    first = begin("tiny", 1)
    first.report(12, saved=10)
    running.wait(jobs.is_at("tiny", "Running"), "the job to run")
    assert not first.asked.is_set()
    jobs.change("tiny", {"spec": {"suspend": True}})
    running.wait(lambda: "stopAskedAt" in jobs.status("tiny")["attempts"][-1], "the operator to have asked")

    def hears() -> bool:
        first.report(13, saved=10)
        return first.asked.is_set()

    running.wait(hears, "the trainers to hear of it with a report")
    assert jobs.has("tiny-1")()
    first.stop(14)
    running.wait(jobs.is_at("tiny", "Suspended"), "the job to be suspended")
    running.wait(jobs.has(), "its RayJob to be gone")
    assert (jobs.status("tiny")["checkpoint"]["step"], jobs.attempts("tiny")) == (14, [(1, "Suspended")])
    jobs.change("tiny", {"spec": {"suspend": False}})
    second = begin("tiny", 2)
    second.report(15, saved=14, resumed=14)
    running.wait(lambda: jobs.status("tiny")["attempts"][-1].get("resumedFromStep") == 14, "the attempt to go on")
    assert not second.asked.is_set()


def test_trainers_that_do_not_answer_are_suspended_when_their_time_is_over(
    jobs: Jobs, running: Operator, begin: Begin
) -> None:
    jobs.submit("tiny", SAVES | jobs.with_storage() | {"lifecycle.suspendGraceSeconds": 2})
    begin("tiny", 1).report(12, saved=10)
    running.wait(jobs.is_at("tiny", "Running"), "the job to run")
    jobs.change("tiny", {"spec": {"suspend": True}})
    running.wait(jobs.is_at("tiny", "Suspended"), "the job to be suspended")
    running.wait(jobs.has(), "its RayJob to be gone")
    attempt = jobs.status("tiny")["attempts"][-1]
    assert "did not in time" in attempt["message"]
    assert datetime.fromisoformat(attempt["endedAt"]) > datetime.fromisoformat(attempt["stopAskedAt"])
