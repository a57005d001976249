"""Whole passes over a job that is suspended: what is written in which order, and what happens when it is refused."""

from __future__ import annotations

import asyncio
from typing import Any

from finetune_api.progress import Result
from finetune_operator.errors import NotFound, Unreachable
from finetune_operator.kinds import CONFIG_MAP, EVENT, RAY_JOB, Key
from tests.factories import job_document, runtime_document
from tests.operator.stage import NAMESPACE, Asked, Stage, play

SAVES = {"checkpoint": {"everySteps": 10}}


async def until_running(stage: Stage, changes: dict[str, Any] | None = None) -> None:
    await stage.submit(runtime_document({"storage": "pvc://runs/jobs"}, "pool"))
    await stage.submit(job_document(SAVES | {"runtimeRef": {"name": "pool"}} | (changes or {})))
    await asyncio.sleep(5)
    await stage.kuberay("example-1", "Running", "RUNNING")
    await stage.report("example", 1, step=1)
    await asyncio.sleep(5)
    assert stage.status()["phase"] == "Running"


def wish(stage: Stage) -> str | None:
    there = stage.there.peek(CONFIG_MAP, Key(NAMESPACE, "example-progress"))
    assert there is not None
    found: str | None = there["data"].get("stop-attempt")
    return found


def test_the_status_knows_of_the_wish_before_the_trainers_do_and_waiting_writes_nothing() -> None:
    async def scenario(stage: Stage) -> None:
        await until_running(stage)
        stage.cluster.asked.clear()
        await stage.change("example", {"suspend": True})
        await asyncio.sleep(50)
        writes = [(one.verb, one.name) for one in stage.cluster.writes() if one.kind != EVENT]
        assert writes == [("status", "example"), ("merge", "example-progress")]
        assert wish(stage) == "1"
        await asyncio.sleep(20)
        assert (stage.status()["phase"], stage.names(RAY_JOB)) == ("Suspended", [])

    play(scenario)


def test_trainers_that_stop_as_they_were_asked_are_not_waited_for_any_longer() -> None:
    async def scenario(stage: Stage) -> None:
        await until_running(stage, {"lifecycle": {"suspendGraceSeconds": 3600}})
        await stage.change("example", {"suspend": True})
        await asyncio.sleep(10)
        assert stage.names(RAY_JOB) == ["example-1"]
        await stage.report("example", 1, step=4, result=Result.CANCELLED)
        await asyncio.sleep(5)
        assert (stage.status()["phase"], stage.names(RAY_JOB)) == ("Suspended", [])
        assert stage.status()["attempts"][-1]["step"] == 4

    play(scenario)


def test_a_wish_that_cannot_be_written_does_not_hold_up_the_suspension_for_ever() -> None:
    def refuse(asked: Asked) -> None:
        if asked.verb == "merge" and asked.kind == CONFIG_MAP:
            raise Unreachable("connection refused")

    async def scenario(stage: Stage) -> None:
        await until_running(stage)
        stage.cluster.before = refuse
        await stage.change("example", {"suspend": True})
        await asyncio.sleep(120)
        assert (stage.status()["phase"], wish(stage)) == ("Suspended", None)

    play(scenario)


def test_a_place_for_progress_that_goes_away_at_that_moment_is_no_fault() -> None:
    def vanish(asked: Asked) -> None:
        if asked.verb == "merge" and asked.kind == CONFIG_MAP:
            raise NotFound(404, "NotFound", "it is gone")

    async def scenario(stage: Stage) -> None:
        await until_running(stage)
        stage.cluster.before = vanish
        await stage.change("example", {"suspend": True})
        await asyncio.sleep(5)
        asked = [one for one in stage.cluster.asked if one.verb == "merge" and one.kind == CONFIG_MAP]
        assert 1 <= len(asked) <= 3, "a pass that fails is made again and again"
        await asyncio.sleep(120)
        assert stage.status()["phase"] == "Suspended"

    play(scenario)
