"""A real Ray cluster of one node on loopback, with the dashboard that serves the Jobs API, for a test module."""

from __future__ import annotations

import os
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.processes import Started, reserved_ports, started, wait_until

__all__ = ["RayHead", "ray_head"]

_PORTS = (
    *("port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"),
    *("node-manager-port", "object-manager-port", "metrics-export-port", "ray-client-server-port"),
)


_SLOW = 400.0
"""Seconds that a loaded machine may take to import what a dashboard is made of."""


@dataclass(frozen=True)
class RayHead:
    """A running head. `folder` is its home: nothing of it is elsewhere."""

    process: Started
    url: str
    """Of the dashboard."""
    client_address: str
    """Of Ray Client."""
    folder: Path


@contextmanager
def ray_head(folder: Path) -> Iterator[RayHead]:
    """Starts it; what runs there ends with it."""
    scripts = Path(sys.executable).parent
    environment = {
        "HOME": str(folder),
        "PATH": f"{scripts}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "1",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "DS_ACCELERATOR": "cpu",
        "FINETUNE_CACHE": str(folder / "cache"),
    }
    with (
        reserved_ports(len(_PORTS)) as ports,
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as sockets,
    ):
        by_name = dict(zip(_PORTS, ports, strict=True))
        command = [
            *(scripts / "ray", "start", "--head", "--block", "--node-ip-address=127.0.0.1"),
            *("--include-dashboard=true", "--dashboard-host=127.0.0.1", "--disable-usage-stats"),
            *("--num-cpus=4", f"--object-store-memory={100 << 20}", f"--temp-dir={sockets}"),
            *(f"--{name}={port}" for name, port in by_name.items()),
        ]
        with started(command, folder / "ray.log", environment) as process:
            url = f"http://127.0.0.1:{by_name['dashboard-port']}"
            wait_until(lambda: _answers(f"{url}/api/jobs/"), "Ray's dashboard", process, seconds=_SLOW)
            family = psutil.Process(process.process.pid)
            try:
                yield RayHead(process, url, f"ray://127.0.0.1:{by_name['ray-client-server-port']}", folder)
            finally:
                daemons = family.children(recursive=True)
                process.stop()
                _end(daemons)


def _end(daemons: list[psutil.Process]) -> None:
    """What Ray has left of itself."""
    for one in psutil.wait_procs(daemons, timeout=5)[1]:
        with suppress(psutil.Error):
            one.kill()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False
