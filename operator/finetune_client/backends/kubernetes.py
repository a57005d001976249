"""Jobs as FineTuneJobs of a Kubernetes cluster, for which an operator works there.

Implements `Backend`. It speaks to the API server through the operator's own connection, as whoever the kubeconfig says:
what one may do is what that person may do with kubectl.
"""

from __future__ import annotations

import asyncio
import shlex
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from finetune_api.job import FineTuneJob
from finetune_api.problems import InvalidManifest
from finetune_api.runtime import FineTuneRuntime
from finetune_client.backends.kubeconfig import place_of
from finetune_client.backends.pod_logs import PodLogs
from finetune_client.backends.refusals import error_for
from finetune_client.documents import checked, document_of
from finetune_client.errors import NoSuchJob, NotAllowed, Unreachable
from finetune_client.views import JobEvent, JobView, LogChoice, LogLine
from finetune_operator.cluster.connection import Connection, connect
from finetune_operator.cluster.login import Unusable
from finetune_operator.errors import ApiError, ClusterError, Gone, TooManyRequests
from finetune_operator.errors import Unreachable as NoAnswer
from finetune_operator.kinds import EVENT, FINETUNE_JOB, Key
from finetune_operator.policies.dependencies import dependency_names, misfits
from finetune_operator.raw import items, text, version_of

__all__ = ["KubernetesBackend"]

Document = dict[str, Any]

_WRITTEN_BY_US = {"fieldManager": "finetune"}
_MERGE_PATCH = "application/merge-patch+json"
_PAGE = 500
_WATCH_SECONDS = 120
_SILENCE_SECONDS = _WATCH_SECONDS + 15.0
"""A server ends a watch in time; one that says nothing for longer is not there any more."""
_PATIENCE_SECONDS = 60.0
"""How long a watch goes on asking a server that does not answer."""
_LONGEST_DELAY = 5.0


class KubernetesBackend:
    """One cluster, in one namespace unless a job names another."""

    def __init__(self, connection: Connection, namespace: str, closing: AsyncExitStack, place: str = "") -> None:
        """Made by `open`."""
        self.place = place
        """See Backend."""
        self._connection = connection
        self._namespace = namespace
        self._closing = closing
        self._logs = PodLogs(connection, self._send)

    @classmethod
    async def open(cls, namespace: str | None, context: str | None, kubeconfig: Path | None) -> Self:
        """What is not said is as kubectl has it. Nothing is asked of the server yet. Raises Unreachable."""
        place = place_of(kubeconfig, context)
        closing = AsyncExitStack()
        try:
            connection = await closing.enter_async_context(connect(kubeconfig, place.context))
        except Unusable as error:
            other = (
                ""
                if kubeconfig or context
                else ". Without Kubernetes: --local is this machine, --ray URL a Ray cluster"
            )
            raise Unreachable(f"{error}{other}") from error
        named = {"--context": context, "--kubeconfig": kubeconfig}
        options = " ".join(f"{option} {shlex.quote(str(value))}" for option, value in named.items() if value)
        return cls(connection, namespace or place.namespace, closing, options)

    @property
    def namespace(self) -> str:
        """Of jobs that name none."""
        return self._namespace

    async def submit(self, job: FineTuneJob, runtimes: Sequence[FineTuneRuntime], dry_run: bool) -> JobView:
        """See Backend. The runtimes are the platform's, and stay as they are."""
        document = document_of(job)
        key = Key(self._namespace_for(document), job.metadata.name)
        document["metadata"]["namespace"] = key.namespace
        await self._check_models(document, key.namespace)
        query = _WRITTEN_BY_US | {"fieldValidation": "Strict"} | ({"dryRun": "All"} if dry_run else {})
        path = FINETUNE_JOB.path(key.namespace)
        return self._view(await self._send("POST", path, key, "create FineTuneJobs", query=query, body=document))

    async def get(self, key: Key) -> JobView:
        """See Backend."""
        return self._view(await self._send("GET", FINETUNE_JOB.path(*key), key, "read FineTuneJobs"))

    async def list(self, namespace: str | None) -> Sequence[JobView]:
        """See Backend."""
        path, here = FINETUNE_JOB.path(namespace), Key(namespace or "all namespaces", "")
        found: list[JobView] = []
        query = {"limit": str(_PAGE)}
        while True:
            page = await self._send("GET", path, here, "list FineTuneJobs", query=query)
            # The items of a list come without their kind.
            found += [self._view(_with_kind(item)) for item in items(page, "items")]
            token = text(page, "metadata", "continue")
            if not token:
                return sorted(found, key=lambda view: (view.namespace, view.name))
            query["continue"] = token

    async def watch(self, key: Key) -> AsyncGenerator[JobView]:
        """See Backend. A server that is away is asked again for a minute."""
        version, delay, patience = "", 0.0, _PATIENCE_SECONDS
        while True:
            try:
                if not version:
                    document = await self._connection.send("GET", FINETUNE_JOB.path(*key))
                    version = version_of(document)
                    yield self._view(document)
                # Closed here when it is left early: an answer that nobody has closed keeps its connection.
                async with aclosing(self._changes(key, version)) as changes:
                    async for document in changes:
                        version, delay, patience = version_of(document), 0.0, _PATIENCE_SECONDS
                        if document.get("kind") == FINETUNE_JOB.name and "spec" in document:
                            yield self._view(document)
            except Gone:
                version = ""
            except ClusterError as error:
                if patience <= 0 or not _passes(error):
                    raise error_for(error, self._connection.host, key, "watch FineTuneJobs", self.place) from error
                delay = min(_LONGEST_DELAY, max(0.2, delay * 2))
                patience -= delay
                await asyncio.sleep(delay)

    async def logs(self, key: Key, which: LogChoice, follow: bool) -> AsyncGenerator[LogLine]:
        """See Backend."""
        async with aclosing(self._logs.read(lambda: self.get(key), key, which, follow)) as lines:
            async for line in lines:
                yield line

    async def suspend(self, key: Key, value: bool) -> JobView:
        """See Backend."""
        path, patch = FINETUNE_JOB.path(*key), {"spec": {"suspend": value}}
        doing = "change FineTuneJobs"
        changed = await self._send(
            "PATCH", path, key, doing, query=_WRITTEN_BY_US, body=patch, content_type=_MERGE_PATCH
        )
        return self._view(changed)

    async def cancel(self, key: Key) -> None:
        """See Backend. The job is deleted; its artifacts and checkpoints stay."""
        await self._send("DELETE", FINETUNE_JOB.path(*key), key, "delete FineTuneJobs")

    async def events(self, key: Key) -> Sequence[JobEvent]:
        """See Backend."""
        selector = f"involvedObject.kind={FINETUNE_JOB.name},involvedObject.name={key.name}"
        path = EVENT.path(key.namespace)
        page = await self._send("GET", path, key, "read Events", query={"fieldSelector": selector})
        return sorted(map(_event, items(page, "items")), key=lambda event: (event.at is not None, event.at))

    async def close(self) -> None:
        """See Backend."""
        await self._closing.aclose()

    async def _check_models(self, document: Document, namespace: str) -> None:
        """Raises InvalidManifest where a job that is there is named, and its model will not do."""
        others = {name: await self._known(Key(namespace, name)) for name in dependency_names(document)}
        if unfit := misfits(document, others):
            raise InvalidManifest(unfit)

    async def _known(self, key: Key) -> Mapping[str, Any] | None:
        """A job as it stands; None for one that is not there yet or that this person may not read."""
        try:
            return (await self.get(checked(key))).document
        except (NoSuchJob, NotAllowed):
            return None

    async def _changes(self, key: Key, version: str) -> AsyncGenerator[Document]:
        """What a watch brings of one job, bookmarks included. NoSuchJob when it is deleted."""
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(_WATCH_SECONDS),
            "fieldSelector": f"metadata.name={key.name}",
        }
        path = FINETUNE_JOB.path(key.namespace)
        async with aclosing(self._connection.lines(path, query, _SILENCE_SECONDS)) as lines:
            async for event in lines:
                if event["type"] == "DELETED":
                    raise NoSuchJob(f"job {key.name} in namespace {key.namespace} was deleted")
                if event["type"] == "ERROR":
                    # The server has begun to answer and now gives up: the version is too old, more often than not.
                    raise Gone(410, "Expired", text(event["object"], "message"))
                yield event["object"]

    def _view(self, document: Document) -> JobView:
        return JobView.of(document, self.place)

    async def _send(self, method: str, path: str, key: Key, doing: str, **how: Any) -> Document:
        with self._explained(key, doing):
            answer: Document = await self._connection.send(method, path, **how)
            return answer

    @contextmanager
    def _explained(self, key: Key, doing: str) -> Iterator[None]:
        try:
            yield
        except ClusterError as error:
            raise error_for(error, self._connection.host, key, doing, self.place) from error

    def _namespace_for(self, document: Mapping[str, Any]) -> str:
        """The job's own namespace or the one that we are in; like kubectl, not two that differ."""
        return str(document["metadata"].get("namespace") or self._namespace)


def _passes(error: ClusterError) -> bool:
    """Whether waiting may help."""
    if isinstance(error, NoAnswer | TooManyRequests):
        return True
    return isinstance(error, ApiError) and error.status >= 500


def _with_kind(document: Document) -> Document:
    return {"apiVersion": FINETUNE_JOB.api_version, "kind": FINETUNE_JOB.name, **document}


def _event(document: Document) -> JobEvent:
    at = text(document, "lastTimestamp") or text(document, "eventTime") or text(document, "firstTimestamp")
    return JobEvent(
        datetime.fromisoformat(at.replace("Z", "+00:00")) if at else None,
        text(document, "type"),
        text(document, "reason"),
        text(document, "message"),
    )
