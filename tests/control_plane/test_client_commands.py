"""`finetune submit` and its kin against a real API server, as a person types them, in processes of their own."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_client.cli.exits import ABSENT, DENIED, INVALID, UNREACHABLE
from tests.cluster.processes import started
from tests.cluster.server import Server
from tests.cluster.tools import Tool
from tests.control_plane.operators import Jobs, Operator, operator
from tests.factories import job_document

pytestmark = pytest.mark.control_plane

FINETUNE = Path(sys.executable).with_name("finetune")


@pytest.fixture
def running(jobs: Jobs, server: Server, tmp_path: Path) -> Iterator[Operator]:
    with operator(tmp_path, server.kubeconfig, jobs.namespace) as one:
        yield one


@pytest.fixture
def finetune(server: Server, tmp_path: Path) -> Tool:
    """The command, talking to the server of the tests. It finds nothing else that a person might have set up."""
    return Tool(FINETUNE, {"KUBECONFIG": str(server.kubeconfig), "HOME": str(tmp_path), "TZ": "UTC"})


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def file(document: dict[str, Any], name: str = "job.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(document, sort_keys=False))
        return path

    return file


def test_a_job_is_submitted_shown_watched_suspended_resumed_and_cancelled(
    jobs: Jobs, running: Operator, finetune: Tool, write: Any, tmp_path: Path
) -> None:
    here = ("-n", jobs.namespace)
    told = finetune("submit", write(job_document(name="tiny")), *here)
    assert told.splitlines() == [
        f"job tiny submitted to namespace {jobs.namespace}",
        f"Next: finetune watch tiny -n {jobs.namespace}",
    ]
    running.wait(lambda: jobs.knows_its_ray_job("tiny"), "the attempt")
    assert "RayJob tiny-1 starts its cluster" in finetune("get", "tiny", *here)
    jobs.run("tiny")
    running.wait(jobs.is_at("tiny", "Running"), "the job to run")
    head, row = finetune("list", *here).splitlines()
    assert head.split() == ["NAME", "METHOD", "TUNING", "GPUS", "PHASE", "STEP", "CKPT", "RESTARTS", "AGE", "WHY"]
    assert row.split()[:6] == ["tiny", "sft", "lora", "0", "Running", "1/100"]
    everywhere = json.loads(finetune("list", "-A", "-o", "json"))["items"]
    # Namespaces of tests before this one may still be on their way out.
    [listed] = [one for one in everywhere if one["metadata"]["namespace"] == jobs.namespace]
    assert (listed["kind"], listed["metadata"]["name"]) == ("FineTuneJob", "tiny")
    assert yaml.safe_load(finetune("get", "tiny", "-o", "yaml", *here))["status"]["phase"] == "Running"
    watched = tmp_path / "watch.log"
    with started([str(FINETUNE), "watch", "tiny", *here], watched, dict(finetune.environment)) as watch:
        running.wait(lambda: "Running, step 1/100" in watch.said(), "the watch to begin")
        finetune("suspend", "tiny", "--wait", *here)
        assert watch.process.wait(300) == 75
        assert f"Next: finetune resume tiny -n {jobs.namespace}" in watch.said()
    finetune("resume", "tiny", *here)
    running.wait(jobs.has("tiny-2"), "the second attempt")
    jobs.run("tiny", 2)
    jobs.succeed("tiny", 2)
    running.wait(jobs.is_at("tiny", "Succeeded"), "the job to succeed")
    assert finetune("watch", "tiny", *here).splitlines()[-1].endswith("Succeeded, step 100/100, attempt 2")
    assert finetune("artifacts", "tiny", *here).split()[-1] == "s3://models/tiny"
    page = finetune("describe", "tiny", *here)
    assert "Attempts (0 restarts, 0 preemptions)" in page
    assert "\nThe model is s3://models/tiny\n" in page
    finetune("cancel", "tiny", *here)
    gone = finetune.run("get", "tiny", *here)
    assert (gone.returncode, gone.stdout) == (ABSENT, "")
    assert re.search(r"finetune list -n \S+ .*shows those there are", gone.stderr)


def test_waiting_for_a_job_ends_with_the_class_of_its_failure_and_what_to_do(
    jobs: Jobs, running: Operator, finetune: Tool, write: Any, tmp_path: Path
) -> None:
    command = [str(FINETUNE), "submit", str(write(job_document(name="tiny"))), "--wait", "-n", jobs.namespace]
    with started(command, tmp_path / "submit.log", dict(finetune.environment)) as submit:
        running.wait(lambda: jobs.knows_its_ray_job("tiny"), "the attempt")
        jobs.fail("tiny", exit_code=3)
        assert submit.process.wait(300) == 3
        assert "Failed" in submit.said()
        assert "Next: Correct the data" in submit.said()


def test_a_bad_manifest_is_refused_field_by_field_and_nothing_is_submitted(
    jobs: Jobs, finetune: Tool, write: Any
) -> None:
    bad = write(job_document({"training.seed": -1, "tuning.lora.rank": 0}), "bad.yaml")
    good = write(job_document(name="good"), "good.yaml")
    done = finetune.run("submit", good, bad, "-n", jobs.namespace)
    assert (done.returncode, done.stdout) == (INVALID, "")
    assert f"{bad}: spec.training.seed: must be at least 0 (found -1)\n" in done.stderr
    assert done.stderr.endswith("2 problems found; nothing was submitted\n")
    assert "Traceback" not in done.stderr
    assert finetune.run("list", "-n", jobs.namespace).stdout == ""


def test_what_only_the_cluster_knows_is_told_with_the_field(jobs: Jobs, finetune: Tool, write: Any) -> None:
    # A namespace that is told apart by the server alone: the labels of its objects have limits of their own.
    document = job_document(name="tiny")
    document["metadata"]["labels"] = {"team": "not a label value!"}
    done = finetune.run("submit", write(document), "-n", jobs.namespace, "--dry-run")
    assert done.returncode == INVALID
    assert done.stderr.startswith("metadata.labels: ")
    assert '(found "not a label value!")' in done.stderr


def test_a_model_that_will_not_do_is_refused_before_it_is_submitted_by_the_file_or_by_the_cluster(
    jobs: Jobs, finetune: Tool, write: Any
) -> None:
    here = ("-n", jobs.namespace)
    first, other = (write(job_document(name=name), f"{name}.yaml") for name in ("first", "other"))
    beside = write(job_document({"model.source": "job://first"}, "second"), "second.yaml")
    told = "spec.model.source: will be an adapter and not a whole model; give first an output with merge: true"
    done = finetune.run("submit", beside, first, *here)
    assert (done.returncode, done.stdout) == (INVALID, "")
    assert f"{beside}: {told}" in done.stderr
    finetune("submit", beside, "--dry-run", *here)  # it is waited for
    finetune("submit", first, *here)
    done = finetune.run("submit", other, beside, *here)
    assert (done.returncode, done.stdout) == (INVALID, "")
    assert told in done.stderr
    assert [line.split()[0] for line in finetune("list", *here).splitlines()[1:]] == ["first"]


def test_a_job_whose_runtime_is_missing_says_so_in_every_view(
    jobs: Jobs, running: Operator, finetune: Tool, write: Any
) -> None:
    finetune("submit", write(job_document({"runtimeRef.name": "nowhere"}, "waits")), "-n", jobs.namespace)
    running.wait(lambda: jobs.condition("waits", "Valid") == ("False", "RuntimeNotFound"), "the job to say so")
    for verb in ("get", "describe"):
        told = finetune(verb, "waits", "-n", jobs.namespace)
        assert "nowhere" in told
        assert "Next: Choose one of: kubectl get finetuneruntimes" in told


def test_places_that_cannot_be_used_have_exit_codes_of_their_own(
    jobs: Jobs, server: Server, finetune: Tool, write: Any
) -> None:
    file = write(job_document(name="tiny"))
    context = finetune.run("list", "--context", "prod")
    assert (context.returncode, context.stderr.count("\n")) == (UNREACHABLE, 1)
    absent = finetune.run("list", "--kubeconfig", file.with_name("absent"))
    assert (absent.returncode, absent.stderr.count("\n")) == (UNREACHABLE, 1)
    nobody = server.kubeconfig_of(jobs.namespace, "default")
    denied = finetune.run("submit", file, "--kubeconfig", nobody, "-n", jobs.namespace)
    assert (denied.returncode, denied.stdout) == (DENIED, "")
