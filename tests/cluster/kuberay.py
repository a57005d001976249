"""The real KubeRay operator, with a stand-in for what it asks of every Ray head: the jobs that run there.

KubeRay reaches dashboards through the API server's proxy to services. A proxy in front of that server answers these
requests; everything else is real: RayClusters, pods, services, the submitter's Job, the RayJob's status.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.client import Client
from tests.cluster.crds import define_files
from tests.cluster.faults import Faults, Respond, Rule, fault_proxy
from tests.cluster.pods import end_pod
from tests.cluster.processes import Started, reserved_ports, started, wait_until
from tests.cluster.requests import Asked
from tests.cluster.server import Server

__all__ = ["KubeRay", "RayJobs", "define_ray", "kuberay"]

_RAY = "/apis/ray.io/v1/namespaces"
_OVER = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class KubeRay:
    """KubeRay's operator; `ray` are the Ray jobs that it sees, `faults` stands between it and the API server."""

    process: Started
    ray: RayJobs
    faults: Faults


def define_ray(client: Client, manifests: Path) -> None:
    """Gives the server KubeRay's CRDs; `manifests` is kuberay-manifests of tests.cluster.programs."""
    # The kind RayCronJob is left out: its controller is off, and the server pays for every large schema.
    folder = manifests / "config" / "crd" / "bases"
    define_files(
        client, sorted(folder / f"ray.io_{plural}.yaml" for plural in ("rayclusters", "rayjobs", "rayservices"))
    )


@contextmanager
def kuberay(program: Path, server: Server, concurrency: int = 10) -> Iterator[KubeRay]:
    """Starts the operator, for all namespaces. The server must have KubeRay's CRDs."""
    ray = RayJobs(server.client)
    with fault_proxy(server) as faults, reserved_ports(2) as (metrics, health):
        faults.add(Rule(Respond(ray.answer), resource="services/proxy"))
        command = [
            program,
            "--enable-leader-election=false",
            "--use-kubernetes-proxy",
            f"--reconcile-concurrency={concurrency}",
            f"--metrics-addr=127.0.0.1:{metrics}",
            f"--health-probe-bind-address=127.0.0.1:{health}",
        ]
        environment = {"KUBECONFIG": str(faults.kubeconfig)}
        with started(command, server.folder / "kuberay.log", environment) as process:
            # One line each for RayClusters, RayJobs and RayServices.
            wait_until(lambda: process.said().count("Starting workers") >= 3, "KubeRay's controllers to work", process)
            yield KubeRay(process, ray, faults)


class RayJobs:
    """The jobs of every Ray cluster, as their dashboards would tell.

    A job runs once KubeRay has submitted it (HTTPMode), or once the submitter's pod runs (K8sJobMode), and goes on
    until a test ends it. When it is over, so is its submitter.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        self._jobs: dict[tuple[str, str], dict[str, Any]] = {}
        self._changing = threading.RLock()

    def end(self, namespace: str, rayjob: str, status: str = "SUCCEEDED", message: str = "") -> None:
        """The Ray job of this RayJob is over. `status` is SUCCEEDED, FAILED or STOPPED."""
        wait_until(lambda: self.running(namespace, rayjob), f"the Ray job of {rayjob} to run")
        with self._changing:
            job = self._jobs[namespace, self._id(namespace, rayjob)]
            job.update(status=status, message=message, end_time=_now())
        self._end_submitter(namespace, job)

    def lose(self, namespace: str, rayjob: str) -> None:
        """The head has lost its memory: the job is unknown there until it is submitted again."""
        with self._changing:
            self._jobs.pop((namespace, self._id(namespace, rayjob)), None)

    def running(self, namespace: str, rayjob: str) -> bool:
        """Whether the Ray job of this RayJob has been submitted and is not over."""
        job = self._jobs.get((namespace, self._id(namespace, rayjob)))
        return job is not None and job["status"] not in _OVER

    def answer(self, asked: Asked, body: bytes) -> tuple[int, object]:
        """A dashboard's answer to KubeRay."""
        namespace = asked.namespace or ""
        parts = asked.path.partition("/proxy/api/jobs/")[2].split("/")
        with self._changing:
            if asked.verb == "create" and parts == [""]:
                return self._submit(namespace, body)
            job = self._jobs.get((namespace, parts[0])) or self._submitted_by_pod(namespace, parts[0])
            if job is None:
                return 404, {"error": f"Job {parts[0]} does not exist"}
            if parts[1:] == ["stop"]:
                return 200, {"stopped": self._stop(job)}
        if parts[1:] == ["logs"]:
            return 200, {"logs": ""}
        if job["status"] in _OVER:
            self._end_submitter(namespace, job)
        return 200, job

    def _submit(self, namespace: str, body: bytes) -> tuple[int, object]:
        asked = json.loads(body)
        self._start(namespace, asked["submission_id"], asked["entrypoint"])
        return 200, {"job_id": asked["submission_id"], "submission_id": asked["submission_id"]}

    def _start(self, namespace: str, job_id: str, entrypoint: str) -> dict[str, Any]:
        job = {
            "submission_id": job_id,
            "job_id": "01000000",
            "status": "RUNNING",
            "entrypoint": entrypoint,
            "message": "Job is currently running.",
            "start_time": _now(),
        }
        return self._jobs.setdefault((namespace, job_id), job)

    def _stop(self, job: dict[str, Any]) -> bool:
        if job["status"] in _OVER:
            return False
        job.update(status="STOPPED", message="Job was intentionally stopped.", end_time=_now())
        return True

    def _submitted_by_pod(self, namespace: str, job_id: str) -> dict[str, Any] | None:
        """The job, once the pod that submits it runs."""
        for rayjob in self._client.items(f"{_RAY}/{namespace}/rayjobs"):
            if rayjob.get("status", {}).get("jobId") != job_id:
                continue
            if rayjob["spec"].get("submissionMode", "K8sJobMode") == "K8sJobMode":
                pods = self._submitters(namespace, rayjob["metadata"]["name"])
                if any(pod["status"].get("phase") == "Running" for pod in pods):
                    return self._start(namespace, job_id, rayjob["spec"].get("entrypoint", ""))
        return None

    def _end_submitter(self, namespace: str, job: dict[str, Any]) -> None:
        """`ray job submit` ends with the job, and says by its code how."""
        for rayjob in self._client.items(f"{_RAY}/{namespace}/rayjobs"):
            if rayjob.get("status", {}).get("jobId") == job["submission_id"]:
                for pod in self._submitters(namespace, rayjob["metadata"]["name"]):
                    if pod["status"].get("phase") == "Running":
                        name = pod["metadata"]["name"]
                        end_pod(self._client, namespace, name, exit_code=int(job["status"] != "SUCCEEDED"))

    def _submitters(self, namespace: str, rayjob: str) -> list[dict[str, Any]]:
        return self._client.items(f"/api/v1/namespaces/{namespace}/pods?labelSelector=job-name%3D{rayjob}")

    def _id(self, namespace: str, rayjob: str) -> str:
        found = self._client.find(f"{_RAY}/{namespace}/rayjobs/{rayjob}") or {}
        return str(found.get("status", {}).get("jobId", ""))


def _now() -> int:
    """Milliseconds, as Ray gives times."""
    return int(time.time() * 1000)
