"""What `finetune serve` does: starts the server, waits until it answers, says how to use it, and ends it."""

from __future__ import annotations

import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console

from finetune_api.failures import INTERRUPTED
from finetune_client import runner
from finetune_client.cli.exits import INVALID, OK
from finetune_client.cli.jobs.verbs import Where
from finetune_client.cli.serve.sources import NotServable, Served, to_serve
from finetune_client.cli.signals import counting_signals
from finetune_client.serving import LocalServer, Serving

__all__ = ["Wish", "how_to_ask", "serve_it"]

_LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Wish:
    """What was typed."""

    source: str
    host: str
    port: int
    name: str | None
    base: str | None
    engine: str


def serve_it(wish: Wish, where: Where, as_json: bool) -> int:
    """Serve until a signal comes. Returns the exit code."""
    try:
        served = to_serve(wish.source, where)
    except NotServable as error:
        _say(str(error))
        return error.code
    if missing := runner.missing_packages():
        _say(
            f"serving needs packages that are not installed ({', '.join(missing)}); "
            "install the extras: pip install 'finetune-operator[trainers,serve]'"
        )
        return INVALID
    if wish.base is not None and served.is_whole:
        _say(f"--base: {served.what} is whole and needs none; leave --base out")
        return INVALID
    _say(f"Preparing {served.what}")
    with counting_signals() as num_signals, LocalServer(_arguments(wish, served)) as server:
        return _watch(server, num_signals, as_json)


def _arguments(wish: Wish, served: Served) -> list[str]:
    """Of the trainers' command."""
    options = ["--name", wish.name or served.name, "--host", wish.host, "--port", str(wish.port)]
    options += ["--engine", wish.engine, *(["--base", wish.base] if wish.base is not None else [])]
    return ["serve", *served.option, *options]


def _watch(server: LocalServer, num_signals: Callable[[], int], as_json: bool) -> int:
    """Until it is told to end, or ends by itself."""
    is_ready = False
    while not num_signals():
        for sentence in server.said():
            _say(sentence)
        if (code := server.exit_code) is not None:
            return _died(code, is_ready)
        if not is_ready and server.answers():
            assert server.serving is not None
            is_ready = True
            _tell(server.serving, as_json)
        time.sleep(_LOOK_SECONDS)
    _say("Ending the server; press Ctrl-C again to kill it")
    server.end(lambda: num_signals() > 1)
    return OK if is_ready else INTERRUPTED


def _died(code: int, was_ready: bool) -> int:
    """A server never ends by itself. Before it served it has said why."""
    if was_ready or code <= 0:
        how = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
        _say(f"the server {how}; what it said last is above")
    return code if code > 0 else 1


def _tell(serving: Serving, as_json: bool) -> None:
    if as_json:
        document = {"url": serving.url, "model": serving.model, "engine": serving.engine, "pid": os.getpid()}
        print(json.dumps(document), flush=True)
        return
    for line in how_to_ask(serving, os.getpid()):
        print(line, flush=True)


def how_to_ask(serving: Serving, pid: int) -> list[str]:
    """What a person needs to know of a server that is ready; `pid` ends it."""
    question = {"model": serving.model, "messages": [{"role": "user", "content": "Hello"}]}
    data = shlex.quote(json.dumps(question))
    lines = [
        f"{serving.model} is served at {serving.url} by {serving.engine}",
        f"  model    {serving.model}",
        f"  ask      curl -s {serving.url}/chat/completions -H 'Content-Type: application/json' -d {data}",
        f"  to end   Ctrl-C, or kill {pid}",
    ]
    if not serving.is_loopback:
        lines.insert(1, f"  note     it listens at {serving.host}: whoever reaches this machine may ask, no password")
    return lines


def _say(sentence: str) -> None:
    Console(stderr=True).print(sentence, markup=False, highlight=False, soft_wrap=True)
