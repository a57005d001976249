"""The cluster in memory: all that a cluster promises, and what it adds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import pytest

from finetune_operator.cluster.protocol import Cluster, Document
from finetune_operator.errors import ApiError, Gone
from finetune_operator.kinds import CONFIG_MAP, FINETUNE_JOB, Key, Kind
from finetune_operator.local import LocalCluster
from finetune_operator.runtime.reflector import Change, Reflector, WatchEvent
from tests.factories import job_document
from tests.operator.cluster_promises import ClusterPromises, World, owned_by
from tests.operator.runtime.virtual_time import run

JOB = Key("default", "tiny")


class TestInMemory(ClusterPromises):
    """The same promises as a real API server's."""

    @pytest.fixture
    def world(self) -> World:
        @asynccontextmanager
        async def connect() -> AsyncIterator[Cluster]:
            yield LocalCluster()

        return World(connect, "default")


def job() -> Document:
    document = job_document(name="tiny")
    document["metadata"]["namespace"] = "default"
    return document


def config_map(name: str, **metadata: object) -> Document:
    return {"metadata": {"name": name, "namespace": "default", **metadata}, "data": {"a": "1"}}


async def watched(cluster: LocalCluster, version: str, seconds: float) -> list[WatchEvent]:
    return [event async for event in cluster.source(FINETUNE_JOB).watch(version, seconds)]


def test_a_version_that_is_no_longer_remembered_is_gone() -> None:
    async def scenario() -> None:
        cluster = LocalCluster(history=2)
        await cluster.create(FINETUNE_JOB, job())
        version = str(cluster.version)
        for suspend in (True, False):
            await cluster.merge(FINETUNE_JOB, JOB, {"spec": {"suspend": suspend}})
        assert [event.type for event in await watched(cluster, version, 1)] == ["MODIFIED", "MODIFIED", "BOOKMARK"]
        await cluster.merge(FINETUNE_JOB, JOB, {"spec": {"suspend": True}})
        with pytest.raises(Gone):
            await watched(cluster, version, 1)

    run(scenario())


def test_the_further_pages_of_an_old_list_are_gone() -> None:
    async def scenario() -> None:
        cluster = LocalCluster()
        for number in range(20):
            await cluster.create(CONFIG_MAP, config_map(f"notes-{number}"))
        source = cluster.source(CONFIG_MAP)
        first = await source.list(1, None)
        for number in range(20):
            await cluster.merge(CONFIG_MAP, Key("default", "notes-0"), {"data": {"a": f"{number}"}})
            await source.list(1, None)
        with pytest.raises(Gone):
            await source.list(1, first.continue_token)

    run(scenario())


def test_a_quiet_watch_gets_a_bookmark_a_minute_that_a_later_watch_can_begin_at() -> None:
    async def scenario() -> None:
        cluster = LocalCluster(history=1)
        await cluster.create(FINETUNE_JOB, job())
        version = str(cluster.version)
        await cluster.create(CONFIG_MAP, config_map("elsewhere"))
        bookmarks = await watched(cluster, version, 150)
        assert [event.type for event in bookmarks] == ["BOOKMARK"] * 3
        await cluster.merge(FINETUNE_JOB, JOB, {"spec": {"suspend": True}})
        later = await watched(cluster, bookmarks[-1].object["metadata"]["resourceVersion"], 1)
        assert [event.type for event in later] == ["MODIFIED", "BOOKMARK"]

    run(scenario())


def test_a_reflector_follows_it_also_past_what_is_remembered() -> None:
    async def scenario() -> None:
        cluster = LocalCluster(history=1)
        changes: list[tuple[bool, bool]] = []

        def note(change: Change) -> None:
            changes.append((change.old is not None, change.new is not None))

        await cluster.create(FINETUNE_JOB, job())
        reflector = Reflector(cluster.source(FINETUNE_JOB), "FineTuneJob", on_change=note)
        following = asyncio.create_task(reflector.run())
        await reflector.synced.wait()
        await cluster.merge(FINETUNE_JOB, JOB, {"spec": {"suspend": True}})
        await cluster.merge(FINETUNE_JOB, JOB, {"spec": {"suspend": False}})  # one is forgotten before it is read
        await asyncio.sleep(60)
        await cluster.delete(FINETUNE_JOB, JOB)
        await asyncio.sleep(60)
        assert changes == [(False, True), (True, True), (True, False)]
        assert len(reflector.store) == 0
        following.cancel()

    run(scenario())


def test_a_reader_that_changes_what_it_got_changes_nothing_else() -> None:
    async def scenario() -> None:
        cluster = LocalCluster()
        given = job()
        created = await cluster.create(FINETUNE_JOB, given)
        given["spec"]["model"]["source"] = "hf://other/model"
        created["spec"]["training"]["epochs"] = 99
        stored = await cluster.get(FINETUNE_JOB, JOB)
        assert stored is not None
        assert stored["spec"] == job()["spec"]

    run(scenario())


def test_what_names_an_owner_that_is_not_there_is_deleted() -> None:
    async def scenario() -> None:
        cluster = LocalCluster()
        owner = await cluster.create(FINETUNE_JOB, job())
        await cluster.delete(FINETUNE_JOB, JOB)
        await cluster.create(CONFIG_MAP, config_map("late", **owned_by(owner)))
        assert await cluster.get(CONFIG_MAP, Key("default", "late")) is None

    run(scenario())


def test_an_orphan_stays_and_forgets_its_owner() -> None:
    async def scenario() -> None:
        cluster = LocalCluster()
        owner = await cluster.create(FINETUNE_JOB, job())
        await cluster.create(CONFIG_MAP, config_map("child", **owned_by(owner)))
        await cluster.delete(FINETUNE_JOB, JOB, propagation="Orphan")
        [child] = cluster.select(CONFIG_MAP)
        assert "ownerReferences" not in child["metadata"]

    run(scenario())


def test_what_was_dumped_is_restored_with_its_uids_and_goes_on() -> None:
    async def scenario() -> None:
        before = LocalCluster()
        owner = await before.create(FINETUNE_JOB, job())
        await before.create(CONFIG_MAP, config_map("child", **owned_by(owner)))
        after = LocalCluster()
        after.restore(before.dump())
        assert after.dump() == before.dump()
        changed = await after.merge(FINETUNE_JOB, JOB, {"spec": {"suspend": True}})
        assert int(changed["metadata"]["resourceVersion"]) > before.version
        await after.delete(FINETUNE_JOB, JOB, owner["metadata"]["uid"])
        assert after.dump() == []

    run(scenario())


def test_objects_are_dated_by_the_clock_that_was_given() -> None:
    now = datetime(2026, 1, 1, 12, tzinfo=UTC) + timedelta(milliseconds=900)

    async def scenario() -> None:
        created = await LocalCluster(clock=lambda: now).create(FINETUNE_JOB, job())
        assert created["metadata"]["creationTimestamp"] == "2026-01-01T12:00:00Z"

    run(scenario())


def test_admission_sees_an_object_before_it_is_stored() -> None:
    def admit(kind: Kind, document: Document) -> Document:
        return document | {"spec": document["spec"] | {"suspend": True}} if kind == FINETUNE_JOB else document

    async def scenario() -> None:
        created = await LocalCluster(admission=admit).create(FINETUNE_JOB, job())
        assert created["spec"]["suspend"] is True

    run(scenario())


def test_an_object_without_a_namespace_or_a_selector_that_is_none_is_a_bad_request() -> None:
    async def scenario() -> None:
        with pytest.raises(ApiError, match="namespace"):
            await LocalCluster().create(FINETUNE_JOB, job_document())
        with pytest.raises(ApiError, match="unable to parse"):
            LocalCluster().source(FINETUNE_JOB, None, "team=(red")

    run(scenario())


def test_a_name_can_be_left_to_the_cluster() -> None:
    async def scenario() -> None:
        document = {"metadata": {"generateName": "event-", "namespace": "default"}}
        created = await LocalCluster().create(CONFIG_MAP, document)
        assert created["metadata"]["name"].startswith("event-")

    run(scenario())
