"""Whatever the way to the API server does, a job lives the same life: each test is one fault from beginning to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster.crds import define_files
from tests.cluster.faults import CutWatch, Delay, Drop, FailWatch, Faults, LoseAnswer, Refuse
from tests.cluster.kuberay import define_ray
from tests.cluster.server import control_plane
from tests.control_plane.conftest import ROOT, Built
from tests.control_plane.operators import SHORT_LEASE, Jobs, operator

pytestmark = pytest.mark.control_plane


FAULTS = {
    "every watch is cut after two events": (CutWatch(2), {"verb": "watch"}),
    "watches end in order after one event": (CutWatch(1, cleanly=True), {"verb": "watch"}),
    "watches are told that their version is gone": (FailWatch(410, events=1), {"verb": "watch", "times": 12}),
    "lists fail at first": (Refuse(500), {"verb": "list", "times": 6}),
    "every other write is refused with 500": (Refuse(500), {"verb": "write", "times": 8}),
    "writes are asked to wait": (Refuse(429, retry_after=1), {"verb": "write", "times": 4}),
    "status writes conflict": (Refuse(409), {"resource": "finetunejobs/status", "times": 6}),
    "answers to writes are lost": (LoseAnswer(), {"verb": "write", "times": 10}),
    "connections are closed": (Drop(), {"times": 25}),
    "the server is slow": (Delay(0.3), {}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_life_with_a_failure_in_it_goes_as_it_should_although(
    fault: str, jobs: Jobs, faults: Faults, tmp_path: Path
) -> None:
    action, where = FAULTS[fault]
    with (
        faults.rule(action, **where) as rule,  # type: ignore[arg-type]
        operator(tmp_path, faults.kubeconfig, jobs.namespace) as one,
    ):
        jobs.submit("tiny", {"failurePolicy.backoff": {"initialSeconds": 1, "maxSeconds": 1}})
        one.wait(jobs.has("tiny-1"), "its RayJob")
        one.wait(lambda: "tiny-progress" in jobs.config_maps(), "the place for progress")
        jobs.run("tiny")
        one.wait(jobs.is_at("tiny", "Running"), "the job to run")
        jobs.fail("tiny")
        one.wait(jobs.has("tiny-2"), "the second attempt, and the first cleared away")
        jobs.run("tiny", 2)
        jobs.succeed("tiny", 2)
        one.wait(jobs.is_at("tiny", "Succeeded"), "the job to succeed")
        assert jobs.attempts("tiny") == [(1, "StorageError"), (2, "Succeeded")]
        assert rule.struck > 0
        assert [line for line in one.log() if "traceback" in line] == []


def test_an_outage_of_the_api_server_is_survived(jobs: Jobs, faults: Faults, tmp_path: Path) -> None:
    with operator(tmp_path, faults.kubeconfig, jobs.namespace, SHORT_LEASE) as one:
        jobs.submit("before")
        one.wait(jobs.has("before-1"), "the first RayJob")
        with faults.outage():
            jobs.submit("meanwhile")
            one.wait(lambda: not one.leads, "the lease to be lost")
        one.wait(jobs.has("before-1", "meanwhile-1"), "the job that was submitted meanwhile")
        # The outage may have come between its RayJob and the status that tells of it.
        one.wait(lambda: jobs.attempts("before") == [(1, None)], "the first one's attempt to go on")


def test_the_operator_waits_for_crds_and_for_kuberay_and_notices_both(
    built: Built, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("bare")
    with control_plane(built("etcd"), built("kube-apiserver"), folder) as server:
        jobs = Jobs(server.client, "default")
        with operator(folder, server.kubeconfig, "default", wait=False) as one:
            hint = "kubectl apply --server-side -f manifests/crd"
            one.wait(lambda: hint in one.process.said(), "the log to say what to install")
            assert not one.ready
            define_files(server.client, sorted((ROOT / "manifests/crd").iterdir()))
            one.wait(lambda: one.ready, "the operator to be ready without KubeRay")
            jobs.submit("tiny")
            one.wait(lambda: jobs.condition("tiny", "ClusterReady") == ("False", "KubeRayMissing"), "the job to say so")
            define_ray(server.client, built("kuberay-manifests"))
            one.wait(jobs.has("tiny-1"), "its RayJob")
            one.wait(
                lambda: jobs.condition("tiny", "ClusterReady")[1] != "KubeRayMissing", "the job not to say so any more"
            )
