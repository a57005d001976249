"""What the operator relies on in a cluster, as tests that any `Cluster` must pass.

test_local_store gives them to the cluster in memory, control_plane/test_cluster_promises to a real API server: where
the two differ, tests against the one would prove nothing about the other.

A class that inherits has a fixture `world`: where to connect, and a namespace of the test's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass
from typing import Any

import pytest

from finetune_operator.cluster.protocol import Cluster, Document
from finetune_operator.errors import AlreadyExists, Conflict, Invalid, NotFound
from finetune_operator.kinds import CONFIG_MAP, FINETUNE_JOB, Key, Kind
from finetune_operator.runtime.reflector import WatchEvent
from tests.factories import job_document

__all__ = ["ClusterPromises", "World"]

_PATIENCE_SECONDS = 60.0
"""A real garbage collector takes its time; in memory nobody waits."""


@dataclass(frozen=True)
class World:
    """A cluster to be, and a namespace in it."""

    connect: Callable[[], AbstractAsyncContextManager[Cluster]]
    namespace: str

    def play(self, scenario: Callable[[Cluster], Awaitable[None]]) -> None:
        """Run a scenario with a cluster."""

        async def main() -> None:
            async with self.connect() as cluster:
                await scenario(cluster)

        asyncio.run(main())

    def key(self, name: str) -> Key:
        return Key(self.namespace, name)

    def job(self, name: str = "tiny") -> Document:
        document = job_document(name=name)
        document["metadata"]["namespace"] = self.namespace
        return document

    def config_map(self, name: str = "notes", data: dict[str, str] | None = None, **others: Any) -> Document:
        metadata = {"name": name, "namespace": self.namespace, **others.pop("metadata", {})}
        document = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data or {}}
        return document | others


def owned_by(*owners: Document) -> dict[str, Any]:
    references = [
        {
            "apiVersion": owner["apiVersion"],
            "kind": owner["kind"],
            "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"],
        }
        for owner in owners
    ]
    return {"ownerReferences": references}


async def gone(cluster: Cluster, kind: Kind, key: Key) -> bool:
    """Whether the object goes away within our patience."""
    async with asyncio.timeout(_PATIENCE_SECONDS):
        while await cluster.get(kind, key) is not None:
            await asyncio.sleep(0.05)
    return True


async def events_since(source: Any, version: str, number: int) -> list[WatchEvent]:
    """The first so many events after a version, bookmarks left out."""
    found: list[WatchEvent] = []
    async with asyncio.timeout(_PATIENCE_SECONDS), aclosing(source.watch(version, _PATIENCE_SECONDS)) as watch:
        async for event in watch:
            if event.type != "BOOKMARK":
                found.append(event)
            if len(found) == number:
                break
    return found


def told(events: list[WatchEvent]) -> list[tuple[str, str]]:
    return [(event.type, event.object["metadata"]["name"]) for event in events]


class ClusterPromises:
    """Each test is one promise."""

    def test_a_created_object_gets_what_the_server_gives_and_no_status(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            created = await cluster.create(FINETUNE_JOB, world.job() | {"status": {"phase": "Running"}})
            metadata = created["metadata"]
            assert metadata["generation"] == 1
            assert metadata["uid"]
            assert metadata["creationTimestamp"].endswith("Z")
            assert (created["apiVersion"], created["kind"]) == ("finetune-operator.io/v1alpha1", "FineTuneJob")
            assert "status" not in created
            assert await cluster.get(FINETUNE_JOB, world.key("tiny")) == created

        world.play(scenario)

    def test_a_name_is_taken_once(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            await cluster.create(CONFIG_MAP, world.config_map())
            with pytest.raises(AlreadyExists):
                await cluster.create(CONFIG_MAP, world.config_map(data={"other": "data"}))

        world.play(scenario)

    def test_a_name_that_dns_would_refuse_is_invalid(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            with pytest.raises(Invalid, match=r"metadata\.name"):
                await cluster.create(CONFIG_MAP, world.config_map(name="Not_a_name"))

        world.play(scenario)

    def test_what_is_not_there_is_none_and_cannot_be_changed(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            assert await cluster.get(FINETUNE_JOB, world.key("nobody")) is None
            with pytest.raises(NotFound):
                await cluster.merge(FINETUNE_JOB, world.key("nobody"), {"metadata": {"labels": {"a": "b"}}})
            document = world.job("nobody")
            document["metadata"]["resourceVersion"] = "1"
            with pytest.raises(NotFound):
                await cluster.replace_status(FINETUNE_JOB, document | {"status": {}})
            await cluster.delete(FINETUNE_JOB, world.key("nobody"), None)

        world.play(scenario)

    def test_a_merge_patch_adds_changes_and_removes(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            await cluster.create(CONFIG_MAP, world.config_map(data={"kept": "1", "changed": "1", "removed": "1"}))
            patch = {"data": {"changed": "2", "removed": None, "added": "2"}}
            merged = await cluster.merge(CONFIG_MAP, world.key("notes"), patch)
            assert merged["data"] == {"kept": "1", "changed": "2", "added": "2"}

        world.play(scenario)

    def test_a_write_that_changes_nothing_is_no_change(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            created = await cluster.create(CONFIG_MAP, world.config_map(data={"a": "1"}))
            first = await cluster.merge(CONFIG_MAP, world.key("notes"), {"data": {"a": "2"}})
            again = await cluster.merge(CONFIG_MAP, world.key("notes"), {"data": {"a": "2"}})
            versions = [one["metadata"]["resourceVersion"] for one in (created, first, again)]
            assert versions[0] != versions[1] == versions[2]

        world.play(scenario)

    def test_a_patch_for_an_older_version_conflicts(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            created = await cluster.create(CONFIG_MAP, world.config_map(data={"a": "1"}))
            await cluster.merge(CONFIG_MAP, world.key("notes"), {"data": {"a": "2"}})
            stale = {"metadata": {"resourceVersion": created["metadata"]["resourceVersion"]}, "data": {"a": "3"}}
            with pytest.raises(Conflict):
                await cluster.merge(CONFIG_MAP, world.key("notes"), stale)

        world.play(scenario)

    def test_generation_grows_with_the_spec_and_with_nothing_else(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            await cluster.create(FINETUNE_JOB, world.job())
            labelled = await cluster.merge(FINETUNE_JOB, world.key("tiny"), {"metadata": {"labels": {"a": "b"}}})
            assert labelled["metadata"]["generation"] == 1
            reported = await cluster.replace_status(FINETUNE_JOB, labelled | {"status": {"phase": "Running"}})
            assert reported["metadata"]["generation"] == 1
            suspended = await cluster.merge(FINETUNE_JOB, world.key("tiny"), {"spec": {"suspend": True}})
            assert suspended["metadata"]["generation"] == 2
            again = await cluster.merge(FINETUNE_JOB, world.key("tiny"), {"spec": {"suspend": True}})
            assert again["metadata"] == suspended["metadata"]

        world.play(scenario)

    def test_status_and_the_rest_are_written_apart(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            created = await cluster.create(FINETUNE_JOB, world.job())
            document = created | {"spec": created["spec"] | {"suspend": True}, "status": {"phase": "Running"}}
            document["metadata"] = created["metadata"] | {"labels": {"a": "b"}}
            reported = await cluster.replace_status(FINETUNE_JOB, document)
            assert reported["status"]["phase"] == "Running"
            assert reported["spec"] == created["spec"]
            assert "labels" not in reported["metadata"]
            patch = {"status": {"phase": "Failed"}, "metadata": {"labels": {"a": "b"}}}
            patched = await cluster.merge(FINETUNE_JOB, world.key("tiny"), patch)
            assert patched["status"] == reported["status"]
            assert patched["metadata"]["labels"] == {"a": "b"}

        world.play(scenario)

    def test_a_status_for_an_older_version_conflicts(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            created = await cluster.create(FINETUNE_JOB, world.job())
            await cluster.merge(FINETUNE_JOB, world.key("tiny"), {"spec": {"suspend": True}})
            with pytest.raises(Conflict):
                await cluster.replace_status(FINETUNE_JOB, created | {"status": {"phase": "Running"}})

        world.play(scenario)

    def test_a_status_for_another_object_of_the_name_conflicts(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            first = await cluster.create(FINETUNE_JOB, world.job())
            await cluster.delete(FINETUNE_JOB, world.key("tiny"), None)
            second = await cluster.create(FINETUNE_JOB, world.job())
            metadata = second["metadata"] | {"uid": first["metadata"]["uid"]}
            with pytest.raises(Conflict):
                await cluster.replace_status(FINETUNE_JOB, second | {"metadata": metadata, "status": {}})

        world.play(scenario)

    def test_a_status_must_say_which_version_it_is_for(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            await cluster.create(FINETUNE_JOB, world.job())
            with pytest.raises(Invalid, match="resourceVersion"):
                await cluster.replace_status(FINETUNE_JOB, world.job() | {"status": {"phase": "Running"}})

        world.play(scenario)

    def test_applying_creates_changes_and_lets_go_of_what_is_no_longer_named(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            first = await cluster.apply(CONFIG_MAP, world.config_map(data={"kept": "1", "changed": "1", "mine": "1"}))
            again = await cluster.apply(CONFIG_MAP, world.config_map(data={"kept": "1", "changed": "1", "mine": "1"}))
            assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]
            await cluster.merge(CONFIG_MAP, world.key("notes"), {"data": {"theirs": "1"}})
            applied = await cluster.apply(CONFIG_MAP, world.config_map(data={"kept": "1", "changed": "2"}))
            assert applied["data"] == {"kept": "1", "changed": "2", "theirs": "1"}
            assert applied["metadata"]["uid"] == first["metadata"]["uid"]

        world.play(scenario)

    def test_an_immutable_config_map_keeps_its_data(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            await cluster.create(CONFIG_MAP, world.config_map(data={"a": "1"}, immutable=True))
            with pytest.raises(Invalid, match="immutable"):
                await cluster.merge(CONFIG_MAP, world.key("notes"), {"data": {"a": "2"}})
            await cluster.merge(CONFIG_MAP, world.key("notes"), {"metadata": {"labels": {"a": "b"}}})

        world.play(scenario)

    def test_only_the_object_that_was_meant_is_deleted(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            created = await cluster.create(CONFIG_MAP, world.config_map())
            await cluster.delete(CONFIG_MAP, world.key("notes"), "3b0f1a2e-0000-4000-8000-000000000000")
            assert await cluster.get(CONFIG_MAP, world.key("notes")) == created
            await cluster.delete(CONFIG_MAP, world.key("notes"), created["metadata"]["uid"])
            assert await cluster.get(CONFIG_MAP, world.key("notes")) is None

        world.play(scenario)

    def test_what_an_object_owns_goes_with_it(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            job = await cluster.create(FINETUNE_JOB, world.job())
            child = await cluster.create(CONFIG_MAP, world.config_map("child", metadata=owned_by(job)))
            await cluster.create(CONFIG_MAP, world.config_map("grandchild", metadata=owned_by(child)))
            await cluster.create(CONFIG_MAP, world.config_map("stranger"))
            await cluster.delete(FINETUNE_JOB, world.key("tiny"), None)
            assert await gone(cluster, CONFIG_MAP, world.key("grandchild"))
            assert await gone(cluster, CONFIG_MAP, world.key("child"))
            assert await cluster.get(CONFIG_MAP, world.key("stranger")) is not None

        world.play(scenario)

    def test_what_has_another_owner_left_stays(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            owners = [await cluster.create(FINETUNE_JOB, world.job(name)) for name in ("one", "two")]
            await cluster.create(CONFIG_MAP, world.config_map("child", metadata=owned_by(*owners)))
            await cluster.delete(FINETUNE_JOB, world.key("one"), None)
            async with asyncio.timeout(_PATIENCE_SECONDS):
                while True:
                    child = await cluster.get(CONFIG_MAP, world.key("child"))
                    assert child is not None
                    if child["metadata"]["ownerReferences"] == owned_by(owners[1])["ownerReferences"]:
                        break
                    await asyncio.sleep(0.05)

        world.play(scenario)

    def test_a_watch_tells_what_happened_after_the_list(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            await cluster.create(FINETUNE_JOB, world.job("before"))
            source = cluster.source(FINETUNE_JOB, world.namespace)
            page = await source.list(0, None)
            assert [item["metadata"]["name"] for item in page.items] == ["before"]
            await cluster.create(FINETUNE_JOB, world.job("after"))
            await cluster.merge(FINETUNE_JOB, world.key("before"), {"spec": {"suspend": True}})
            await cluster.delete(FINETUNE_JOB, world.key("after"), None)
            events = await events_since(source, page.resource_version, 3)
            assert told(events) == [("ADDED", "after"), ("MODIFIED", "before"), ("DELETED", "after")]
            versions = [int(event.object["metadata"]["resourceVersion"]) for event in events]
            assert versions == sorted(set(versions))
            assert events[1].object["spec"]["suspend"] is True

        world.play(scenario)

    def test_a_watch_ends_at_its_timeout(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            source = cluster.source(FINETUNE_JOB, world.namespace)
            page = await source.list(0, None)
            events = [event async for event in source.watch(page.resource_version, 1)]
            assert {event.type for event in events} <= {"BOOKMARK"}

        world.play(scenario)

    def test_labels_narrow_lists_and_watches_and_who_loses_one_is_deleted_to_the_watch(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            for name, team in (("a", "red"), ("b", "blue"), ("c", "green")):
                await cluster.create(CONFIG_MAP, world.config_map(name, metadata={"labels": {"team": team}}))
            await cluster.create(CONFIG_MAP, world.config_map("d"))
            for selector, names in (
                ("team=red", ["a"]),
                ("team,team!=red", ["b", "c"]),
                ("team in (red, green)", ["a", "c"]),
                ("team notin (red),team", ["b", "c"]),
            ):
                page = await cluster.source(CONFIG_MAP, world.namespace, selector).list(0, None)
                assert [item["metadata"]["name"] for item in page.items] == names, selector
            source = cluster.source(CONFIG_MAP, world.namespace, "team=red")
            page = await source.list(0, None)
            await cluster.merge(CONFIG_MAP, world.key("a"), {"metadata": {"labels": {"team": "blue"}}})
            await cluster.merge(CONFIG_MAP, world.key("b"), {"metadata": {"labels": {"team": "red"}}})
            assert told(await events_since(source, page.resource_version, 2)) == [("DELETED", "a"), ("ADDED", "b")]

        world.play(scenario)

    def test_pages_show_the_objects_as_they_were_at_the_first(self, world: World) -> None:
        async def scenario(cluster: Cluster) -> None:
            for number in range(5):
                await cluster.create(FINETUNE_JOB, world.job(f"job-{number}"))
            source = cluster.source(FINETUNE_JOB, world.namespace)
            page = await source.list(2, None)
            pages = [page]
            await cluster.delete(FINETUNE_JOB, world.key("job-4"), None)
            while page.continue_token:
                page = await source.list(2, page.continue_token)
                pages.append(page)
            names = [[item["metadata"]["name"] for item in one.items] for one in pages]
            assert names == [["job-0", "job-1"], ["job-2", "job-3"], ["job-4"]]
            assert len({one.resource_version for one in pages}) == 1

        world.play(scenario)
