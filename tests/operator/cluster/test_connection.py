"""Requests reach a server as its API wants them, and every way to fail becomes one of our errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from finetune_operator.cluster import connection as connection_module
from finetune_operator.cluster.connection import Connection, connect
from finetune_operator.cluster.kubernetes import KubernetesCluster
from finetune_operator.cluster.login import Unusable, proxy_of_environment
from finetune_operator.errors import (
    AlreadyExists,
    ApiError,
    Conflict,
    Forbidden,
    Gone,
    Invalid,
    NotFound,
    TooManyRequests,
    Unreachable,
)
from finetune_operator.kinds import CONFIG_MAP, FINETUNE_JOB, FINETUNE_RUNTIME, Key
from finetune_operator.metrics import Metrics
from finetune_operator.runtime.limits import TokenBucket
from finetune_operator.runtime.reflector import WatchEvent
from tests.operator.runtime.virtual_time import run as run_in_virtual_time

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]
KEY = Key("default", "notes")


class Scene:
    """A server that answers as it is told, and the connection to it."""

    def __init__(self, folder: Path) -> None:
        self.kubeconfig = folder / "kubeconfig"
        self.metrics = Metrics()
        self.asked: list[web.Request] = []
        self.bodies: list[Any] = []

    def write_kubeconfig(self, url: str, token: str = "secret") -> None:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": url}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        }
        self.kubeconfig.write_text(json.dumps(config), encoding="utf-8")

    @asynccontextmanager
    async def serving(self, answer: Answer) -> AsyncIterator[Connection]:
        async def note(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            self.asked.append(request)
            self.bodies.append(json.loads(body) if body else None)
            return await answer(request)

        runner = web.AppRunner(web.Application(), shutdown_timeout=0.1)
        runner.app.router.add_route("*", "/{path:.*}", note)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.write_kubeconfig(f"http://127.0.0.1:{runner.addresses[0][1]}")
        try:
            async with connect(self.kubeconfig, metrics=self.metrics) as connection:
                yield connection
        finally:
            await runner.cleanup()

    def play(self, answer: Answer, scenario: Callable[[Connection], Awaitable[None]]) -> None:
        async def main() -> None:
            async with self.serving(answer) as connection:
                await scenario(connection)

        asyncio.run(main())


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def cluster(connection: Connection) -> KubernetesCluster:
    return KubernetesCluster(connection, TokenBucket(1000, 1000))


def status(code: int, reason: str = "", message: str = "no") -> web.Response:
    return web.json_response({"kind": "Status", "reason": reason, "message": message, "code": code}, status=code)


def always(document: Any) -> Answer:
    """Every answer is this document, or what it makes when called: a response can be sent once."""

    async def answer(_: web.Request) -> web.StreamResponse:
        return document() if callable(document) else web.json_response(document)

    return answer


def streaming(*parts: bytes, cut: bool = False) -> Answer:
    """A watch whose answer comes in these parts, which are no lines."""

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        for part in parts:
            await response.write(part)
            await asyncio.sleep(0.01)
        if cut and request.transport is not None:
            request.transport.abort()
        return response

    return answer


def event(name: str, kind: str = "ADDED", **fields: Any) -> dict[str, Any]:
    return {"type": kind, "object": {"metadata": {"name": name}, **fields}}


async def watched(connection: Connection) -> list[WatchEvent]:
    source = cluster(connection).source(CONFIG_MAP, "default")
    return [event async for event in source.watch("7", 30)]


def test_each_method_is_the_request_that_the_api_wants(scene: Scene) -> None:
    job = {"metadata": {"namespace": "default", "name": "tiny", "uid": "u", "resourceVersion": "7", "labels": {}}}

    async def scenario(connection: Connection) -> None:
        there = cluster(connection)
        await there.get(FINETUNE_RUNTIME, Key("", "pool"))
        await there.create(CONFIG_MAP, {"metadata": {"namespace": "default", "name": "notes"}})
        await there.apply(CONFIG_MAP, {"metadata": {"namespace": "default", "name": "notes"}})
        await there.merge(CONFIG_MAP, KEY, {"data": None})
        await there.replace_status(FINETUNE_JOB, {**job, "spec": {"big": True}, "status": {"phase": "Running"}})
        await there.delete(CONFIG_MAP, KEY, "u")

    scene.play(always({}), scenario)
    jobs = "/apis/finetune-operator.io/v1alpha1"
    notes = "/api/v1/namespaces/default/configmaps"
    manager = "fieldManager=finetune-operator"
    assert [(asked.method, asked.path_qs) for asked in scene.asked] == [
        ("GET", f"{jobs}/finetuneruntimes/pool"),
        ("POST", f"{notes}?{manager}"),
        ("PATCH", f"{notes}/notes?{manager}&force=true"),
        ("PATCH", f"{notes}/notes?{manager}"),
        ("PUT", f"{jobs}/namespaces/default/finetunejobs/tiny/status?{manager}"),
        ("DELETE", f"{notes}/notes"),
    ]
    assert [asked.content_type for asked in scene.asked[1:4]] == [
        "application/json",
        "application/apply-patch+yaml",
        "application/merge-patch+json",
    ]
    assert {asked.headers["Authorization"] for asked in scene.asked} == {"Bearer secret"}
    assert scene.bodies[4] == {
        "apiVersion": "finetune-operator.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "tiny", "namespace": "default", "uid": "u", "resourceVersion": "7"},
        "status": {"phase": "Running"},
    }
    assert scene.bodies[5]["preconditions"] == {"uid": "u"}
    assert scene.bodies[5]["propagationPolicy"] == "Background"


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (403, "Forbidden", Forbidden),
        (404, "NotFound", NotFound),
        (409, "Conflict", Conflict),
        (409, "AlreadyExists", AlreadyExists),
        (410, "Expired", Gone),
        (422, "Invalid", Invalid),
        (429, "TooManyRequests", TooManyRequests),
        (500, "InternalError", ApiError),
        (401, "Unauthorized", ApiError),
    ],
)
def test_a_refusal_is_raised_as_what_it_is(scene: Scene, code: int, reason: str, kind: type[ApiError]) -> None:
    async def scenario(connection: Connection) -> None:
        with pytest.raises(ApiError) as caught:
            await cluster(connection).merge(CONFIG_MAP, KEY, {})
        assert type(caught.value) is kind
        assert (caught.value.status, caught.value.reason, caught.value.message) == (code, reason, "because")

    scene.play(always(lambda: status(code, reason, "because")), scenario)


def test_the_wait_that_a_server_asks_for_is_handed_on(scene: Scene) -> None:
    async def answer(_: web.Request) -> web.StreamResponse:
        return web.json_response({"message": "later"}, status=429, headers={"Retry-After": "7"})

    async def scenario(connection: Connection) -> None:
        with pytest.raises(TooManyRequests) as caught:
            await cluster(connection).get(CONFIG_MAP, KEY)
        assert caught.value.retry_after == 7

    scene.play(answer, scenario)


def test_what_is_wrong_with_each_field_is_handed_on(scene: Scene) -> None:
    causes = [{"field": "spec.seed", "message": "Invalid value: -1", "reason": "FieldValueInvalid"}]
    document = {"kind": "Status", "reason": "Invalid", "message": "no", "details": {"causes": causes}}

    async def scenario(connection: Connection) -> None:
        with pytest.raises(Invalid) as refused:
            await cluster(connection).get(CONFIG_MAP, KEY)
        assert refused.value.causes == [("spec.seed", "Invalid value: -1")]

    scene.play(always(lambda: web.json_response(document, status=422)), scenario)


def test_a_commands_output_comes_piece_by_piece_with_its_channel(scene: Scene) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await socket.prepare(request)
        for piece in (b"\x01", b"\x01hello", b"\x02oh", b'\x03{"status": "Success"}'):
            await socket.send_bytes(piece)
        await socket.close()
        return socket

    async def scenario(connection: Connection) -> None:
        query = [("command", "sh"), ("command", "-c")]
        pieces = [piece async for piece in connection.output("/exec", query)]
        assert pieces == [(1, b""), (1, b"hello"), (2, b"oh"), (3, b'{"status": "Success"}')]

    scene.play(answer, scenario)
    [asked] = scene.asked
    assert asked.query.getall("command") == ["sh", "-c"]
    assert asked.headers["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("is_silent", [False, True], ids=["cut", "still open and silent for good"])
def test_a_commands_output_that_stops_before_its_end_was_told_is_no_end(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, is_silent: bool
) -> None:
    monkeypatch.setattr(connection_module, "_HEARTBEAT_SECONDS", 0.1)

    async def answer(request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await socket.prepare(request)
        await socket.send_bytes(b"\x01hello")
        if is_silent:
            await asyncio.Event().wait()  # nobody reads, so nobody answers a ping
        assert request.transport is not None
        request.transport.abort()
        return socket

    async def scenario(connection: Connection) -> None:
        pieces = connection.output("/exec", [])
        assert await anext(pieces) == (1, b"hello")
        async with asyncio.timeout(60):
            with pytest.raises(Unreachable, match="GET /exec: the connection was cut"):
                await anext(pieces)

    scene.play(answer, scenario)


def test_a_command_is_run_for_who_has_logged_in_anew(scene: Scene) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.headers["Authorization"] == "Bearer secret":
            scene.write_kubeconfig(str(request.url.origin()), token="new")
            return status(401)
        socket = web.WebSocketResponse(protocols=("v4.channel.k8s.io",))
        await socket.prepare(request)
        await socket.send_bytes(b'\x03{"status": "Success"}')
        await socket.close()
        return socket

    async def scenario(connection: Connection) -> None:
        now = asyncio.get_running_loop().time
        asyncio.get_running_loop().time = lambda: now() + 3600  # type: ignore[method-assign]
        assert [channel async for channel, _ in connection.output("/exec", [])] == [3]

    scene.play(answer, scenario)


def test_a_watch_whose_other_end_is_gone_without_a_word_is_unreachable(scene: Scene) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        response.enable_chunked_encoding()
        await response.prepare(request)
        await response.write(json.dumps(event("a")).encode() + b"\n")
        await asyncio.Event().wait()
        return response

    async def scenario(connection: Connection) -> None:
        lines = connection.lines("/watch", {}, silence=0.2)
        assert (await anext(lines))["type"] == "ADDED"
        with pytest.raises(Unreachable, match="GET /watch"):
            await anext(lines)

    scene.play(answer, scenario)


def test_a_command_that_may_not_be_run_is_refused_and_one_without_a_server_has_no_answer(scene: Scene) -> None:
    async def scenario(connection: Connection) -> None:
        with pytest.raises(Forbidden):
            [piece async for piece in connection.output("/exec", [])]

    scene.play(always(lambda: status(403)), scenario)

    async def alone() -> None:
        async with connect(scene.kubeconfig) as connection:
            with pytest.raises(Unreachable):
                [piece async for piece in connection.output("/exec", [])]

    asyncio.run(alone())


def test_an_unknown_kind_is_answered_in_plain_text_and_still_not_found(scene: Scene) -> None:
    async def scenario(connection: Connection) -> None:
        with pytest.raises(NotFound, match="404 page not found"):
            await cluster(connection).create(CONFIG_MAP, {"metadata": {"namespace": "default"}})
        assert await cluster(connection).get(CONFIG_MAP, KEY) is None

    scene.play(always(lambda: web.Response(status=404, text="404 page not found\n")), scenario)


def test_a_page_of_some_other_server_is_no_answer(scene: Scene) -> None:
    async def scenario(connection: Connection) -> None:
        with pytest.raises(Unreachable, match="no API server"):
            await cluster(connection).get(CONFIG_MAP, KEY)

    scene.play(always(lambda: web.Response(text="<html>Please log in</html>")), scenario)


def test_a_server_that_is_not_there_or_too_slow_is_unreachable(scene: Scene) -> None:
    async def slow(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(30)
        return web.Response()

    async def scenario(connection: Connection) -> None:
        with pytest.raises(Unreachable, match="GET /slow"):
            await connection.send("GET", "/slow", seconds=0.05)

    async def refused() -> None:
        scene.write_kubeconfig("http://127.0.0.1:1")
        async with connect(scene.kubeconfig, metrics=scene.metrics) as connection:
            with pytest.raises(Unreachable, match="GET /api"):
                await connection.send("GET", "/api")

    scene.play(slow, scenario)
    asyncio.run(refused())
    assert 'code="<error>"' in scene.metrics.render().decode()


def test_requests_are_counted_by_answer_and_timed(scene: Scene) -> None:
    async def scenario(connection: Connection) -> None:
        await cluster(connection).get(CONFIG_MAP, KEY)
        await cluster(connection).get(CONFIG_MAP, KEY)

    scene.play(always(lambda: status(404, "NotFound")), scenario)
    page = scene.metrics.render().decode()
    counted = next(line for line in page.splitlines() if line.startswith("rest_client_requests_total{"))
    assert 'code="404"' in counted
    assert 'method="GET"' in counted
    assert counted.endswith(" 2.0")
    assert "rest_client_request_duration_seconds_count{" in page


def test_a_list_is_read_in_pages_by_label(scene: Scene) -> None:
    page = {"metadata": {"resourceVersion": "9", "continue": "more"}, "items": [{"metadata": {"name": "a"}}]}

    async def scenario(connection: Connection) -> None:
        source = cluster(connection).source(CONFIG_MAP, None, "a=b,c")
        first = await source.list(500, None)
        assert (first.items, first.resource_version, first.continue_token) == (page["items"], "9", "more")
        await source.list(500, first.continue_token)

    scene.play(always(page), scenario)
    assert [asked.path for asked in scene.asked] == ["/api/v1/configmaps"] * 2
    assert [dict(asked.query) for asked in scene.asked] == [
        {"labelSelector": "a=b,c", "limit": "500"},
        {"labelSelector": "a=b,c", "limit": "500", "continue": "more"},
    ]


def test_a_watch_is_read_line_by_line_however_the_bytes_arrive(scene: Scene) -> None:
    large = event("large", data={"text": "x" * 3_000_000})
    stream = b"".join(json.dumps(one).encode() + b"\n" for one in (event("a"), large, event("b"), event("c")))
    parts = [stream[:20], stream[20:1_000_000], stream[1_000_000:-30], stream[-30:]]

    async def scenario(connection: Connection) -> None:
        events = await watched(connection)
        assert [one.object["metadata"]["name"] for one in events] == ["a", "large", "b", "c"]
        assert len(events[1].object["data"]["text"]) == 3_000_000

    scene.play(streaming(*parts), scenario)
    assert dict(scene.asked[0].query) == {
        "watch": "true",
        "allowWatchBookmarks": "true",
        "resourceVersion": "7",
        "timeoutSeconds": "30",
    }


def test_a_word_that_comes_again_in_a_watch_is_held_once(scene: Scene) -> None:
    stream = b"".join(json.dumps(event(name, data={"the-same-key": "and its value"})).encode() + b"\n" for name in "ab")

    async def scenario(connection: Connection) -> None:
        [[first], [second]] = [list(one.object["data"].items()) for one in await watched(connection)]
        assert first[0] is second[0]
        assert first[1] is second[1]

    scene.play(streaming(stream), scenario)


@pytest.mark.parametrize("levels", [300, 9_990])
def test_an_object_that_is_nested_deeply_ends_no_watch(scene: Scene, levels: int) -> None:
    deep = json.dumps(event("deep", spec="SPEC")).replace('"SPEC"', '{"a": ' * levels + "1" + "}" * levels)
    stream = f"{deep}\n{json.dumps(event('next'))}\n".encode()

    async def scenario(connection: Connection) -> None:
        assert [one.object["metadata"]["name"] for one in await watched(connection)] == ["deep", "next"]

    scene.play(streaming(stream), scenario)


def test_an_error_inside_a_watch_is_raised_after_what_came_before(scene: Scene) -> None:
    error = {"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old resource version"}}
    stream = json.dumps(event("a")).encode() + b"\n" + json.dumps(error).encode() + b"\n"
    seen: list[WatchEvent] = []

    async def scenario(connection: Connection) -> None:
        stream = cluster(connection).source(CONFIG_MAP).watch("7", 30)
        seen.append(await anext(stream))
        with pytest.raises(Gone, match="too old"):
            await anext(stream)

    scene.play(streaming(stream), scenario)
    assert len(seen) == 1


def test_a_watch_that_is_cut_off_is_unreachable_and_one_that_ends_is_not(scene: Scene) -> None:
    line = json.dumps(event("a")).encode() + b"\n"

    async def cut(connection: Connection) -> None:
        with pytest.raises(Unreachable):
            await watched(connection)

    async def ended(connection: Connection) -> None:
        assert len(await watched(connection)) == 1

    scene.play(streaming(line, line[:10], cut=True), cut)
    scene.play(streaming(line), ended)


def test_a_token_that_is_no_longer_good_is_read_again_and_the_request_repeated(scene: Scene) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.headers["Authorization"] == "Bearer secret":
            scene.write_kubeconfig(f"http://{request.host}", token="renewed")
            return status(401, "Unauthorized")
        return web.json_response({"metadata": {}})

    async def scenario(connection: Connection) -> None:
        asyncio.get_running_loop().time = after(3600)  # type: ignore[method-assign]
        found = await asyncio.gather(*(cluster(connection).get(CONFIG_MAP, KEY) for _ in range(3)))
        assert found == [{"metadata": {}}] * 3

    def after(seconds: float) -> Callable[[], float]:
        real = asyncio.get_running_loop().time
        return lambda: real() + seconds

    scene.play(answer, scenario)
    assert [asked.headers["Authorization"] for asked in scene.asked].count("Bearer renewed") == 3


def test_an_object_that_is_another_by_now_is_not_deleted_and_that_is_fine(scene: Scene) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.method == "DELETE":
            return status(409, "Conflict", "the UID in the precondition does not match")
        return web.json_response({"metadata": {"uid": "another"}})

    async def scenario(connection: Connection) -> None:
        await cluster(connection).delete(CONFIG_MAP, KEY, "mine")
        with pytest.raises(Conflict):
            await cluster(connection).delete(CONFIG_MAP, KEY, "another")

    scene.play(answer, scenario)


def test_requests_wait_for_their_turn_in_the_bucket() -> None:
    class Clock:
        """A connection that notes when it was used."""

        def __init__(self) -> None:
            self.times: list[float] = []

        async def send(self, *_: Any, **__: Any) -> Any:
            self.times.append(round(asyncio.get_running_loop().time(), 6))
            return {}

    async def main() -> None:
        clock: Any = Clock()
        there = KubernetesCluster(clock, TokenBucket(10, 2))
        await asyncio.gather(*(there.get(CONFIG_MAP, KEY) for _ in range(4)))
        assert clock.times == [0.0, 0.0, 0.1, 0.2]

    run_in_virtual_time(main())


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "is not there"),
        ("no: [yaml", "does not say how to reach a cluster"),
        ("{}", "does not say how to reach a cluster"),
        ('{"current-context": "x", "contexts": [], "clusters": [], "users": []}', "name x in"),
    ],
    ids=["no file", "no YAML", "nothing in it", "no such context"],
)
def test_a_kubeconfig_that_cannot_be_used_is_named_with_what_is_wrong(
    tmp_path: Path, text: str | None, said: str
) -> None:
    file = tmp_path / "kubeconfig"
    if text is not None:
        file.write_text(text, encoding="utf-8")

    async def main() -> None:
        async with connect(file):
            pass

    with pytest.raises(Unusable) as caught:
        asyncio.run(main())
    assert str(file) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("host", "proxy"),
    [
        ("https://api.example.com:6443", "http://proxy.example.com:3128"),
        ("https://10.96.0.1:443", None),
        ("http://127.0.0.1:8001", None),
    ],
)
def test_the_environments_proxy_is_used_where_no_proxy_does_not_except_the_server(
    host: str, proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example.com:3128")
    monkeypatch.setenv("NO_PROXY", "10.96.0.1,127.0.0.1")
    assert proxy_of_environment(host) == proxy
