"""Progress and outcome on their way into the job's ConfigMap, where the operator sees them.

Made by `FileSink` in the driver and in every worker; only the driver and rank 0 ever report, so only they connect. It
is on inside a pod that the operator has started: FINETUNE_PROGRESS_CONFIGMAP and FINETUNE_NAMESPACE are set and a
service account's token is mounted. Elsewhere there is no such sink.

Reporting never holds training up and never ends it: a thread of its own writes the newest report, at most every 15
seconds unless the stage is new. What could not be written is logged once and goes with the next report. Only the
outcome, which is the last word, waits until it is written, for half a minute at most.

The operator has no other way to the trainers either. It writes the number of an attempt that should save and stop into
the same ConfigMap, and the API server answers each patch with the whole of it: so rank 0 learns of the wish with its
next report, without any right to read or to watch.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import ssl
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from finetune_api.progress import Outcome, Progress, Stage

__all__ = ["ClusterSink", "Mailbox", "cluster_sink"]

MIN_INTERVAL_SECONDS = 15.0
OUTCOME_WAITS_SECONDS = (0.0, 1.0, 2.0, 4.0, 8.0)
"""Before each try to write the outcome; with the timeouts of the tries about 40 seconds at the worst."""
TIMEOUT_SECONDS = 5.0
STOP_KEY = "stop-attempt"
"""Number of the attempt that is asked to save a checkpoint and to stop; the operator's key."""
ACCOUNT_FOLDER = Path("/var/run/secrets/kubernetes.io/serviceaccount")

logger = logging.getLogger(__name__)


class Mailbox:
    """The newest report, and when it is due. Holds no clock: the time is passed in, in seconds."""

    def __init__(self, interval: float = MIN_INTERVAL_SECONDS) -> None:
        self._interval = interval
        self._report: Progress | None = None
        self._is_new_stage = False
        self._last_stage: Stage | None = None
        self._last_time = float("-inf")

    def put(self, report: Progress) -> None:
        """Takes the place of a report that was not taken yet."""
        self._is_new_stage = self._is_new_stage or report.stage is not self._last_stage
        self._last_stage = report.stage
        self._report = report

    def wait(self, now: float) -> float | None:
        """Seconds until there is something to take; None while nothing is there."""
        if self._report is None:
            return None
        return 0.0 if self._is_new_stage else max(0.0, self._last_time + self._interval - now)

    def take(self, now: float) -> Progress | None:
        """The report, if it is due."""
        if self.wait(now) != 0.0:
            return None
        report, self._report = self._report, None
        self._is_new_stage, self._last_time = False, now
        return report


class ClusterSink:
    """Writes into one ConfigMap by merge patches."""

    def __init__(
        self,
        url: str,
        attempt: str,
        account: Path,
        clock: Callable[[], float] = time.monotonic,
        on_stop: Callable[[], None] = lambda: None,
    ) -> None:
        """`url` is the ConfigMap's own; `account` the folder with `token` and `ca.crt`.

        `on_stop` is called, in a thread of the sink's, when the operator wants this attempt to stop; perhaps twice.
        """
        self._url = url
        self._attempt = attempt
        self._account = account
        self._clock = clock
        self._on_stop = on_stop
        self._mailbox = Mailbox()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._is_failing = False

    def report(self, progress: Progress) -> None:
        """Have `progress` written when it is due; returns at once."""
        with self._changed:
            if self._is_closed:
                return
            self._mailbox.put(progress)
            if self._thread is None:
                self._thread = threading.Thread(target=self._write_reports, name="progress", daemon=True)
                self._thread.start()
            self._changed.notify()

    def begin(self) -> None:
        """The attempt starts: what was said before holds no longer. That may be this attempt's own, which a queue has
        stopped and let go again, or an earlier one's, which went on for a while after its head was gone."""
        self._write({"attempt": self._attempt, "progress.json": None, "outcome.json": None})

    def finish(self, outcome: Outcome, waits: Sequence[float] = OUTCOME_WAITS_SECONDS) -> bool:
        """Write the outcome and report nothing any more. False when it could not be written."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join(2 * TIMEOUT_SECONDS)  # so that no report arrives after the outcome
        said = {"attempt": self._attempt, "outcome-attempt": self._attempt, "outcome.json": _json(outcome)}
        for seconds in waits:
            time.sleep(seconds)
            if self._write(said):
                return True
        return False

    def _write_reports(self) -> None:
        while True:
            with self._changed:
                while (report := self._mailbox.take(self._clock())) is None:
                    if self._is_closed:
                        return
                    self._changed.wait(self._mailbox.wait(self._clock()))
            self._write({"attempt": self._attempt, "progress.json": _json(report)})

    def _write(self, data: Mapping[str, str | None]) -> bool:
        """One patch. What goes wrong is logged when it begins to, and when it has passed."""
        try:
            answer = self._patch(json.dumps({"data": data}).encode())
        except (OSError, ValueError, http.client.HTTPException) as error:
            if not self._is_failing:
                logger.warning("Progress cannot be written to %s: %s. Training goes on.", self._url, error)
            self._is_failing = True
            return False
        if self._is_failing:
            logger.info("Progress can be written again.")
        self._is_failing = False
        self._obey(answer)
        return True

    def _obey(self, answer: bytes) -> None:
        """Stops the run if the ConfigMap, as it now is, says so. An answer that says something else is no order."""
        try:
            wanted = json.loads(answer)["data"][STOP_KEY]
        except (ValueError, KeyError, TypeError):
            return
        if wanted == self._attempt:
            try:
                self._on_stop()
            except OSError as error:
                logger.warning("The run was asked to stop, and cannot be told: %s", error)

    def _patch(self, body: bytes) -> bytes:
        """The ConfigMap as the patch has made it.

        Token and authority are read anew: the kubelet renews them while the pod runs.
        """
        request = urllib.request.Request(
            self._url,
            data=body,
            method="PATCH",
            headers={
                "Authorization": f"Bearer {(self._account / 'token').read_text().strip()}",
                "Content-Type": "application/merge-patch+json",
            },
        )
        handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]  # the way out is not the way in
        if self._url.startswith("https:"):
            context = ssl.create_default_context(cafile=str(self._account / "ca.crt"))
            handlers.append(urllib.request.HTTPSHandler(context=context))
        with urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT_SECONDS) as answer:
            content: bytes = answer.read()
        return content


def cluster_sink(
    environment: Mapping[str, str] | None = None,
    account: Path = ACCOUNT_FOLDER,
    on_stop: Callable[[], None] = lambda: None,
) -> ClusterSink | None:
    """The sink of this pod; None where there is nothing to report to."""
    environment = os.environ if environment is None else environment
    name, namespace = environment.get("FINETUNE_PROGRESS_CONFIGMAP"), environment.get("FINETUNE_NAMESPACE")
    host, port = environment.get("KUBERNETES_SERVICE_HOST"), environment.get("KUBERNETES_SERVICE_PORT", "443")
    if not (name and namespace and host and (account / "token").is_file()):
        return None
    host = f"[{host}]" if ":" in host else host
    url = f"https://{host}:{port}/api/v1/namespaces/{namespace}/configmaps/{name}?fieldManager=finetune-trainers"
    return ClusterSink(url, environment.get("FINETUNE_ATTEMPT", "1"), account, on_stop=on_stop)


def _json(said: Progress | Outcome) -> str:
    return said.model_dump_json(by_alias=True, exclude_none=True)
