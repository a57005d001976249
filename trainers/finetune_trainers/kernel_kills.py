"""Processes that the kernel has killed because the memory of their container ran out. Used by `ray_workers`.

The kernel may kill one process of a container and leave the rest, and then no pod says OOMKilled, and Ray sees only
that a process is gone. The control group counts such kills: `oom_kill` in memory.events (version 2) or
memory.oom_control (version 1), in the kernel's documentation of control groups.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

__all__ = ["KernelKills", "kernel_kills", "kernel_kills_of_nodes"]

_GROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")
_ANSWER_SECONDS = 15.0
"""A node that does not answer by then may be gone, and the reason with it."""
_log = logging.getLogger(__name__)


def kernel_kills(groups: Path = _GROUPS, own: Path = _OWN) -> int:
    """How many processes of this one's control group have been killed for want of memory since the group is there;
    0 where that cannot be told. `groups` is where control groups are mounted, `own` says in which this process is."""
    for file in _counters(groups, own):
        with suppress(OSError, ValueError):
            figures = dict(line.split() for line in file.read_text().splitlines())
            if "oom_kill" in figures:
                return int(figures["oom_kill"])
    return 0


def _counters(groups: Path, own: Path) -> Iterator[Path]:
    """Where the count may be, the likeliest first. In a container the group that is mounted is often its own, though
    /proc calls it by the name that it has outside."""
    with suppress(OSError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                yield groups / path.lstrip("/") / "memory.events"
            elif "memory" in controllers.split(","):
                yield groups / "memory" / path.lstrip("/") / "memory.oom_control"
    yield groups / "memory.events"
    yield groups / "memory" / "memory.oom_control"


def kernel_kills_of_nodes(seconds: float = _ANSWER_SECONDS) -> dict[str, int]:
    """`kernel_kills` of each node of the Ray that this process is connected to, by the node's id; without those that do
    not answer within so many seconds."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    count = ray.remote(num_cpus=0, max_retries=0)(kernel_kills)
    nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"]]
    places = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
    asked = {count.options(scheduling_strategy=place).remote(): place.node_id for place in places}
    answered, silent = ray.wait(list(asked), num_returns=len(asked), timeout=seconds)
    for one in silent:
        ray.cancel(one)
    found = {}
    for one in answered:
        with suppress(Exception):  # it is gone after all
            found[asked[one]] = int(ray.get(one))
    return found


class KernelKills:
    """Tells whether there have been kills since it was last asked, or made."""

    def __init__(self, count: Callable[[], Mapping[str, int]], *, all_are_new: bool) -> None:
        """`count` gives the kills of each node. `all_are_new` where no node is older than this object, so that it need
        not be asked at the beginning."""
        self._count = count
        self._seen: dict[str, int] = {}
        if not all_are_new:
            self.any_new()

    def any_new(self) -> bool:
        """Never raises: where nobody can tell there are none. A node that was not there the last time counts whole,
        for its group began with it."""
        try:
            now = self._count()
        except Exception as error:  # it is asked when a run has failed, of a Ray that may have failed too
            _log.warning("whether the kernel has killed a process cannot be told: %s", error)
            return False
        new = any(kills > self._seen.get(node, 0) for node, kills in now.items())
        self._seen |= now
        return new
