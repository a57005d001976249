"""A Ray of several nodes on loopback, each of them daemons of its own, so that one can be lost and come back."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.cluster.processes import Started, reserved_ports, started, wait_until

__all__ = ["RayNode", "RayNodes", "ray_nodes"]

_OF_HEAD = ("port", "dashboard-port", "ray-client-server-port")
_OF_EACH = (
    *("node-manager-port", "object-manager-port", "metrics-export-port"),
    *("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "runtime-env-agent-port"),
)
_READY_SECONDS = 300.0
_ENVIRONMENT = {
    "PYTHONPATH": os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")))),
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class RayNode:
    """A node that runs workers."""

    process: Started

    def lose(self) -> None:
        """As a machine that loses its power: its raylet is killed, and what it had started ends with it."""
        for daemon in psutil.Process(self.process.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if daemon.name() == "raylet":
                    daemon.kill()


@dataclass(frozen=True)
class RayNodes:
    """A Ray whose head runs no workers. All of it ends with the `with` block."""

    address: str
    folder: Path
    sockets: str
    held: ExitStack

    def add(self, name: str) -> RayNode:
        """One more node, with room for one worker."""
        ports = self.held.enter_context(reserved_ports(len(_OF_EACH)))
        return RayNode(self._start(name, f"--address={self.address}", 1, zip(_OF_EACH, ports, strict=True)))

    def _start(self, name: str, role: str, num_cpus: int, ports: Iterator[tuple[str, int]]) -> Started:
        command = [
            *(sys.executable, "-m", "tests.trainers.patient_ray", "start", role, "--block", "--disable-usage-stats"),
            *("--node-ip-address=127.0.0.1", "--no-monitor", "--include-log-monitor=false"),
            *(f"--num-cpus={num_cpus}", "--num-gpus=0", f"--object-store-memory={80 << 20}"),
            *(f"--{port}={number}" for port, number in ports),
        ]
        if role == "--head":
            command += ["--include-dashboard=false", f"--temp-dir={self.sockets}"]
        process = self.held.enter_context(started(command, self.folder / f"{name}.log", _ENVIRONMENT))
        self.held.callback(_end, process)
        wait_until(lambda: "Ray runtime started." in process.said(), f"Ray's {name}", process, seconds=_READY_SECONDS)
        return process


@contextmanager
def ray_nodes(folder: Path) -> Iterator[RayNodes]:
    """Starts the head; `folder` takes the logs."""
    with (
        reserved_ports(len(_OF_HEAD) + len(_OF_EACH)) as ports,
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as sockets,
        ExitStack() as held,
    ):
        nodes = RayNodes(f"127.0.0.1:{ports[0]}", folder, sockets, held)
        nodes._start("head", "--head", 0, zip((*_OF_HEAD, *_OF_EACH), ports, strict=True))
        yield nodes


def _end(node: Started) -> None:
    """Daemons first: they would outlive what started them."""
    with suppress(psutil.NoSuchProcess):
        for daemon in psutil.Process(node.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                daemon.kill()
