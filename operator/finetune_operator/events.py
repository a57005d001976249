"""Events on a job: what `kubectl describe` lists below it. Best effort, by nature and by design.

The reconcile pass records them after the status that they speak of was written. What is said again within ten
minutes becomes a higher count instead of another Event.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from finetune_operator.cluster.protocol import FIELD_MANAGER, Cluster, Document
from finetune_operator.errors import ClusterError, NotFound
from finetune_operator.kinds import EVENT, FINETUNE_JOB, Key
from finetune_operator.times import written

__all__ = ["EventRecorder"]

_SAME_FOR = timedelta(minutes=10)
_REMEMBERED = 4096
_LONGEST_MESSAGE = 1024  # the API server refuses more
_log = logging.getLogger(__name__)


@dataclass
class _Said:
    name: str
    count: int
    at: datetime


class EventRecorder:
    """Writes Events about jobs."""

    def __init__(self, cluster: Cluster, clock: Callable[[], datetime], instance: str) -> None:
        """`instance` is the replica that reports."""
        self._cluster = cluster
        self._clock = clock
        self._instance = instance
        self._said: OrderedDict[tuple[str, str, str, str], _Said] = OrderedDict()

    async def record(self, job: Document, type: Literal["Normal", "Warning"], reason: str, message: str) -> None:
        """Never raises: a job does not fail because nobody could be told."""
        message = message[:_LONGEST_MESSAGE]
        now = self._clock()
        what = (str(job["metadata"].get("uid", "")), type, reason, message)
        said = self._said.get(what)
        try:
            if said is not None and now - said.at < _SAME_FOR and await self._said_again(job, said, now):
                self._said.move_to_end(what)
                return
            event = self._event(job, type, reason, message, now)
            await self._cluster.create(EVENT, event)
        except ClusterError as error:
            _log.warning("event %s is lost: %s", reason, error)
            return
        self._said[what] = _Said(event["metadata"]["name"], 1, now)
        while len(self._said) > _REMEMBERED:
            self._said.popitem(last=False)

    async def _said_again(self, job: Document, said: _Said, now: datetime) -> bool:
        """False where the Event is no longer there: they live for an hour, or until somebody tidies up."""
        patch = {"count": said.count + 1, "lastTimestamp": written(now)}
        try:
            await self._cluster.merge(EVENT, Key(job["metadata"].get("namespace", ""), said.name), patch)
        except NotFound:
            return False
        said.count += 1
        said.at = now
        return True

    def _event(self, job: Document, type: str, reason: str, message: str, now: datetime) -> dict[str, Any]:
        metadata = job["metadata"]
        namespace, uid = metadata.get("namespace", ""), metadata.get("uid", "")
        # The same words at the same moment by the same replica are the same Event.
        digest = hashlib.sha256(f"{uid}{type}{reason}{message}{now.isoformat()}{self._instance}".encode())
        return {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.name,
            "metadata": {"name": f"{metadata['name']}.{digest.hexdigest()[:16]}", "namespace": namespace},
            "involvedObject": {
                "apiVersion": FINETUNE_JOB.api_version,
                "kind": FINETUNE_JOB.name,
                "namespace": namespace,
                "name": metadata["name"],
                "uid": uid,
            },
            "type": type,
            "reason": reason,
            "message": message,
            "count": 1,
            "firstTimestamp": written(now),
            "lastTimestamp": written(now),
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "reportingInstance": self._instance,
        }
