"""A kubelet's answer to `kubectl exec`, for pods that only pretend to run: what a command prints, over a WebSocket.

Put behind a rule of tests.cluster.faults for the resource pods/exec. The real API server still judges nothing here;
who may exec is its own business, and pretended pods have nobody to ask.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

from aiohttp import web

from tests.cluster.proxy import Exchange

__all__ = ["Exec"]

_STDOUT, _END = b"\x01", b"\x03"
_CHANNELS = "v4.channel.k8s.io"


@dataclass(frozen=True)
class Exec:
    """`output` is given a pod's name and a shell's script: what that prints there, or None when it fails."""

    output: Callable[[str, str], str | None]

    async def __call__(self, exchange: Exchange) -> web.StreamResponse:
        query = parse_qsl(urlsplit(exchange.request.raw_path).query)
        command = [value for key, value in query if key == "command"]
        assert command[:2] == ["sh", "-c"], command
        printed = self.output(exchange.asked.name or "", command[2])
        socket = web.WebSocketResponse(protocols=(_CHANNELS,))
        await socket.prepare(exchange.request)
        await socket.send_bytes(_STDOUT)  # real servers begin with an empty piece
        for start in range(0, len(printed or ""), 7):  # and cut lines where they like
            await socket.send_bytes(_STDOUT + (printed or "")[start : start + 7].encode())
        status = {"status": "Success" if printed is not None else "Failure"}
        await socket.send_bytes(_END + json.dumps({"kind": "Status", "metadata": {}} | status).encode())
        await socket.close()
        return socket
