"""A kind that the cluster does not know yet: one that others bring is awaited, one of ours is asked for by name."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from finetune_operator.cluster.presence import OptionalKind, RequiredKind
from finetune_operator.errors import NotFound
from finetune_operator.kinds import Key
from finetune_operator.runtime.reflector import Change, Reflector
from tests.operator.runtime.fakes import FakeServer, thing
from tests.operator.runtime.virtual_time import run, settle


def unknown() -> NotFound:
    return NotFound(404, "NotFound", "404 page not found")


def test_an_optional_kind_reads_as_empty_and_is_noticed_when_it_appears() -> None:
    async def main() -> None:
        server, told, appeared = FakeServer(), list[Key](), list[float]()
        server.list_faults.extend([unknown()] * 20)
        kind = OptionalKind(server, lambda: appeared.append(asyncio.get_running_loop().time()))

        def note(change: Change) -> None:
            told.append(change.key)

        reflector = Reflector(kind, "RayJob", on_change=note)
        task = asyncio.create_task(reflector.run())
        await asyncio.sleep(60)
        assert reflector.synced.is_set()
        assert reflector.problem() is None
        assert not kind.is_known
        assert (told, appeared) == ([], [])
        server.list_faults.clear()
        server.put(thing("a"))
        await asyncio.sleep(30)
        assert kind.is_known
        assert len(appeared) == 1
        assert told == [Key("default", "a")]
        server.put(thing("b"))
        await settle()
        assert told == [Key("default", "a"), Key("default", "b")]
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    run(main())


def test_a_kind_that_must_be_there_says_what_to_install() -> None:
    async def main() -> None:
        server = FakeServer()
        server.list_faults.append(unknown())
        kind = RequiredKind(server, "install it")
        with pytest.raises(NotFound, match="install it"):
            await kind.list(1, None)
        server.put(thing("a"))
        assert [item["metadata"]["name"] for item in (await kind.list(1, None)).items] == ["a"]

    run(main())
