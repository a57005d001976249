"""A reward that is a Python function. It runs in a process of its own, which can be ended when the function hangs.

The function is called with a batch of answers at once. When that fails it is called for each answer alone, so that one
that it cannot cope with costs the others nothing. A call that takes too long, or that ends the process, is not
repeated: the process is begun anew for the next batch.
"""

from __future__ import annotations

import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

from finetune_api.failures import Problem
from finetune_api.problems import shorten
from finetune_api.spec import FunctionReward
from finetune_trainers.errors import UserError
from finetune_trainers.rewards import Episode, Scored

__all__ = ["GIVEN", "FunctionScorer", "columns_of", "of_rows_with"]

GIVEN = ("prompts", "completions", "messages", "num_tokens", "ended")
"""What a function may take beside the rows' columns: lists of the last message of each prompt, of the answers, of the
whole prompts as messages, of the answers' tokens, and whether they came to their end."""
_START_SECONDS = 300.0
"""A module may import a good deal."""
_END_SECONDS = 10.0
_MAX_LINE = 1 << 28


class FunctionScorer:
    """One function. Used by one thread at a time."""

    def __init__(self, reward: FunctionReward, path: str, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts the process. Raises UserError about `path` when the function cannot be had."""
        self._reward = reward
        self._path = path
        self._clock = clock
        self._process: _Process | None = None
        self._begin()

    @property
    def needs(self) -> list[str]:
        """Columns of the rows that the function cannot be called without."""
        assert self._process is not None, "asked before anything was scored"
        return [name for name in self._process.needs if name not in GIVEN]

    def score(self, episodes: Sequence[Episode]) -> Scored:
        """See `Scorer`."""
        try:
            process = self._process or self._begin()
        except UserError as error:
            return _all_failed(episodes, error.problems[0].message)
        return of_rows_with(self.needs, episodes, partial(self._score, process))

    def _score(self, process: _Process, episodes: Sequence[Episode]) -> Scored:
        arguments = self._arguments(process, episodes)
        deadline = self._clock() + self._reward.timeout_seconds
        try:
            return _checked(process.ask(arguments, self._reward.timeout_seconds), len(episodes))
        except _CallFailedError as failed:
            if len(episodes) == 1 or isinstance(failed, _WrongLengthError):
                return _all_failed(episodes, str(failed))
            return self._one_by_one(process, arguments, len(episodes), deadline + self._reward.timeout_seconds)
        except _ProcessLostError as lost:
            self.close()
            return _all_failed(episodes, str(lost))

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.end()

    def _begin(self) -> _Process:
        process = _Process()
        begin = {"path": sys.path, "call": self._reward.call, "settings": self._reward.settings}
        try:
            process.begin(begin)
            _check_takes(process)
        except (_CallFailedError, _ProcessLostError) as error:
            process.end()
            message = (
                f"cannot be used: {error}. It must be in the image or on PYTHONPATH, and take completions and the"
                " settings by name"
            )
            problem = Problem(path=self._path, value=shorten(self._reward.call), message=message)
            raise UserError(str(problem), [problem]) from None
        self._process = process
        return process

    def _arguments(self, process: _Process, episodes: Sequence[Episode]) -> dict[str, list[Any]]:
        known: dict[str, list[Any]] = columns_of(episodes) | {
            "prompts": [one.prompt[-1]["content"] if one.prompt else "" for one in episodes],
            "completions": [one.completion for one in episodes],
            "messages": [one.prompt for one in episodes],
            "num_tokens": [one.num_tokens for one in episodes],
            "ended": [one.ended for one in episodes],
        }
        taken = known.keys() - self._reward.settings.keys()
        return {name: known[name] for name in known if name in taken and (process.takes_any or name in process.takes)}

    def _one_by_one(
        self, process: _Process, arguments: dict[str, list[Any]], num_episodes: int, deadline: float
    ) -> Scored:
        """Each answer alone; what is not done by `deadline` has failed."""
        values: list[float | None] = [None] * num_episodes
        faults: dict[int, str] = {}
        for index in range(num_episodes):
            one = {name: [column[index]] for name, column in arguments.items()}
            seconds_left = deadline - self._clock()
            try:
                if seconds_left <= 0:
                    raise _ProcessLostError(f"it took longer than {self._reward.timeout_seconds:g} s, answer by answer")
                found = _checked(process.ask(one, min(seconds_left, self._reward.timeout_seconds)), 1)
            except _CallFailedError as failed:
                faults[index] = str(failed)
            except _ProcessLostError as lost:
                self.close()
                return Scored(values, faults | dict.fromkeys(range(index, num_episodes), str(lost)))
            else:
                values[index] = found.values[0]
                faults.update({index: fault} if (fault := found.faults.get(0)) is not None else {})
        return Scored(values, faults)


def of_rows_with(
    columns: Collection[str], episodes: Sequence[Episode], score: Callable[[Sequence[Episode]], Scored]
) -> Scored:
    """What `score` says of the episodes whose rows have all `columns`; of the others there is no opinion. In a mixture
    rows may be of a source that has no such column."""
    places = [place for place, one in enumerate(episodes) if all(name in one.fields for name in columns)]
    values: list[float | None] = [None] * len(episodes)
    if not places:
        return Scored(values, {})
    found = score([episodes[place] for place in places])
    for place, value in zip(places, found.values, strict=True):
        values[place] = value
    return Scored(values, {places[index]: fault for index, fault in found.faults.items()})


def columns_of(episodes: Sequence[Episode]) -> dict[str, list[Any]]:
    """Column by column; None where a row has no such column."""
    names = dict.fromkeys(name for one in episodes for name in one.fields)
    return {name: [one.fields.get(name) for one in episodes] for name in names}


def _all_failed(episodes: Sequence[Episode], fault: str) -> Scored:
    return Scored([None] * len(episodes), dict.fromkeys(range(len(episodes)), fault))


def _check_takes(process: _Process) -> None:
    if not process.takes_any and "completions" not in process.takes:
        raise _CallFailedError("it takes no argument called completions")


def _checked(answer: dict[str, Any], num_episodes: int) -> Scored:
    """The answer of the process as scores. Raises _CallFailedError when it has another length."""
    values = answer["values"]
    if len(values) != num_episodes:
        raise _WrongLengthError(f"it returned {len(values)} scores for {num_episodes} answers")
    faults = {int(index): text for index, text in answer["faults"].items()}
    for index, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            faults[index] = f"it returned {value}, which is no finite number"
    return Scored([None if index in faults else value for index, value in enumerate(values)], faults)


class _CallFailedError(Exception):
    """The function did not do what it should; its process goes on."""


class _WrongLengthError(_CallFailedError):
    """Asked answer by answer, a function that returns one number for all would seem to be in order."""


class _ProcessLostError(Exception):
    """The process has ended, or must be."""


class _Process:
    """The other side of `function_process`."""

    def __init__(self) -> None:
        self.takes: list[str] = []
        self.needs: list[str] = []
        self.takes_any = False
        their_in, self._out = os.pipe()
        self._in, their_out = os.pipe()
        command = [sys.executable, "-m", "finetune_trainers.rewards.function_process", str(their_in), str(their_out)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, pass_fds=(their_in, their_out), start_new_session=True
        )
        os.close(their_in)
        os.close(their_out)
        os.set_blocking(self._out, False)
        self._buffer = b""

    def begin(self, document: dict[str, Any]) -> None:
        """Load the function. Raises _CallFailedError, or _ProcessLostError."""
        answer = self._exchange(document, _START_SECONDS)
        self.takes, self.needs, self.takes_any = answer["takes"], answer["needs"], answer["takes_any"]

    def ask(self, arguments: dict[str, list[Any]], seconds: float) -> dict[str, Any]:
        """The function's values. Raises _CallFailedError, or _ProcessLostError."""
        return self._exchange({"arguments": arguments}, seconds)

    def end(self) -> None:
        """With all that the function may have started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)

    def _exchange(self, document: dict[str, Any], seconds: float) -> dict[str, Any]:
        deadline = time.monotonic() + seconds
        unsent = memoryview(json.dumps(document, default=str).encode() + b"\n")
        with selectors.DefaultSelector() as selector:
            selector.register(self._in, selectors.EVENT_READ)
            selector.register(self._out, selectors.EVENT_WRITE)
            while b"\n" not in self._buffer:
                ready = selector.select(max(deadline - time.monotonic(), 0))
                if not ready:
                    raise _ProcessLostError(f"it took longer than {seconds:g} s")
                for key, _ in ready:
                    if key.fd == self._in:
                        self._receive()
                    else:
                        unsent = self._send(unsent)
                        if not unsent:
                            selector.unregister(self._out)
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _CallFailedError(answer["error"])
        return answer

    def _send(self, unsent: memoryview) -> memoryview:
        try:
            return unsent[os.write(self._out, unsent) :]
        except BlockingIOError:
            return unsent
        except BrokenPipeError:
            raise self._ended() from None

    def _receive(self) -> None:
        found = os.read(self._in, 1 << 16)
        if not found:
            raise self._ended()
        self._buffer += found
        if len(self._buffer) > _MAX_LINE:
            raise _ProcessLostError("it returned more than a quarter of a gigabyte")

    def _ended(self) -> _ProcessLostError:
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # somebody else's fingers in its descriptors
            return _ProcessLostError("its process answers no more")
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return _ProcessLostError(f"its process {how}")
