"""A real Kubernetes API server on loopback, with its etcd, for a test session; and a client for it.

Nothing but these two runs: objects are judged and stored, no controller acts on them.
"""

from __future__ import annotations

import json
import secrets
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ApiError", "Client", "control_plane", "wait_until"]

_READY_SECONDS = 120
"""A loaded machine is slow; an idle one needs about four seconds."""
_STOP_SECONDS = 20


class ApiError(Exception):
    """The server refused: `code` is the HTTP status, `causes` are pairs of (field, sentence)."""

    def __init__(self, code: int, status: dict[str, Any]) -> None:
        self.code = code
        self.message = str(status.get("message", status))
        listed = (status.get("details") or {}).get("causes") or []
        self.causes = [(cause.get("field", ""), cause.get("message", "")) for cause in listed]
        super().__init__(f"{code}: {self.message}")


@dataclass(frozen=True)
class Client:
    """JSON requests to one API server, as an administrator."""

    url: str
    token: str
    tls: ssl.SSLContext

    def get(self, path: str, accept: str = "application/json") -> Any:
        """The object or list at `path`."""
        return self.request("GET", path, accept=accept)

    def create(self, path: str, body: dict[str, Any]) -> Any:
        """The object as the server stored it (or would, with ?dryRun=All)."""
        return self.request("POST", path, body)

    def replace(self, path: str, body: dict[str, Any]) -> Any:
        """PUT: the whole object, resourceVersion included."""
        return self.request("PUT", path, body)

    def merge(self, path: str, body: dict[str, Any]) -> Any:
        """PATCH by JSON merge patch: what `body` leaves out stays, null removes."""
        return self.request("PATCH", path, body, content_type="application/merge-patch+json")

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Any:
        """Raises ApiError for every answer of 400 and above."""
        headers = {"Authorization": f"Bearer {self.token}", "Accept": accept, "Content-Type": content_type}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, context=self.tls, timeout=60) as answer:
                text = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, _status(error.read().decode())) from None
        return json.loads(text) if text[:1] in "{[" else text


@contextmanager
def control_plane(etcd: Path, kube_apiserver: Path, folder: Path) -> Iterator[Client]:
    """Starts both programs with their files below `folder`, waits until they serve, ends them afterwards."""
    token, (storage, peers, port) = secrets.token_hex(16), _free_ports(3)
    (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n", encoding="utf-8")
    storage_command = _etcd_command(etcd, folder, f"http://127.0.0.1:{storage}", f"http://127.0.0.1:{peers}")
    server_command = _apiserver_command(kube_apiserver, folder, f"http://127.0.0.1:{storage}", port)
    with (
        _process(storage_command, folder / "etcd.log") as first,
        _process(server_command, folder / "api.log") as second,
    ):
        certificate = folder / "certificates" / "apiserver.crt"
        # The key is written after the certificate, which is then complete.
        wait_until(certificate.with_suffix(".key").exists, "the API server's certificate", first, second)
        client = Client(f"https://127.0.0.1:{port}", token, ssl.create_default_context(cafile=str(certificate)))
        wait_until(lambda: _ready(client), "the API server to be ready", first, second)
        yield client


def wait_until(holds: Callable[[], object], what: str, *started: _Started) -> None:
    """Waits for `holds`.

    AssertionError, with the logs, when it takes too long or one of the `started` processes ends.
    """
    deadline = time.monotonic() + _READY_SECONDS
    while not holds():
        ended = [one for one in started if one.process.poll() is not None]
        if ended or time.monotonic() > deadline:
            logs = "\n".join(f"{one.log.name}:\n{one.last_lines()}" for one in ended or started)
            raise AssertionError(f"{'a process ended while' if ended else 'too long'} waiting for {what}\n{logs}")
        time.sleep(0.05)


@dataclass(frozen=True)
class _Started:
    """A process of ours and what it says."""

    process: subprocess.Popen[bytes]
    log: Path

    def last_lines(self) -> str:
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-30:])


def _etcd_command(etcd: Path, folder: Path, clients: str, peers: str) -> list[str]:
    return [
        str(etcd),
        f"--data-dir={folder / 'etcd'}",
        f"--listen-client-urls={clients}",
        f"--advertise-client-urls={clients}",
        f"--listen-peer-urls={peers}",
        f"--initial-advertise-peer-urls={peers}",
        f"--initial-cluster=default={peers}",
        "--unsafe-no-fsync",  # nothing here outlives the session
        "--log-level=warn",
    ]


def _apiserver_command(program: Path, folder: Path, storage: str, port: int) -> list[str]:
    certificates = folder / "certificates"
    return [
        str(program),
        f"--etcd-servers={storage}",
        "--bind-address=127.0.0.1",
        "--advertise-address=127.0.0.1",
        "--endpoint-reconciler-type=none",  # Endpoints cannot hold a loopback address; nobody reads them
        f"--secure-port={port}",
        # The server makes itself a key and a certificate here before it reads the files below, so that
        # the same key can sign service account tokens and nothing has to be made beforehand.
        f"--cert-dir={certificates}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={certificates / 'apiserver.crt'}",
        f"--service-account-signing-key-file={certificates / 'apiserver.key'}",
        f"--token-auth-file={folder / 'tokens.csv'}",
        "--authorization-mode=RBAC",
        "--service-cluster-ip-range=10.0.0.0/24",
    ]


@contextmanager
def _process(command: list[str], log: Path) -> Iterator[_Started]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield _Started(process, log)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(client: Client) -> bool:
    """Ready, and the default namespace is there, which comes a moment later."""
    try:
        return client.get("/readyz") == "ok" and bool(client.get("/api/v1/namespaces/default"))
    except (ApiError, OSError):
        return False


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [taken.getsockname()[1] for taken in sockets]


def _status(text: str) -> dict[str, Any]:
    """A Kubernetes Status; the few answers that are none become one."""
    try:
        status = json.loads(text)
    except ValueError:
        status = None
    return status if isinstance(status, dict) else {"message": text.strip()}
