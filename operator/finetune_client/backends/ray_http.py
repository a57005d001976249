"""Ray's Jobs API over HTTP: what is asked of a dashboard, and how its refusals read.

Used by the backend for Ray jobs. Ray's own client would do, but for its import of all of Ray, which takes seconds and
must fit the version of the cluster; these few requests have been the same in every Ray 2.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_client.backends.ray_tail import tail
from finetune_client.errors import ClientError, NoSuchJob, NotAllowed, Refused, Unreachable

__all__ = ["RAY_OVER", "RayJobInfo", "RayJobsApi"]

RAY_OVER = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_SECONDS = 30.0
_TAKEN = "already exists"
_NO_AGENT = "No available agent"
_AGENT_WAITS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 30.0, 30.0)
"""Seconds between tries: a head that has just started answers before the program that starts jobs for it is there."""


@dataclass(frozen=True)
class RayJobInfo:
    """A job of Ray's, as its dashboard tells."""

    id: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    message: str
    metadata: dict[str, str]
    started_ms: int | None
    ended_ms: int | None

    @property
    def is_over(self) -> bool:
        """Its command has ended."""
        return self.status in RAY_OVER


class RayJobsApi:
    """One dashboard. Every method but `tail` blocks."""

    def __init__(self, url: str) -> None:
        """`url` is the dashboard's, such as http://127.0.0.1:8265."""
        self.url = url.rstrip("/")

    def submit(self, id: str, entrypoint: str, variables: dict[str, str], metadata: dict[str, str]) -> None:
        """Start a command on the head. Raises FileExistsError when the id is taken."""
        body = {
            "submission_id": id,
            "entrypoint": entrypoint,
            "runtime_env": {"env_vars": variables},
            "metadata": metadata,
        }
        for wait in (*_AGENT_WAITS, None):
            try:
                self._ask("POST", "/api/jobs/", body)
            except Refused as error:
                if _TAKEN in str(error):
                    raise FileExistsError(id) from error
                if _NO_AGENT not in str(error) or wait is None:
                    raise
                time.sleep(wait)
            else:
                return

    def jobs(self) -> list[RayJobInfo]:
        """Every job that was submitted, whoever did."""
        return [_info(one) for one in json.loads(self._ask("GET", "/api/jobs/")) if one.get("submission_id")]

    def job(self, id: str) -> RayJobInfo:
        """One job. Raises NoSuchJob."""
        return _info(json.loads(self._ask("GET", f"/api/jobs/{_quoted(id)}")))

    def output(self, id: str) -> str:
        """All that its command has printed."""
        return str(json.loads(self._ask("GET", f"/api/jobs/{_quoted(id)}/logs"))["logs"])

    def tail(self, id: str) -> AsyncGenerator[str]:
        """The same from the beginning, and what comes, until the command ends or the connection does."""
        return tail(f"{self.url}/api/jobs/{_quoted(id)}/logs/tail", _authorization())

    def last_output(self, id: str, lines: int) -> str:
        """The last lines of it."""
        query = urllib.parse.urlencode({"submission_id": id, "lines": lines})
        try:
            return self._ask("GET", f"/api/v0/logs/file?{query}").decode(errors="replace")
        except (Refused, NoSuchJob):
            return self.output(id)  # a job that has not begun has no file yet

    def stop(self, id: str) -> None:
        """Ask the command to end, and see to it."""
        self._ask("POST", f"/api/jobs/{_quoted(id)}/stop")

    def delete(self, id: str) -> None:
        """Forget a job that is over."""
        self._ask("DELETE", f"/api/jobs/{_quoted(id)}")

    def _ask(self, method: str, path: str, body: Any = None) -> bytes:
        headers = {"User-Agent": "finetune", **_authorization()}
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        try:
            request = urllib.request.Request(self.url + path, data, headers, method=method)
            with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
                told: bytes = answer.read()
                return told
        except urllib.error.HTTPError as error:
            raise self._refusal(error) from error
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or error
            raise Unreachable(
                f"{self.url} does not answer: {reason}. It must be the address of a Ray dashboard, such as "
                "http://HEAD:8265; of a cluster in Kubernetes: kubectl port-forward service/NAME-head-svc 8265"
            ) from error

    def _refusal(self, error: urllib.error.HTTPError) -> ClientError:
        told = error.read().decode(errors="replace").strip()
        last = told.splitlines()[-1] if told else error.reason
        if error.code in (401, 403):
            return NotAllowed(f"Ray at {self.url} asks for a token; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH: {last}")
        if error.code == 404:
            return NoSuchJob(f"Ray at {self.url}: {last}")
        return Refused(f"Ray at {self.url} would not do it: {last}")


def _authorization() -> dict[str, str]:
    """As Ray's own programs find their token."""
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if not token and file.is_file():
        token = file.read_text(encoding="utf-8")
    return {"Authorization": f"Bearer {token.strip()}"} if token.strip() else {}


def _info(document: dict[str, Any]) -> RayJobInfo:
    return RayJobInfo(
        str(document["submission_id"]),
        str(document["status"]),
        str(document.get("message") or ""),
        document.get("metadata") or {},
        document.get("start_time"),
        document.get("end_time"),
    )


def _quoted(text: str) -> str:
    return urllib.parse.quote(text, safe="")
