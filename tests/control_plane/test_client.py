"""Submitting jobs to a real API server, from Python: the client is ours, the operator works, KubeRay is the test."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import Phase, Status
from finetune_api.problems import InvalidManifest
from finetune_client import AsyncClient, Client
from finetune_client.errors import NoLog, NoSuchJob, NotAllowed, NotInstalled, Unreachable
from tests.cluster.crds import define
from tests.cluster.faults import Faults, Rule
from tests.cluster.processes import wait_until
from tests.cluster.server import Server, control_plane
from tests.control_plane.conftest import ROOT, Built
from tests.control_plane.exec_stand_in import Exec
from tests.control_plane.operators import Jobs, Operator, operator
from tests.factories import job, job_document

pytestmark = pytest.mark.control_plane


@pytest.fixture
def running(jobs: Jobs, server: Server, tmp_path: Path) -> Iterator[Operator]:
    with operator(tmp_path, server.kubeconfig, jobs.namespace) as one:
        yield one


@pytest.fixture
def client(jobs: Jobs, faults: Faults) -> Iterator[Client]:
    """Behind the proxy, in the test's namespace."""
    with Client(kubeconfig=faults.kubeconfig, namespace=jobs.namespace) as one:
        yield one


class Watching(threading.Thread):
    """Follows a job on a thread, and keeps what it saw."""

    def __init__(self, client: Client, name: str) -> None:
        super().__init__(daemon=True)
        self._job = client.job(name)
        self.seen: list[Status] = []

    def run(self) -> None:
        for status in self._job.watch():
            self.seen.append(status)

    @property
    def phases(self) -> list[Phase]:
        return list(dict.fromkeys(status.phase for status in self.seen))


def test_a_job_is_submitted_followed_suspended_resumed_and_cancelled(
    jobs: Jobs, running: Operator, client: Client, server: Server
) -> None:
    submitted = client.submit(job(name="tiny"))
    assert (submitted.name, submitted.namespace) == ("tiny", jobs.namespace)
    running.wait(jobs.has("tiny-1"), "its RayJob")
    with Client(kubeconfig=server.kubeconfig, namespace=jobs.namespace) as other:
        watching = Watching(other, "tiny")
        watching.start()
        jobs.run("tiny")
        running.wait(lambda: Phase.RUNNING in watching.phases, "the watch to see it run")
        views = [other.submit(job(name="tiny-too"), dry_run=True).submitted, other.job("tiny").view(), *other.list()]
        assert {view and view.place for view in views} == {f"--kubeconfig {server.kubeconfig}"}
        submitted.suspend()
        assert submitted.wait().phase is Phase.SUSPENDED
        submitted.resume()
        running.wait(jobs.has("tiny-2"), "the second attempt")
        jobs.run("tiny", 2)
        jobs.succeed("tiny", 2)
        ended = submitted.wait()
        watching.join(300)
    assert ended.phase is Phase.SUCCEEDED
    assert [(one.number, one.outcome) for one in ended.attempts] == [(1, "Suspended"), (2, "Succeeded")]
    assert [one.uri for one in submitted.artifacts()] == ["s3://models/tiny"]
    assert {Phase.RUNNING, Phase.SUSPENDED, Phase.SUCCEEDED} <= set(watching.phases)
    running.wait(
        lambda: "Complete" in [event.reason for event in submitted.describe().events], "the event that tells of it"
    )
    found = submitted.describe()
    assert found.advice.next == "The model is s3://models/tiny"
    submitted.cancel()
    with pytest.raises(NoSuchJob, match=f"there is no job tiny in namespace {jobs.namespace}"):
        submitted.status()


def test_the_same_verbs_can_be_awaited(jobs: Jobs, faults: Faults) -> None:
    async def scenario() -> list[str]:
        async with AsyncClient(kubeconfig=faults.kubeconfig, namespace=jobs.namespace) as client:
            first, second = await asyncio.gather(client.submit(job(name="a")), client.submit(job(name="b")))
            assert (await first.status()).phase is Phase.PENDING
            await second.cancel()
            return [view.name for view in await client.list()]

    assert asyncio.run(scenario()) == ["a"]


def test_the_sample_notebook_hands_its_job_to_a_cluster_too(
    jobs: Jobs, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig))
    notebook = json.loads((ROOT / "manifests/samples/notebook/fine_tune.ipynb").read_text(encoding="utf-8"))
    cells = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]}
    here, elsewhere = "client = Client(local=True, workdir=WORKDIR)", "# client = Client() "
    assert here in cells["submit"]
    assert elsewhere in cells["submit"]
    submit = cells["submit"].replace(here, "").replace(elsewhere, f'client = Client(namespace="{jobs.namespace}") ')
    rows = 'ROWS = EVAL_ROWS = "hf://org/rows"'
    names: dict[str, Any] = {}
    exec("\n".join([cells["parameters"], rows, cells["job"], submit]), names)
    assert names["job"].status().phase is Phase.PENDING
    assert (names["job"].namespace, names["job"].artifacts()) == (jobs.namespace, [])
    exec(cells["cancel"], names)


def test_what_the_author_left_open_is_left_to_the_cluster(jobs: Jobs, client: Client) -> None:
    client.submit(job_document({"training": {"epochs": 2}}, "open"))
    stored = jobs.api.get(f"/apis/finetune-operator.io/v1alpha1/namespaces/{jobs.namespace}/finetunejobs/open")
    ours = {"epochs": 2} | {key: value for key, value in stored["spec"]["training"].items() if key != "epochs"}
    assert stored["spec"]["training"] == ours
    fields = [entry["fieldsV1"] for entry in stored["metadata"]["managedFields"] if entry["manager"] == "finetune"]
    assert "f:epochs" in str(fields)


def test_a_watch_survives_a_connection_that_is_cut_and_a_server_that_is_away(
    jobs: Jobs, running: Operator, client: Client, faults: Faults
) -> None:
    client.submit(job(name="tiny"))
    watching = Watching(client, "tiny")
    watching.start()
    running.wait(lambda: watching.seen, "the watch to have begun")
    with faults.outage():
        jobs.run("tiny")
        running.wait(jobs.is_at("tiny", "Running"), "the job to run")
    running.wait(lambda: Phase.RUNNING in watching.phases, "the watch to see it")
    faults.cut()
    jobs.succeed("tiny")
    running.wait(lambda: not watching.is_alive(), "the watch to end with the job")
    assert watching.phases[-1] is Phase.SUCCEEDED


def test_a_watch_of_a_job_that_is_deleted_says_so(jobs: Jobs, client: Client) -> None:
    handle = client.submit(job(name="tiny"))
    views = handle.views()
    assert next(views).name == "tiny"
    jobs.delete("tiny")
    with pytest.raises(NoSuchJob, match=r"job tiny in namespace \S+ was deleted"):
        list(views)


def test_a_dry_run_is_judged_by_the_cluster_and_stores_nothing(jobs: Jobs, client: Client) -> None:
    assert client.submit(job(name="tiny"), dry_run=True).submitted is not None
    assert client.list() == []


def test_a_name_that_is_taken_is_a_problem_of_the_name(client: Client) -> None:
    client.submit(job(name="tiny"))
    with pytest.raises(InvalidManifest) as refused:
        client.submit(job(name="tiny"))
    [problem] = refused.value.problems
    assert problem.path == "metadata.name"
    assert "finetune cancel tiny" in problem.message


def test_a_namespace_in_the_file_and_another_one_asked_for_is_a_problem(client: Client) -> None:
    document = job_document(name="tiny")
    document["metadata"]["namespace"] = "elsewhere"
    with pytest.raises(InvalidManifest, match=r"metadata\.namespace: is not the namespace that was asked for"):
        client.submit(document)


def test_who_may_not_do_it_is_told_what_is_missing(jobs: Jobs, server: Server) -> None:
    nobody = server.kubeconfig_of(jobs.namespace, "default")
    with (
        Client(kubeconfig=nobody, namespace=jobs.namespace) as client,
        pytest.raises(NotAllowed, match=f"you may not create FineTuneJobs in namespace {jobs.namespace}: .*forbidden"),
    ):
        client.submit(job(name="tiny"))


def test_a_server_that_is_not_there_is_named(faults: Faults) -> None:
    with (
        faults.outage(),
        Client(kubeconfig=faults.kubeconfig) as client,
        pytest.raises(Unreachable, match=r"https://127.0.0.1:\d+ does not answer.*--context"),
    ):
        client.list()


def test_a_context_that_is_not_there_is_named_with_those_that_are(server: Server) -> None:
    with (
        Client(kubeconfig=server.kubeconfig, context="prod") as client,
        pytest.raises(Unreachable, match="has no context called prod; choose one with --context: tests"),
    ):
        client.list()


def test_a_namespace_that_is_not_there_is_named(server: Server, stored_crds: Any) -> None:
    with (
        Client(kubeconfig=server.kubeconfig, namespace="nowhere") as client,
        pytest.raises(Exception, match="there is no namespace nowhere"),
    ):
        client.submit(job(name="tiny"))


@pytest.fixture
def bare(built: Built, tmp_path: Path) -> Iterator[Server]:
    """An API server of its own, which has never heard of us."""
    folder = tmp_path / "bare"
    folder.mkdir()
    with control_plane(built("etcd"), built("kube-apiserver"), folder) as server:
        yield server


def test_a_cluster_without_our_kinds_and_one_with_older_ones_say_what_to_install(bare: Server) -> None:
    with Client(kubeconfig=bare.kubeconfig) as client:
        with pytest.raises(NotInstalled, match="finetune-operator is not installed there"):
            client.list()
        with pytest.raises(NotInstalled):
            client.submit(job(name="tiny"))
        file = ROOT / "manifests/crd/finetunejobs.finetune-operator.io.yaml"
        older = yaml.safe_load(file.read_text(encoding="utf-8"))
        schema = older["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]
        del schema["spec"]["properties"]["training"]["properties"]["seed"]
        define(bare.client, [older])
        assert client.submit(job({"training": {"epochs": 1}}, "tiny")).status().phase is Phase.PENDING
        with pytest.raises(InvalidManifest) as refused:
            client.submit(job({"training": {"epochs": 1, "seed": 7}}, "seeded"))
    [problem] = refused.value.problems
    assert problem.path == "spec.training.seed"
    assert "older than yours" in problem.message


def pretend_pod(jobs: Jobs, name: str, role: str, workdir: str) -> None:
    """A pod of the first attempt that claims to run; nobody runs it."""
    labels = {"job": "tiny", "attempt": "1", "role": role}
    container = {"name": "ray", "image": "none", "env": [{"name": "FINETUNE_WORKDIR", "value": workdir}]}
    pods = f"/api/v1/namespaces/{jobs.namespace}/pods"
    metadata = {"name": name, "labels": {f"finetune-operator.io/{key}": value for key, value in labels.items()}}
    jobs.api.create(pods, {"metadata": metadata, "spec": {"containers": [container]}})
    jobs.api.merge(f"{pods}/{name}/status", {"status": {"phase": "Running"}})


@pytest.mark.parametrize(
    ("workdir", "whose", "everyones"),
    [
        ("/mnt/pvc/runs/jobs/ns/tiny/attempt-1", "tiny-1-head", ["tiny-1-head"]),
        (
            "/var/finetune/run",
            "tiny-1-worker-b",
            ["tiny-1-head", "tiny-1-worker-a", "tiny-1-worker-b", "tiny-1-worker-c"],
        ),
    ],
    ids=[
        "a folder that all pods share is read at the head",
        "of folders of their own the one that rank 0 last wrote to is",
    ],
)
def test_the_log_is_rank_0s(
    jobs: Jobs, running: Operator, client: Client, faults: Faults, workdir: str, whose: str, everyones: list[str]
) -> None:
    def output(pod: str, script: str) -> str | None:
        if "grep" in script:
            seconds = {"tiny-1-worker-a": 12, "tiny-1-worker-b": 57}.get(pod)
            return None if seconds is None else f"2026-01-31 10:15:{seconds},003 worker 0 INFO step 7\n"
        return f"first line of {pod}\nsecond line, étrange\n"

    faults.add(Rule(Exec(output), resource="pods/exec"))
    handle = client.submit(job(name="tiny"))
    running.wait(lambda: jobs.knows_its_ray_job("tiny"), "the attempt")
    with pytest.raises(NoLog, match="attempt 1 has no running pod yet; -f waits for one"):
        list(handle.logs())
    pretend_pod(jobs, "tiny-1-head", "head", workdir)
    for worker in ("tiny-1-worker-a", "tiny-1-worker-b", "tiny-1-worker-c"):
        pretend_pod(jobs, worker, "worker", workdir)
    assert [line.text for line in handle.logs()] == [f"first line of {whose}", "second line, étrange"]
    assert list(dict.fromkeys(line.source for line in handle.logs(everyone=True))) == everyones
    with pytest.raises(NoLog, match="job tiny has no attempt 3; it has 1"):
        list(handle.logs(attempt=3))


def test_of_a_failed_job_whose_pods_are_gone_the_last_lines_are_read(
    jobs: Jobs, running: Operator, client: Client
) -> None:
    handle = client.submit(job(name="tiny"))
    running.wait(lambda: jobs.knows_its_ray_job("tiny"), "the attempt")
    message = "Job entrypoint command failed with exit code 3, last available logs: rows.jsonl:17: messages is empty"
    jobs.kuberay("tiny-1", "Failed", "FAILED", message, reason="AppFailed")
    assert handle.wait().phase is Phase.FAILED
    assert "rows.jsonl:17" in "\n".join(line.text for line in handle.logs())
    assert handle.describe().advice.next.startswith("Correct the data")
    wait_until(lambda: "Failed" in [event.reason for event in handle.describe().events], "the event that tells of it")
