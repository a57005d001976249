"""The operator as a process against a real API server, and what KubeRay and the trainers would do, for scenarios.

Each test gives its operator a namespace of its own to look after, with the lease in it: tests do not see each other's.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune_api.progress import Artifact, Outcome, Progress, Result, Stage
from finetune_operator.times import written
from tests.cluster.client import Client
from tests.cluster.processes import Started, started, wait_until
from tests.factories import job_document, runtime_document

__all__ = ["SHORT_LEASE", "Jobs", "Operator", "operator"]

SHORT_LEASE = "--lease-seconds=3"
"""For tests that wait for a lease to run out. Elsewhere a stall of two seconds would make an operator let go of its
work, and a pass that is broken off never tells its Events."""

_RUNTIMES = "/apis/finetune-operator.io/v1alpha1/finetuneruntimes"
_PORT = re.compile(r'serves metrics and health on port (\d+)"')


@dataclass(frozen=True)
class Operator:
    """A running operator."""

    process: Started

    @property
    def ready(self) -> bool:
        return self._answer("/readyz")[0] == 200

    @property
    def leads(self) -> bool:
        return self.metric("leader_election_master_status") == 1

    @property
    def idle(self) -> bool:
        """Whether it makes no pass and has none to make now."""
        return self.ready and not self.metric("workqueue_depth") + self.metric("controller_runtime_active_workers")

    def wait(self, holds: Callable[[], object], what: str) -> None:
        """Waits as long as the operator lives."""
        wait_until(holds, what, self.process)

    def metrics(self) -> str:
        """Its metrics, as Prometheus reads them; empty while it serves none."""
        return self._answer("/metrics")[1]

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric over all series with these labels."""
        lines = [line for line in self.metrics().splitlines() if re.match(rf"{name}[{{ ]", line)]
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        return sum(float(line.rpartition(" ")[2]) for line in lines if all(one in line for one in wanted))

    def log(self) -> list[dict[str, Any]]:
        """Its lines so far, without one that is still being written; every one must be JSON."""
        return [json.loads(line) for line in self.process.said().split("\n")[:-1] if line]

    def _answer(self, path: str) -> tuple[int, str]:
        port = _PORT.search(self.process.said())
        if port is None:
            return 0, ""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port[1]}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError:
            return 0, ""


@contextmanager
def operator(
    folder: Path, kubeconfig: Path, namespace: str, *flags: str, name: str = "operator-0", wait: bool = True
) -> Iterator[Operator]:
    """Starts one for this namespace; with `wait` it is ready when the block begins."""
    command = [
        *(sys.executable, "-m", "finetune_operator", f"--kubeconfig={kubeconfig}", f"--pod-name={name}"),
        *(f"--operator-namespace={namespace}", f"--watch-namespaces={namespace}"),
        *("--metrics-host=127.0.0.1", "--metrics-port=0", *flags),
    ]
    number = len(list(folder.glob("operator-*.log")))
    with started(command, folder / f"operator-{number}.log") as process:
        one = Operator(process)
        if wait:
            one.wait(lambda: one.ready, "the operator to be ready")
        yield one


class Jobs:
    """The jobs of one namespace: what a person, KubeRay and the trainers do to them, and what is to be seen."""

    def __init__(self, api: Client, namespace: str) -> None:
        self.api = api
        self.namespace = namespace
        self._jobs = f"/apis/finetune-operator.io/v1alpha1/namespaces/{namespace}/finetunejobs"
        self._ray_jobs = f"/apis/ray.io/v1/namespaces/{namespace}/rayjobs"
        self._core = f"/api/v1/namespaces/{namespace}"

    def submit(self, name: str, changes: dict[str, Any] | None = None) -> None:
        self.api.create(f"{self._jobs}?fieldValidation=Strict", job_document(changes, name))

    def submit_runtime(self, name: str, changes: dict[str, Any] | None = None) -> None:
        self.api.create(_RUNTIMES, runtime_document(changes, name))

    def with_storage(self) -> dict[str, Any]:
        """Makes a runtime whose storage all pods can mount; the changes to a job that name it."""
        name = f"{self.namespace}-shared"
        if self.api.find(f"{_RUNTIMES}/{name}") is None:
            self.submit_runtime(name, {"storage": "pvc://runs/jobs"})
            self._bind_claim("runs", name)
        return {"runtimeRef": {"name": name}}

    def _bind_claim(self, claim: str, volume: str) -> None:
        """A claim of the namespace and its volume, bound to each other: pods of a claim that is not wait for a node."""
        size, modes = {"storage": "1Gi"}, ["ReadWriteMany"]
        self.api.create(
            "/api/v1/persistentvolumes",
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": volume},
                "spec": {
                    "capacity": size,
                    "accessModes": modes,
                    "hostPath": {"path": "/nowhere"},
                    "claimRef": {"namespace": self.namespace, "name": claim},
                },
            },
        )
        self.api.create(
            f"/api/v1/namespaces/{self.namespace}/persistentvolumeclaims",
            {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "metadata": {"name": claim, "annotations": {"pv.kubernetes.io/bind-completed": "yes"}},
                "spec": {
                    "accessModes": modes,
                    "resources": {"requests": size},
                    "volumeName": volume,
                    "storageClassName": "",
                },
            },
        )

    def change(self, name: str, patch: dict[str, Any]) -> None:
        self.api.merge(f"{self._jobs}/{name}", patch)

    def delete(self, name: str) -> None:
        self.api.delete(f"{self._jobs}/{name}")

    def status(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = (self.api.find(f"{self._jobs}/{name}") or {}).get("status") or {}
        return found

    def phase(self, name: str) -> str:
        return str(self.status(name).get("phase", ""))

    def condition(self, name: str, type: str) -> tuple[str, str]:
        """Its status and reason."""
        listed = self.status(name).get("conditions") or []
        found = ((one["status"], one["reason"]) for one in listed if one["type"] == type)
        return next(found, ("", ""))

    def attempts(self, name: str) -> list[tuple[int, str | None]]:
        """Number and outcome of each."""
        return [(one["number"], one.get("outcome")) for one in self.status(name).get("attempts") or []]

    def knows_its_ray_job(self, name: str, attempt: int = 1) -> bool:
        """Whether the status has the attempt with the RayJob that there is."""
        recorded = [one.get("uid") for one in self.status(name).get("attempts") or [] if one["number"] == attempt]
        return recorded == [self.ray_jobs().get(f"{name}-{attempt}", "none")]

    def ray_jobs(self) -> dict[str, str]:
        """Names and uids."""
        return {one["metadata"]["name"]: one["metadata"]["uid"] for one in self.api.items(self._ray_jobs)}

    def has(self, *ray_jobs: str) -> Callable[[], bool]:
        """Whether there are these RayJobs, and no others."""
        return lambda: set(self.ray_jobs()) == set(ray_jobs)

    def is_at(self, name: str, phase: str) -> Callable[[], bool]:
        return lambda: self.phase(name) == phase

    def kuberay(self, ray_job: str, deployment: str, job: str = "", message: str = "", **others: str) -> None:
        """Writes a RayJob's status as KubeRay would."""
        status = {"jobDeploymentStatus": deployment, "jobStatus": job, "message": message, **others}
        if deployment in ("Complete", "Failed"):
            # The operator sees ConfigMaps and RayJobs in two watches: by this it knows how long to wait for the other.
            status["endTime"] = written(datetime.now(UTC))
        self.api.merge(f"{self._ray_jobs}/{ray_job}/status", {"status": status})

    def delete_ray_job(self, name: str) -> None:
        self.api.delete(f"{self._ray_jobs}/{name}")

    def report(self, name: str, attempt: int, step: int, result: Result | None = None) -> None:
        """Writes the progress ConfigMap as the trainers would, which run when their plan is there."""
        wait_until(lambda: f"{name}-{attempt}-plan" in self.config_maps(), f"the plan of {name}")
        stage = Stage.DONE if result else Stage.TRAINING
        progress = Progress(stage=stage, step=step, total_steps=100, updated_at=datetime.now(UTC))
        data = {"attempt": str(attempt), "progress.json": progress.model_dump_json(by_alias=True)}
        if result is not None:
            model = Artifact(uri=f"s3://models/{name}", kind="model", digest="b3:0", bytes=1)
            outcome = Outcome(result=result, step=step, total_steps=100, artifacts=[model])
            data["outcome.json"] = outcome.model_dump_json(by_alias=True)
        self.edit_config_map(f"{name}-progress", data)

    def run(self, name: str, attempt: int = 1) -> None:
        """The attempt is up and has made a step."""
        self.kuberay(f"{name}-{attempt}", "Running", "RUNNING")
        self.report(name, attempt, step=1)

    def succeed(self, name: str, attempt: int = 1) -> None:
        """The attempt's trainers have ended well."""
        self.report(name, attempt, step=100, result=Result.SUCCEEDED)
        self.kuberay(f"{name}-{attempt}", "Complete", "SUCCEEDED")

    def fail(self, name: str, attempt: int = 1, exit_code: int = 6) -> None:
        """The attempt's trainers have ended with this code; 6 is a storage error, which is tried again."""
        message = f"Job entrypoint command failed with exit code {exit_code}, last available logs: none"
        self.kuberay(f"{name}-{attempt}", "Failed", "FAILED", message, reason="AppFailed")

    def config_maps(self) -> set[str]:
        names = {one["metadata"]["name"] for one in self.api.items(f"{self._core}/configmaps")}
        return names - {"kube-root-ca.crt"}

    def edit_config_map(self, name: str, data: dict[str, str]) -> None:
        self.api.merge(f"{self._core}/configmaps/{name}", {"data": data})

    def delete_config_map(self, name: str) -> None:
        self.api.delete(f"{self._core}/configmaps/{name}")

    def events(self, name: str) -> list[str]:
        """Reasons of the job's Events."""
        listed = self.api.items(f"{self._core}/events")
        return [one["reason"] for one in listed if one["involvedObject"]["name"] == name]

    def children(self) -> list[str]:
        """Everything in the namespace that belongs to a job."""
        label = "labelSelector=app.kubernetes.io%2Fmanaged-by%3Dfinetune-operator"
        core = ("configmaps", "serviceaccounts", "pods")
        rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{self.namespace}"
        paths = [
            *(f"{self._core}/{plural}" for plural in core),
            *(f"{rbac}/{plural}" for plural in ("roles", "rolebindings")),
            f"/apis/networking.k8s.io/v1/namespaces/{self.namespace}/networkpolicies",
            f"/apis/policy/v1/namespaces/{self.namespace}/poddisruptionbudgets",
            self._ray_jobs,
        ]
        return [
            f"{path.rpartition('/')[2]}/{one['metadata']['name']}"
            for path in paths
            for one in self.api.items(f"{path}?{label}")
        ]
