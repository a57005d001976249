"""A real S3 server on this machine: versitygw over a folder. Used by tests of checkpoints and of sources in buckets."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.processes import Started, reserved_ports, started, wait_until

__all__ = ["S3", "s3_server"]

REGION = "us-east-1"


@dataclass(frozen=True)
class S3:
    """A server and the keys of its administrator."""

    endpoint: str
    access_key: str
    secret_key: str
    folder: Path
    """Buckets are folders in it, objects are files: a test can damage what a client cannot."""
    process: Started

    def bucket(self) -> str:
        """A new bucket's name."""
        name = f"bucket-{secrets.token_hex(4)}"
        (self.folder / name).mkdir()
        return name

    def options(self) -> dict[str, Any]:
        """What obstore's S3Store needs to find the server."""
        return {
            "endpoint": self.endpoint,
            "access_key_id": self.access_key,
            "secret_access_key": self.secret_key,
            "region": REGION,
            "virtual_hosted_style_request": False,
        }

    def environment(self) -> dict[str, str]:
        """The same for programs that read the variables of AWS."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
        }


@contextmanager
def s3_server(versitygw: Path, folder: Path, address: str = "127.0.0.1") -> Iterator[S3]:
    """Starts the program with buckets below `folder`, waits until it listens at `address`, ends it afterwards."""
    access, secret, buckets = secrets.token_hex(8), secrets.token_hex(16), folder / "buckets"
    buckets.mkdir()
    with reserved_ports(1) as (port,):
        command = [versitygw, "--port", f"{address}:{port}", "posix", buckets]
        keys = {"ROOT_ACCESS_KEY": access, "ROOT_SECRET_KEY": secret}
        with started(command, folder / "versitygw.log", keys) as process:
            wait_until(lambda: _listens(address, port), "the S3 server to listen", process)
            yield S3(f"http://{address}:{port}", access, secret, buckets, process)


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1).close()
    except OSError:
        return False
    return True
