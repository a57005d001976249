"""Kubernetes' own controllers and its scheduler, as processes beside a test's API server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.cluster.processes import Started, started, wait_until
from tests.cluster.server import Server

__all__ = ["CONTROLLERS", "kube_controller_manager", "kube_scheduler"]

CONTROLLERS = (
    "garbage-collector-controller",
    "job-controller",
    "namespace-controller",
    "serviceaccount-controller",
    "ttl-after-finished-controller",
)
"""What jobs and their children need. Nodes are fakes, which nobody has to watch over."""


@contextmanager
def kube_controller_manager(
    program: Path, server: Server, controllers: tuple[str, ...] = CONTROLLERS
) -> Iterator[Started]:
    """Runs `controllers`, and returns once namespaces are looked after.

    Start it when the custom resources that tests will delete are defined: the garbage collector looks for new kinds
    only every 30 seconds.
    """
    command = [
        program,
        f"--kubeconfig={server.kubeconfig}",
        f"--controllers={','.join(controllers)}",
        f"--service-account-private-key-file={server.key_file}",
        f"--root-ca-file={server.ca_file}",
        "--leader-elect=false",
        "--secure-port=0",  # nobody asks it anything
    ]
    account = "/api/v1/namespaces/default/serviceaccounts/default"
    with started(command, server.folder / "kube-controller-manager.log") as process:
        wait_until(lambda: server.client.find(account), "the first service account", process)
        yield process


@contextmanager
def kube_scheduler(program: Path, server: Server) -> Iterator[Started]:
    """Gives pods their nodes; it is ready when the first pod has one."""
    command = [program, f"--kubeconfig={server.kubeconfig}", "--leader-elect=false", "--secure-port=0"]
    with started(command, server.folder / "kube-scheduler.log") as process:
        yield process
