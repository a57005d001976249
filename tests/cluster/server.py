"""A real Kubernetes API server on loopback, with its etcd, for a test session.

Nothing but these two runs: objects are judged and stored, no controller acts on them. tests.cluster.controllers
has those that do.
"""

from __future__ import annotations

import secrets
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from tests.cluster.client import ApiError, Client, write_kubeconfig
from tests.cluster.processes import reserved_ports, started, wait_until

__all__ = ["Server", "control_plane"]


@dataclass(frozen=True)
class Server:
    """An API server that answers, and how to reach it as an administrator.

    `ca_file` and `key_file` are the server's own certificate, which is good for 127.0.0.1 and signed by the
    authority in the same file. What else serves TLS on loopback in a test uses them too, so that one `ca_file` is
    enough for every client. The same key signs service account tokens.
    """

    url: str
    token: str
    ca_file: Path
    key_file: Path
    folder: Path

    @cached_property
    def client(self) -> Client:
        return Client(self.url, self.token, ssl.create_default_context(cafile=str(self.ca_file)))

    @cached_property
    def kubeconfig(self) -> Path:
        """A file for programs; each address has its own."""
        name = f"{self.url.rpartition(':')[2]}.kubeconfig"
        return write_kubeconfig(self.folder / name, self.url, self.token, self.ca_file)

    def at(self, url: str) -> Server:
        """The same server behind another address: a proxy's."""
        return replace(self, url=url)

    def kubeconfig_of(self, namespace: str, service_account: str) -> Path:
        """A file for a program that may do only what this service account may; good for an hour."""
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{service_account}/token"
        asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        token = self.client.create(path, asked)["status"]["token"]
        port = self.url.rpartition(":")[2]
        file = self.folder / f"{port}-{namespace}-{service_account}.kubeconfig"
        return write_kubeconfig(file, self.url, token, self.ca_file)


@contextmanager
def control_plane(etcd: Path, kube_apiserver: Path, folder: Path) -> Iterator[Server]:
    """Starts both programs with their files below `folder`, waits until they serve, ends them afterwards."""
    token, certificate = secrets.token_hex(16), folder / "certificates" / "apiserver.crt"
    (folder / "tokens.csv").write_text(f"{token},admin,admin,system:masters\n", encoding="utf-8")
    with reserved_ports(3) as (storage, peers, port):
        storage_command = _etcd_command(etcd, folder, f"http://127.0.0.1:{storage}", f"http://127.0.0.1:{peers}")
        server_command = _apiserver_command(kube_apiserver, folder, f"http://127.0.0.1:{storage}", port)
        with (
            started(storage_command, folder / "etcd.log") as first,
            # A large heap of schemas, walked again for every few megabytes of requests, is a fifth of its work.
            started(server_command, folder / "api.log", {"GOGC": "400"}) as second,
        ):
            # The key is written after the certificate, which is then complete.
            key = certificate.with_suffix(".key")
            wait_until(key.exists, "the API server's certificate", first, second)
            server = Server(f"https://127.0.0.1:{port}", token, certificate, key, folder)
            wait_until(lambda: _ready(server.client), "the API server to be ready", first, second)
            yield server


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
        "--service-cluster-ip-range=10.0.0.0/16",
    ]


def _ready(client: Client) -> bool:
    """Ready, and the default namespace is there, which comes a moment later."""
    try:
        return client.get("/readyz") == "ok" and bool(client.get("/api/v1/namespaces/default"))
    except (ApiError, OSError):
        return False
