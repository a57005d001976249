"""JSON posted to a service over HTTP, with patience. Called by rewards that are a service, and by the AI judge.

What a header holds is told to nobody but the service, also where the service says it back. Redirects are not followed:
they would take it along.
"""

from __future__ import annotations

import http.client
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from email.message import Message as Headers
from typing import IO

from finetune_trainers.data.faults import clip
from finetune_trainers.errors import first_line

__all__ = ["NoAnswerError", "Poster", "variable_fault"]

_FIRST_WAIT_SECONDS = 0.5
_LONGEST_WAIT_SECONDS = 30.0
_MAX_BYTES = 64 << 20
_MAX_BYTES_OF_A_REFUSAL = 4000
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


def variable_fault(name: str, environment: Mapping[str, str] = os.environ) -> str | None:
    """Why what the environment variable `name` holds cannot be sent in a header; None where it can. Its contents are
    not told."""
    value = environment.get(name)
    if value is None:
        return f"the environment variable {name} is not set; set it, in a cluster by cluster.pods.env"
    if not value.strip() or not value.isascii() or not value.isprintable():
        return f"the environment variable {name} holds what no header can hold; it must be one line of ASCII"
    return None


class NoAnswerError(Exception):
    """A request that brought nothing. `status` is the service's, None where there was none, and `said` the beginning
    of what it told with it."""

    def __init__(
        self,
        message: str,
        try_again: bool = True,
        after_seconds: float = 0.0,
        status: int | None = None,
        said: str = "",
    ) -> None:
        super().__init__(message)
        self.try_again = try_again
        self.after_seconds = after_seconds
        self.status = status
        self.said = said


class Poster:
    """One address. Threads may share it."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        *,
        timeout_seconds: float,
        retries: int,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """`retries`: further attempts where there was no answer, or a status that passes, after longer and longer
        waits. `sleep` may raise, to end them."""
        self._url = url
        self._headers = {"Content-Type": "application/json", "Accept": "application/json", **headers}
        self._hidden = [
            part for value in headers.values() for part in (value, value.rpartition(" ")[2]) if len(part) > 3
        ]
        self._timeout = timeout_seconds
        self._retries = retries
        self._sleep = sleep
        self._opener = urllib.request.build_opener(_NoRedirects)

    def post(self, body: bytes) -> bytes:
        """The service's answer. Raises NoAnswerError after the last attempt."""
        wait = _FIRST_WAIT_SECONDS
        for attempt in range(self._retries + 1):
            try:
                return self._post_once(body)
            except NoAnswerError as error:
                if not error.try_again or attempt == self._retries:
                    raise
                self._sleep(min(max(wait, error.after_seconds), _LONGEST_WAIT_SECONDS))
                wait *= 2
        raise AssertionError("the last attempt returns or raises")

    def _post_once(self, body: bytes) -> bytes:
        request = urllib.request.Request(self._url, data=body, headers=self._headers, method="POST")
        deadline = time.monotonic() + self._timeout
        try:
            with self._opener.open(request, timeout=self._timeout) as response:
                return self._read(response, deadline)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except TimeoutError:
            raise NoAnswerError(f"the service took longer than {self._timeout:g} s") from None
        except (OSError, http.client.HTTPException) as error:  # URLError among them
            reason = getattr(error, "reason", error)
            told = first_line(reason) if isinstance(reason, Exception) else str(reason)
            raise NoAnswerError(f"the service cannot be reached: {type(reason).__name__}: {told}") from None

    def _refusal(self, error: urllib.error.HTTPError) -> NoAnswerError:
        after = error.headers.get("Retry-After", "")
        seconds = float(after) if after.isdecimal() else 0.0
        if 300 <= error.code < 400:
            message = f"the service answers {error.code} with another place, which is not gone to; name that"
            return NoAnswerError(message, False, status=error.code)
        try:
            said = self.without_secrets(error.read(_MAX_BYTES_OF_A_REFUSAL).decode(errors="replace").strip())
        except (OSError, http.client.HTTPException):
            said = ""
        more = f": {clip(said)}" if said else ""
        message = f"the service answers {error.code} {error.reason}{more}"
        return NoAnswerError(message, error.code in _TRY_AGAIN, seconds, error.code, said)

    def without_secrets(self, text: str) -> str:
        """What a service says, without the headers that it was sent."""
        for secret in self._hidden:
            text = text.replace(secret, "...")
        return text

    def _read(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        """The whole body; a socket's own timeout is for each piece of it."""
        body = bytearray()
        while piece := response.read1(1 << 16):
            body += piece
            if len(body) > _MAX_BYTES:
                raise NoAnswerError(f"the service answers more than {_MAX_BYTES >> 20} MiB", try_again=False)
            if time.monotonic() > deadline:
                raise NoAnswerError(f"the service took longer than {self._timeout:g} s")
        return bytes(body)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Headers, newurl: str
    ) -> None:
        return None
