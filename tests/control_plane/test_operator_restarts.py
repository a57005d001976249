"""An operator may end at any moment: another goes on where it was, nothing happens twice, and nobody waits for long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.faults import Faults, Freeze, LoseAnswer, Rule
from tests.cluster.server import Server
from tests.control_plane.operators import SHORT_LEASE, Jobs, Operator, operator

pytestmark = pytest.mark.control_plane


@pytest.mark.parametrize("action", [Freeze(), LoseAnswer()], ids=["before the write", "after the write"])
def test_an_operator_killed_at_each_write_of_a_start_starts_every_job_once(
    jobs: Jobs, faults: Faults, tmp_path: Path, action: Freeze | LoseAnswer
) -> None:
    names = [f"killed-{place}" for place in range(13)]
    for place, name in enumerate(names):
        with (
            faults.rule(action, verb="write", namespace=jobs.namespace, times=1, after=place) as rule,
            alone(jobs, faults, tmp_path) as one,
        ):
            jobs.submit(name)
            one.wait(partial(_struck_or_started, rule, jobs, name), f"write {place}")
            one.process.kill()
    with alone(jobs, faults, tmp_path) as last:
        last.wait(jobs.has(*(f"{name}-1" for name in names)), "every RayJob, and no second one")
        for name in names:
            last.wait(partial(jobs.knows_its_ray_job, name), f"{name} to know its RayJob")
            jobs.run(name)
        for name in names:
            last.wait(jobs.is_at(name, "Running"), f"{name} to run")
            jobs.succeed(name)
        for name in names:
            last.wait(jobs.is_at(name, "Succeeded"), f"{name} to succeed")
            assert jobs.attempts(name) == [(1, "Succeeded")]


def alone(jobs: Jobs, faults: Faults, folder: Path) -> AbstractContextManager[Operator]:
    """An operator that asks nobody whether it may: one that is killed does not give its lease back."""
    return operator(folder, faults.kubeconfig, jobs.namespace, "--no-leader-election")


def _struck_or_started(rule: Rule, jobs: Jobs, name: str) -> bool:
    """A start needs fewer writes than the largest place."""
    return rule.struck > 0 or jobs.phase(name) == "Starting"


def test_what_happened_while_no_operator_was_there_is_noticed_by_the_next(
    jobs: Jobs, server: Server, tmp_path: Path
) -> None:
    names = ("ends", "fails", "vanishes", "waits")
    backoff = {"failurePolicy.backoff": {"initialSeconds": 1, "maxSeconds": 1}}
    with operator(tmp_path, server.kubeconfig, jobs.namespace, SHORT_LEASE) as one:
        for name in names:
            jobs.submit(name, backoff)
        one.wait(jobs.has(*(f"{name}-1" for name in names)), "the RayJobs")
        for name in names:
            jobs.run(name)
        for name in names:
            one.wait(jobs.is_at(name, "Running"), f"{name} to run")
        one.process.kill()
    jobs.succeed("ends")
    jobs.fail("fails")
    jobs.delete_ray_job("vanishes-1")
    jobs.submit("new")
    with operator(tmp_path, server.kubeconfig, jobs.namespace) as one:
        one.wait(jobs.is_at("ends", "Succeeded"), "the one that ended")
        one.wait(lambda: jobs.attempts("fails") == [(1, "StorageError"), (2, None)], "the one that failed")
        one.wait(lambda: jobs.attempts("vanishes") == [(1, "Unknown"), (2, None)], "the one whose RayJob is gone")
        one.wait(jobs.has("ends-1", "fails-2", "vanishes-2", "waits-1", "new-1"), "the RayJobs of all")
        assert jobs.attempts("waits") == [(1, None)]


@pytest.mark.parametrize("how", ["killed", "told to end"])
def test_when_the_leader_ends_the_other_replica_goes_on(jobs: Jobs, server: Server, tmp_path: Path, how: str) -> None:
    with operator(tmp_path, server.kubeconfig, jobs.namespace, name="first") as first:
        first.wait(lambda: first.leads, "the first to lead")
        with operator(tmp_path, server.kubeconfig, jobs.namespace, name="second") as second:
            jobs.submit("tiny")
            first.wait(jobs.has("tiny-1"), "its RayJob")
            assert first.leads
            assert not second.leads
            assert second.metric("controller_runtime_reconcile_total") == 0
            if how == "killed":
                first.process.kill()
            else:
                assert first.process.stop() == 0
            jobs.submit("next")
            second.wait(jobs.has("tiny-1", "next-1"), "the second to take over")
            assert second.leads
            lease = jobs.api.get(f"/apis/coordination.k8s.io/v1/namespaces/{jobs.namespace}/leases/finetune-operator")
            assert lease["spec"]["holderIdentity"].startswith("second_")
            second.wait(lambda: jobs.knows_its_ray_job("tiny"), "the attempt to know its RayJob")
            assert jobs.attempts("tiny") == [(1, None)]


def test_an_operator_that_is_told_to_end_gives_the_lease_back(jobs: Jobs, server: Server, tmp_path: Path) -> None:
    with operator(tmp_path, server.kubeconfig, jobs.namespace) as one:
        one.wait(lambda: one.leads, "it to lead")
        assert one.process.stop() == 0
        lease = jobs.api.get(f"/apis/coordination.k8s.io/v1/namespaces/{jobs.namespace}/leases/finetune-operator")
        assert not lease["spec"].get("holderIdentity")
        assert one.log()[-1]["message"] == "stopping"


def test_crds_are_upgraded_under_running_jobs(jobs: Jobs, server: Server, tmp_path: Path) -> None:
    def newer(version: dict[str, Any]) -> None:
        status = version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
        status["ofTheNextVersion"] = {"type": "string", "default": "yes"}
        version["additionalPrinterColumns"].append({"name": "NEW", "type": "string", "jsonPath": ".status.phase"})

    with operator(tmp_path, server.kubeconfig, jobs.namespace) as one:
        jobs.submit("tiny")
        one.wait(jobs.has("tiny-1"), "its RayJob")
        jobs.run("tiny")
        one.wait(jobs.is_at("tiny", "Running"), "the job to run")
        with another_crd(jobs, newer):
            one.wait(lambda: jobs.status("tiny").get("ofTheNextVersion") == "yes", "the new schema to be served")
            jobs.submit("later")
            one.wait(jobs.has("tiny-1", "later-1"), "a new job to start")
            jobs.succeed("tiny")
            one.wait(jobs.is_at("tiny", "Succeeded"), "the old one to end")


def test_a_crd_older_than_the_operator_is_told_of_and_its_jobs_go_on(
    jobs: Jobs, server: Server, tmp_path: Path
) -> None:
    def older(version: dict[str, Any]) -> None:
        del version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]["progress"]

    with operator(tmp_path, server.kubeconfig, jobs.namespace) as one, another_crd(jobs, older):
        jobs.submit("tiny")
        one.wait(jobs.has("tiny-1"), "its RayJob")
        jobs.run("tiny")
        one.wait(lambda: "OutdatedCRD" in jobs.events("tiny"), "the job's Event")
        assert jobs.condition("tiny", "StatusKept") == ("False", "OutdatedCRD")
        [told] = [line for line in one.log() if "is older than the operator" in line["message"]]
        assert "does not keep status.progress. Bring it to the operator's version" in told["message"]
        jobs.succeed("tiny")
        one.wait(jobs.is_at("tiny", "Succeeded"), "the job to succeed")


def test_a_failure_whose_class_the_crd_does_not_allow_ends_the_job_all_the_same(
    jobs: Jobs, server: Server, tmp_path: Path
) -> None:
    def older(version: dict[str, Any]) -> None:
        status = version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
        status["failure"]["enum"] = status["postMortem"]["properties"]["failureClass"]["enum"] = ["DataError"]

    with operator(tmp_path, server.kubeconfig, jobs.namespace) as one, another_crd(jobs, older):
        jobs.submit("tiny")
        one.wait(jobs.has("tiny-1"), "its RayJob")
        jobs.run("tiny")
        jobs.fail("tiny", exit_code=2)
        one.wait(jobs.is_at("tiny", "Failed"), "the job to fail")
        one.wait(lambda: jobs.condition("tiny", "StatusKept") == ("False", "OutdatedCRD"), "the status to say why")
        assert jobs.condition("tiny", "Failed") == ("True", "UserError")
        assert not jobs.status("tiny").keys() & {"failure", "postMortem"}


@contextmanager
def another_crd(jobs: Jobs, change: Callable[[dict[str, Any]], None]) -> Iterator[None]:
    """For the length of a block the cluster has a CRD of FineTuneJobs whose version is changed so."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/finetunejobs.finetune-operator.io"
    before, other = jobs.api.get(path), jobs.api.get(path)
    change(other["spec"]["versions"][0])
    jobs.api.replace(path, other)
    try:
        yield
    finally:
        metadata = {"name": before["metadata"]["name"]}
        jobs.api.apply(path, {key: before[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": metadata})
