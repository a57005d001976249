"""Events: told once, counted when repeated, and never the reason that something else fails."""

from __future__ import annotations

import asyncio
from typing import Any

from finetune_operator.errors import Unreachable
from finetune_operator.events import EventRecorder
from finetune_operator.kinds import EVENT, Key
from tests.factories import job_document
from tests.operator.runtime.virtual_time import run
from tests.operator.stage import NAMESPACE, Asked, Stage, now


def events(stage: Stage) -> list[dict[str, Any]]:
    return stage.there.select(EVENT, NAMESPACE)


def test_an_event_names_the_job_and_who_speaks() -> None:
    async def main() -> None:
        stage = Stage()
        job = await stage.submit(job_document())
        await EventRecorder(stage.cluster, now, "operator-0").record(job, "Warning", "Refused", "x" * 5000)
        (event,) = events(stage)
        assert event["involvedObject"]["uid"] == job["metadata"]["uid"]
        assert event["involvedObject"]["kind"] == "FineTuneJob"
        assert (event["type"], event["reason"], event["count"]) == ("Warning", "Refused", 1)
        assert event["reportingInstance"] == "operator-0"
        assert len(event["message"]) == 1024

    run(main())


def test_what_is_said_again_soon_is_counted_and_after_ten_minutes_told_anew() -> None:
    async def main() -> None:
        stage = Stage()
        job = await stage.submit(job_document())
        recorder = EventRecorder(stage.cluster, now, "operator-0")
        for _ in range(3):
            await recorder.record(job, "Normal", "Started", "It starts.")
            await asyncio.sleep(60)
        await recorder.record(job, "Normal", "Started", "It starts again.")
        assert sorted(event["count"] for event in events(stage)) == [1, 3]
        await asyncio.sleep(3600)
        await recorder.record(job, "Normal", "Started", "It starts.")
        assert sorted(event["count"] for event in events(stage)) == [1, 1, 3]

    run(main())


def test_an_event_that_was_tidied_up_is_told_anew() -> None:
    async def main() -> None:
        stage = Stage()
        job = await stage.submit(job_document())
        recorder = EventRecorder(stage.cluster, now, "operator-0")
        await recorder.record(job, "Normal", "Started", "It starts.")
        (event,) = events(stage)
        await stage.there.delete(EVENT, Key(NAMESPACE, event["metadata"]["name"]))
        await asyncio.sleep(1)
        await recorder.record(job, "Normal", "Started", "It starts.")
        assert [event["count"] for event in events(stage)] == [1]

    run(main())


def test_an_event_that_cannot_be_written_is_lost_and_that_is_all() -> None:
    async def main() -> None:
        stage = Stage()
        job = await stage.submit(job_document())

        def refuse(_: Asked) -> None:
            raise Unreachable("away")

        stage.cluster.before = refuse
        recorder = EventRecorder(stage.cluster, now, "operator-0")
        await recorder.record(job, "Normal", "Started", "It starts.")
        stage.cluster.before = lambda _: None
        await recorder.record(job, "Normal", "Started", "It starts.")
        assert [event["count"] for event in events(stage)] == [1]

    run(main())
