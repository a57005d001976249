"""The judge, over HTTP, and its verdicts on disk. Called by `judging`.

    in     POST <url>/chat/completions {"model", "messages", "temperature", "max_tokens"}
    out    {"choices": [{"message": {"content": "…"}}], "usage"?: {…}}

Models that reason first refuse some of that, `max_tokens` and any temperature of ours: the service names what it does
not take, and it is not sent again. Every answer is a line of the journal as soon as it is there, and what is in the
journal is not asked again.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from finetune_api.preference_data import ToJudge
from finetune_trainers.data.faults import clip
from finetune_trainers.errors import UserError
from finetune_trainers.posting import NoAnswerError, Poster, variable_fault
from finetune_trainers.preference_data.questions import Question, Verdict, messages_for, verdict_in

__all__ = ["Answered", "Asking", "DeniedError", "Journal", "UnreachableError"]

_PATH = "/chat/completions"
_WAITING_FOR_EACH = 4
"""Questions that wait for each that is asked."""
_ABOUT_THE_QUESTION = frozenset({400, 413, 422})
"""Statuses by which a judge refuses one question, such as one that is too long for it."""
_DENIED = frozenset({401, 403})
_NOT_TAKEN = frozenset({"unsupported_parameter", "unsupported_value"})
_INSTEAD = {"max_tokens": "max_completion_tokens", "temperature": None}
"""Under which name a parameter that a service does not take is sent; None: not at all, and the service's own holds."""


class UnreachableError(UserError):
    """The judge does not answer."""


class DeniedError(UserError):
    """The judge does not let us ask."""


@dataclass(frozen=True)
class Answered:
    """What the judge has said to one question."""

    verdict: Verdict | None
    """None: it cannot be read, or the question was refused."""
    said: str
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Journal:
    """Verdicts by the key of their question, in a file that only grows. A line that was not finished is passed over."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, Verdict | None] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """For one process at a time. Raises UserError where another one writes."""
        with self.path.open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{self.path} is being written by another finetune data judge; wait for it") from None
            self._read(file)
            self._file = file
            yield

    def add(self, key: str, answered: Answered) -> None:
        verdict = answered.verdict
        self.known[key] = verdict
        self._file.write(json.dumps({"key": key, "verdict": verdict, "said": answered.said}, ensure_ascii=False) + "\n")
        self._file.flush()

    def _read(self, file: TextIO) -> None:
        file.seek(0)
        content = file.read()
        for line in content.splitlines():
            try:
                entry = json.loads(line)
                self.known[entry["key"]] = None if entry["verdict"] is None else Verdict(entry["verdict"])
            except (ValueError, KeyError, TypeError):
                continue
        if content and not content.endswith("\n"):
            file.write("\n")


class Asking:
    """One judge, who is asked several questions at a time."""

    def __init__(self, asked: ToJudge, wait_for: Callable[[float], object] | None = None) -> None:
        """`wait_for` is called to wait so many seconds before a further attempt. Raises UserError when the key cannot
        be had."""
        fault = None if asked.key_env is None else variable_fault(asked.key_env)
        if fault is not None:
            raise UserError(f"--key-env: {fault}")
        address, mark, query = asked.url.partition("?")
        if not address.rstrip("/").endswith(_PATH):
            address = address.rstrip("/") + _PATH
        self._asked = asked
        self.settings: dict[str, float] = {"temperature": asked.temperature, "max_tokens": asked.max_tokens}
        """What is sent with every question, as far as the service takes it."""
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._why: UserError | None = None
        self._poster = Poster(
            address + mark + query,
            {} if asked.key_env is None else {"Authorization": f"Bearer {os.environ[asked.key_env]}"},
            timeout_seconds=asked.timeout_seconds,
            retries=asked.retries,
            sleep=wait_for or self._wait,
        )

    def answers(self, questions: Mapping[str, Question]) -> Iterator[tuple[str, Answered]]:
        """The answers to `questions`, by key, as they come. Raises UnreachableError or DeniedError at the first
        question that gets none."""
        waiting = iter(questions.items())
        pool = ThreadPoolExecutor(self._asked.concurrency, thread_name_prefix="judge")
        asked: dict[Future[Answered], str] = {}
        try:
            while True:
                room = self._asked.concurrency * _WAITING_FOR_EACH - len(asked)
                for key, question in islice(waiting, room):
                    asked[pool.submit(self._ask, question)] = key
                if not asked:
                    return
                done = wait(asked, return_when=FIRST_COMPLETED).done
                for one in sorted(done, key=lambda one: one.exception() is not None):  # what is there is kept
                    yield asked.pop(one), one.result()
        finally:
            self._over.set()
            pool.shutdown(wait=False, cancel_futures=True)

    def _wait(self, seconds: float) -> None:
        if self._over.wait(seconds):
            raise NoAnswerError("nobody waits for the answer any more", try_again=False)

    def _ask(self, question: Question) -> Answered:
        if not self._over.is_set():
            try:
                return self._ask_now(question)
            except UserError as error:
                with self._lock:
                    self._why = self._why or error  # of several, the one that the others follow from
                self._over.set()
        raise self._why or UnreachableError("nobody waits for the answer any more")

    def _ask_now(self, question: Question) -> Answered:
        settings = self.settings
        messages = messages_for(question, self._asked.instructions)
        body = {"model": self._asked.model, "messages": messages, **settings}
        try:
            return self._read(self._poster.post(json.dumps(body).encode()))
        except NoAnswerError as error:
            name = _not_taken(error)
            if name in settings and name in _INSTEAD:
                self._leave_out(name)
                return self._ask_now(question)
            if error.status in _ABOUT_THE_QUESTION:
                return Answered(None, str(error))
            if error.status in _DENIED:
                raise DeniedError(f"{error}; --key-env names the variable that holds the key") from None
            raise UnreachableError(
                f"{error}. What was judged is kept; the same command asks only for the rest"
            ) from None

    def _leave_out(self, name: str) -> None:
        """From now on, in all questions. Those that are under way learn it as this one did."""
        with self._lock:
            settings = dict(self.settings)
            value, instead = settings.pop(name, None), _INSTEAD[name]
            if value is not None and instead is not None:
                settings[instead] = value
            self.settings = settings

    def _read(self, body: bytes) -> Answered:
        try:
            document: Any = json.loads(body)
            said = document["choices"][0]["message"]["content"]
        except (ValueError, KeyError, TypeError, IndexError, RecursionError):
            told = clip(self._poster.without_secrets(body[:200].decode(errors="replace")))
            raise NoAnswerError(f"the service answers {told}, and no chat completion; check --url", False) from None
        text = self._poster.without_secrets(said) if isinstance(said, str) else ""
        usage = document.get("usage")
        tokens = usage if isinstance(usage, dict) else {}
        return Answered(verdict_in(text), text, _count(tokens, "prompt_tokens"), _count(tokens, "completion_tokens"))


def _not_taken(error: NoAnswerError) -> str | None:
    """The parameter that the service refuses, by its name; None where it refuses something else."""
    if error.status != HTTPStatus.BAD_REQUEST:
        return None
    try:
        refusal: Any = json.loads(error.said)["error"]
        name = refusal["param"] if refusal["code"] in _NOT_TAKEN else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return name if isinstance(name, str) else None


def _count(usage: Mapping[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) else 0
