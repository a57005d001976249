"""What a server kept of a status is compared with what was written; what it refuses is left out."""

from __future__ import annotations

import asyncio

import pytest

from finetune_operator.cluster.protocol import Document
from finetune_operator.errors import Invalid
from finetune_operator.kinds import FINETUNE_JOB, RAY_JOB, Kind
from finetune_operator.outdated import dropped_fields, is_there, place_of
from tests.factories import job_document
from tests.operator.stage import Asked, Stage, play


def test_fields_that_were_not_kept_are_named_at_any_depth() -> None:
    sent = {"phase": "Running", "progress": {"step": 1, "worldSize": 2}, "attempts": [{"number": 1, "uid": "a"}]}
    kept = {"phase": "Running", "progress": {"step": 1}, "attempts": [{"number": 1}]}
    assert list(dropped_fields(sent, kept)) == ["status.progress.worldSize", "status.attempts[0].uid"]
    assert list(dropped_fields(sent, None)) == ["status.phase", "status.progress", "status.attempts"]


def test_what_the_server_adds_and_nulls_that_it_leaves_out_are_no_difference() -> None:
    sent = {"progress": {"step": 1, "epoch": None}, "conditions": []}
    assert list(dropped_fields(sent, {"progress": {"step": 1, "percent": 0.0}, "conditions": []})) == []


@pytest.mark.parametrize(
    ("path", "place"),
    [
        ("status.failure", ("failure",)),
        ("status.conditions[0].reason", ("conditions", 0, "reason")),
        ("status.progress.metrics[rewards/a.b]", ("progress", "metrics", "rewards/a.b")),
    ],
)
def test_a_path_leads_to_its_place_as_the_server_writes_it(path: str, place: tuple[int | str, ...]) -> None:
    assert place_of(path) == place


def refuse(stage: Stage, *fields: str) -> None:
    """The API server has a CRD that does not allow what stands in `fields`."""
    replace_status = stage.cluster.replace_status

    async def of_another_version(kind: Kind, document: Document) -> Document:
        standing = [field for field in fields if is_there(field, document["status"])]
        if kind == FINETUNE_JOB and standing:
            error = Invalid(422, "Invalid", f"{standing[0]}: Unsupported value")
            error.causes = [(field, "Unsupported value") for field in standing]
            raise error
        return await replace_status(kind, document)

    stage.cluster.replace_status = of_another_version  # type: ignore[method-assign]


def test_a_job_ends_although_the_class_of_its_failure_is_refused() -> None:
    async def scenario(stage: Stage) -> None:
        refuse(stage, "status.failure", "status.postMortem.failureClass")
        await stage.submit(job_document())
        await asyncio.sleep(1)
        await stage.kuberay("example-1", "Running", "RUNNING")
        await stage.report("example", 1, step=1)
        await asyncio.sleep(1)
        said = "Job entrypoint command failed with exit code 2, last available logs: none"
        await stage.kuberay("example-1", "Failed", "FAILED", said, reason="AppFailed")
        await asyncio.sleep(60)
        status = stage.status()
        assert status["phase"] == "Failed"
        assert "finishedAt" in status
        assert "failure" not in status
        assert "postMortem" not in status  # it is none without the class
        assert stage.condition("Failed")["reason"] == "UserError"
        kept = stage.condition("StatusKept")
        assert (kept["status"], kept["reason"]) == ("False", "OutdatedCRD")
        assert "does not keep status.failure, status.postMortem.failureClass" in kept["message"]
        assert "OutdatedCRD" in stage.reasons()

    play(scenario)


def test_a_status_that_cannot_be_mended_by_leaving_fields_out_is_tried_again_and_not_taken_as_written() -> None:
    async def scenario(stage: Stage) -> None:
        def refuses(asked: Asked) -> None:
            if asked.verb == "status" and asked.kind == FINETUNE_JOB:
                raise Invalid(422, "Invalid", "spec: Invalid value")

        stage.cluster.before = refuses
        await stage.submit(job_document())
        await asyncio.sleep(5)
        assert stage.names(RAY_JOB) == ["example-1"]
        stage.cluster.before = lambda _: None
        await asyncio.sleep(300)
        assert stage.status()["attempts"][0]["number"] == 1

    play(scenario)


def test_the_condition_that_tells_of_fields_lasts_until_the_server_keeps_them() -> None:
    async def scenario(stage: Stage) -> None:
        replace_status = stage.cluster.replace_status

        async def without_progress(kind: Kind, document: Document) -> Document:
            rest = {name: value for name, value in document["status"].items() if name != "progress"}
            return await replace_status(kind, {**document, "status": rest})

        stage.cluster.replace_status = without_progress  # type: ignore[method-assign]
        await stage.submit(job_document())
        await asyncio.sleep(1)
        await stage.kuberay("example-1", "Running", "RUNNING")
        await stage.report("example", 1, step=1)
        await asyncio.sleep(30)
        assert stage.condition("StatusKept")["reason"] == "OutdatedCRD"
        assert "does not keep status.progress." in stage.condition("StatusKept")["message"]
        writes = len(stage.cluster.writes())
        await asyncio.sleep(600)
        assert len(stage.cluster.writes()) == writes
        stage.cluster.replace_status = replace_status  # type: ignore[method-assign]
        await stage.report("example", 1, step=2)
        await asyncio.sleep(30)
        assert stage.condition("StatusKept")["status"] == "True"
        assert stage.status()["progress"]["step"] == 2

    play(scenario)


def test_a_cluster_that_keeps_everything_is_not_spoken_of() -> None:
    async def scenario(stage: Stage) -> None:
        await stage.submit(job_document())
        await asyncio.sleep(30)
        assert "StatusKept" not in {one["type"] for one in stage.status()["conditions"]}

    play(scenario)
