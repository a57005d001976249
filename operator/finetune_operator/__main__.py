"""The operator as a process: `python -m finetune_operator`, in a pod of its own or on a laptop with a kubeconfig.

Exit codes: 0 after SIGTERM or SIGINT; 1 when something broke; 2 for settings or a kubeconfig that cannot be used.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import uuid
from collections.abc import Coroutine, Sequence
from typing import Any

from finetune_operator import logs
from finetune_operator.cluster.connection import Connection, connect
from finetune_operator.cluster.kubernetes import KubernetesCluster, KubernetesLeases
from finetune_operator.cluster.login import Unusable
from finetune_operator.handlers import Operator
from finetune_operator.metrics import Metrics
from finetune_operator.runtime.leader import LeaderElector
from finetune_operator.runtime.limits import TokenBucket
from finetune_operator.server import Server
from finetune_operator.settings import InvalidSettings, Settings, read_settings

__all__ = ["main"]

_WIND_DOWN_SECONDS = 10.0
_log = logging.getLogger("finetune_operator")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs until it is told to stop; the exit code."""
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
    except InvalidSettings as error:
        print(error, file=sys.stderr)
        return 2
    logs.configure(settings.log_level.upper())
    try:
        return asyncio.run(run(settings))
    except Unusable as error:
        _log.error("%s", error)
        return 2
    except OSError as error:
        _log.error("cannot listen on %s:%s: %s", settings.metrics_host, settings.metrics_port, error)
        return 1


async def run(settings: Settings) -> int:
    """Works until SIGTERM or SIGINT, then hands over and ends."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    metrics = Metrics()
    async with connect(settings.kubeconfig, settings.context, metrics) as connection:
        cluster = KubernetesCluster(connection, TokenBucket(settings.qps, settings.burst))
        operator = Operator(cluster, settings, metrics)
        checks = {"watches": operator.unready}, {"workers": operator.stuck}
        async with Server(
            metrics, settings.metrics_host, settings.metrics_port, ready=checks[0], live=checks[1]
        ) as server:
            _log.info("%s serves metrics and health on port %s", settings.pod_name, server.port)
            return await _until(stop, _work(connection, operator, settings, metrics))


async def _work(connection: Connection, operator: Operator, settings: Settings, metrics: Metrics) -> None:
    """Watches on every replica, so that the next leader knows everything already; works on the one that leads."""
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(operator.watch(), name="watching")
        if not settings.leader_elect:
            await operator.work()
            return
        # A container that is restarted keeps its pod's name, and must not take itself for its predecessor.
        identity = f"{settings.pod_name}_{uuid.uuid4()}"
        where = settings.operator_namespace, settings.lease_name
        elector = LeaderElector(
            *(KubernetesLeases(connection, *where), settings.lease_name, settings.operator_namespace, identity),
            lease_seconds=settings.lease_seconds,
            renew_seconds=settings.lease_seconds * 2 / 3,
            retry_seconds=min(2.0, settings.lease_seconds / 7.5),
            metrics=metrics,
        )
        await elector.run(operator.work)


async def _until(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> int:
    """Lets `work` go on until `stop`, or until it breaks."""
    working = asyncio.create_task(work, name="working")
    stopping = asyncio.create_task(stop.wait(), name="waiting for a signal")
    await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if working.done():
        _log.error("the operator broke", exc_info=working.exception())
        return 1
    _log.info("stopping")
    working.cancel()
    _, left = await asyncio.wait((working,), timeout=_WIND_DOWN_SECONDS)
    if left:
        _log.warning("not everything ended within %.0f s", _WIND_DOWN_SECONDS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
