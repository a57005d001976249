"""The test cluster is what scenarios take it for: objects are acted on as in a cluster, and nothing else happens."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from finetune_operator.cluster.connection import connect
from tests.cluster.client import ApiError, Client
from tests.cluster.faults import Faults, Refuse
from tests.cluster.pods import Kwok, end_pod
from tests.cluster.processes import Started, wait_until
from tests.cluster.server import Server
from tests.cluster.tools import Tool, ToolFailed, kubectl_tool

pytestmark = pytest.mark.control_plane


def config_map(name: str, owner: dict[str, Any] | None = None) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name}
    if owner is not None:
        reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": owner["metadata"]["name"]}
        metadata["ownerReferences"] = [reference | {"uid": owner["metadata"]["uid"]}]
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata}


def pod(name: str, **limits: str) -> dict[str, Any]:
    container = {"name": "main", "image": "none", "resources": {"limits": limits}}
    spec = {"containers": [container], "restartPolicy": "Never"}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def test_what_an_object_owned_goes_with_it(api: Client, namespace: str) -> None:
    path = f"/api/v1/namespaces/{namespace}/configmaps"
    owner = api.create(path, config_map("owner"))
    api.create(path, config_map("owned", owner))
    api.delete(f"{path}/owner")
    wait_until(lambda: api.find(f"{path}/owned") is None, "the owned object to be collected")


def test_a_deleted_namespace_ends_with_all_that_is_in_it(api: Client, namespace: str) -> None:
    api.create(f"/api/v1/namespaces/{namespace}/configmaps", config_map("inside"))
    api.delete(f"/api/v1/namespaces/{namespace}")
    wait_until(lambda: api.find(f"/api/v1/namespaces/{namespace}") is None, "the namespace to be gone")


def test_a_program_may_do_what_its_service_account_may(
    api: Client, server: Server, namespace: str, kubectl: Tool, tmp_path: Path
) -> None:
    as_account = kubectl_tool(kubectl.program, server.kubeconfig_of(namespace, "default"), tmp_path)
    with pytest.raises(ToolFailed, match=f"system:serviceaccount:{namespace}:default"):
        as_account("get", "secrets", "-n", namespace)


def test_pods_run_where_there_is_room_and_end_as_they_are_told(api: Client, namespace: str, nodes: Kwok) -> None:
    path = f"/api/v1/namespaces/{namespace}/pods"
    api.create(path, pod("fits", **{"nvidia.com/gpu": "8"}))
    api.create(path, pod("too-large", **{"nvidia.com/gpu": "9"}))
    wait_until(lambda: api.get(f"{path}/fits")["status"]["phase"] == "Running", "the pod to run", nodes.process)
    wait_until(lambda: api.get(f"{path}/too-large")["status"].get("conditions"), "the scheduler's verdict")
    (verdict,) = api.get(f"{path}/too-large")["status"]["conditions"]
    assert verdict["reason"] == "Unschedulable"
    end_pod(api, namespace, "fits", exit_code=137, reason="OOMKilled")
    ended = api.get(f"{path}/fits")["status"]
    assert ended["phase"] == "Failed"
    assert ended["containerStatuses"][0]["state"]["terminated"]["reason"] == "OOMKilled"


def test_a_program_goes_through_the_proxy_and_is_counted(
    faults: Faults, kubectl: Tool, namespace: str, tmp_path: Path
) -> None:
    through = kubectl_tool(kubectl.program, faults.kubeconfig, tmp_path)
    through("create", "configmap", "first", "-n", namespace)
    assert [(asked.verb, asked.resource, asked.namespace) for asked in faults.writes()] == [
        ("create", "configmaps", namespace)
    ]
    with faults.rule(Refuse(403, message="not today"), verb="write"), pytest.raises(ToolFailed, match="not today"):
        through("create", "configmap", "second", "-n", namespace)
    assert through("get", "configmaps", "-n", namespace, "-o", "name").split()[-1] == "configmap/first"


def test_an_outage_takes_a_connection_along_that_is_still_being_made(faults: Faults) -> None:
    said, heard = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context(cafile=str(faults.server.ca_file)).wrap_bio(
        heard, said, server_hostname="127.0.0.1"
    )
    address = urlsplit(faults.url)
    with socket.create_connection((address.hostname, address.port), timeout=30) as wire:
        with suppress(ssl.SSLWantReadError):
            tls.do_handshake()
        wire.sendall(said.read())
        heard.write(wire.recv(1 << 16))
        with faults.outage():
            with suppress(ssl.SSLWantReadError):
                tls.do_handshake()
                tls.write(b"GET /version HTTP/1.1\r\nHost: here\r\n\r\n")
            with suppress(ConnectionResetError, BrokenPipeError):
                wire.sendall(said.read())
                while piece := wire.recv(1 << 16):
                    heard.write(piece)
            with pytest.raises(ssl.SSLWantReadError):
                tls.read()


def test_helm_installs_and_takes_back(helm: Tool, api: Client, namespace: str, tmp_path: Path) -> None:
    chart = tmp_path / "chart"
    (chart / "templates").mkdir(parents=True)
    (chart / "Chart.yaml").write_text("{apiVersion: v2, name: small, version: 0.1.0}")
    (chart / "templates" / "one.yaml").write_text(
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: {{ .Release.Name }}-one}}"
    )
    path = f"/api/v1/namespaces/{namespace}/configmaps/mine-one"
    helm("install", "mine", chart, "--namespace", namespace)
    assert api.find(path)
    helm("uninstall", "mine", "--namespace", namespace)
    assert api.find(path) is None


def test_the_client_raises_what_the_server_says(api: Client, controllers: Started) -> None:
    with pytest.raises(ApiError) as refused:
        api.get("/api/v1/namespaces/default/configmaps/absent")
    assert (refused.value.code, refused.value.reason) == (404, "NotFound")


def test_a_watch_that_is_left_early_leaves_no_socket_open(server: Server) -> None:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(server.ca_file, server.key_file)

    def answer_and_part_slowly(listening: socket.socket) -> None:
        with tls.wrap_socket(listening.accept()[0], server_side=True) as client:
            client.recv(1 << 16)
            client.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n{}\n\r\n")
            client.recv(1)
            time.sleep(0.2)

    def open_sockets(port: int) -> list[Any]:
        return [one for one in psutil.Process().net_connections("tcp") if getattr(one.raddr, "port", None) == port]

    async def look(port: int) -> None:
        async with connect(server.at(f"https://127.0.0.1:{port}").kubeconfig) as connection:
            lines = connection.lines("/api/v1/namespaces", {"watch": "true"})
            assert await anext(lines) == {}
            await lines.aclose()
        assert open_sockets(port) == []

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=answer_and_part_slowly, args=(listening,))
        thread.start()
        asyncio.run(look(listening.getsockname()[1]))
        thread.join()
