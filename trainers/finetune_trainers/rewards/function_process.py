"""A process that holds one Python function and calls it: `python -m finetune_trainers.rewards.function_process IN OUT`.

Started by `functions`, which ends it when a call takes too long. IN and OUT are descriptors of pipes that carry one
JSON object a line; whatever the function prints goes where this process's output goes.

    first line in     {"path": [...], "call": "module:function", "settings": {...}}
    first line out    {"takes": [...], "needs": [...], "takes_any": false}, or {"error": "..."}
    then, by turns    {"arguments": {name: [...]}}
                      {"values": [...], "faults": {"0": "..."}}, or {"error": "..."}

It ends when IN is closed, in the middle of a call too: a function that never returns does not outlive its job.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["main"]


def main(arguments: list[str]) -> None:
    """Serve until the other side closes its end."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(int(arguments[0]), lines), daemon=True).start()
    with os.fdopen(int(arguments[1]), "w", encoding="utf-8") as answers:
        begin = json.loads(lines.get())
        sys.path[:] = begin["path"]
        try:
            function = _find(begin["call"])
            settings = begin["settings"]
            _answer(answers, _signature(function, set(settings)))
        except Exception as error:  # whatever the module does when it is imported
            _answer(answers, {"error": _told(error)})
            return
        while True:
            asked = json.loads(lines.get())
            try:
                values = function(**asked["arguments"], **settings)
                _answer(answers, _scores(_awaited(values)))
            except Exception as error:  # the function's own
                _answer(answers, {"error": _told(error)})


def _read(descriptor: int, lines: queue.SimpleQueue[str]) -> None:
    """Pass on what comes in; end the process with the stream."""
    with os.fdopen(descriptor, encoding="utf-8") as stream:
        for line in stream:
            lines.put(line)
    os._exit(0)


def _answer(stream: IO[str], document: dict[str, Any]) -> None:
    stream.write(json.dumps(document) + "\n")
    stream.flush()


def _find(call: str) -> Callable[..., Any]:
    module, _, name = call.partition(":")
    function = getattr(importlib.import_module(module), name, None)
    if function is None:
        raise AttributeError(f"the module {module} has no function {name}")
    if not callable(function):
        raise TypeError(f"{call} is no function but a {type(function).__name__}")
    found: Callable[..., Any] = function
    return found


def _signature(function: Callable[..., Any], settings: set[str]) -> dict[str, Any]:
    """What may be given to the function by name, and what must be; `settings` are given always."""
    parameters = list(inspect.signature(function).parameters.values())
    named = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
    unknown = settings - {one.name for one in named}
    if unknown and not takes_any:
        raise TypeError(f"it takes no {', '.join(sorted(unknown))}, which settings gives it")
    return {
        "takes": [one.name for one in named if one.name not in settings],
        "needs": [one.name for one in named if one.default is one.empty and one.name not in settings],
        "takes_any": takes_any,
    }


def _awaited(values: Any) -> Any:
    async def wait() -> Any:
        return await values

    return asyncio.run(wait()) if inspect.isawaitable(values) else values


def _scores(values: Any) -> dict[str, Any]:
    """Numbers as JSON has them; what is no number becomes a fault of its place."""
    if isinstance(values, str | bytes | dict) or not hasattr(values, "__iter__"):
        return {"error": f"it returned {_shown(values)}, not a list of numbers"}
    found = list(_numbers(values))
    faults = {str(index): value for index, value in enumerate(found) if isinstance(value, str)}
    return {"values": [None if isinstance(value, str) else value for value in found], "faults": faults}


def _numbers(values: Any) -> Iterator[float | str | None]:
    """Each value as a number, or None for no opinion, or what is wrong with it."""
    for value in values:
        try:
            yield None if value is None else float(value) if not isinstance(value, str | bytes) else _no_number(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):  # a tensor with several numbers is the last
            yield _no_number(value)


def _no_number(value: Any) -> str:
    return f"it returned {_shown(value)}, which is no number"


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:60] + '…'} ({type(value).__name__})"


def _told(error: Exception) -> str:
    """The exception in one line, with the line of the user's code that raised it."""
    lines = (line.strip() for line in str(error).splitlines())
    text = f"{type(error).__name__}: {next((line for line in lines if line), 'no message')}"[:400]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in frames if not frame.filename.startswith("<frozen")]
    return f"{text} ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else text


if __name__ == "__main__":
    main(sys.argv[1:])
