"""A judge on the loopback, which speaks as OpenAI-compatible services do, and prefers what a test tells it to."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

__all__ = ["JudgeService", "Reply", "likes_length", "likes_the_first"]

Opinion = Callable[[str, str], str]
"""(answer A, answer B) -> A, B or tie."""


def likes_length(a: str, b: str) -> str:
    return "tie" if len(a) == len(b) else "A" if len(a) > len(b) else "B"


def likes_the_first(a: str, b: str) -> str:
    return "A"


@dataclass(frozen=True)
class Reply:
    """What the service does with a request in place of an opinion."""

    status: int = 200
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)


class JudgeService:
    """Answers by `opinion` what `refusal` lets pass, after the `replies` that a test has put before it."""

    def __init__(self, opinion: Opinion = likes_length) -> None:
        self.opinion = opinion
        self.refusal: Callable[[dict[str, Any]], Reply | None] = lambda asked: None
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.replies: list[Reply] = []
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                with service._lock:
                    service._at_once += 1
                    service.most_at_once = max(service.most_at_once, service._at_once)
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with service._lock:
                    service.requests.append(asked)
                    service.headers.append(dict(self.headers))
                    service.paths.append(self.path)
                    reply = service.replies.pop(0) if service.replies else None
                reply = reply or service.refusal(asked) or Reply(body=service.completion(asked))
                with service._lock:
                    service._at_once -= 1
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                self.end_headers()
                self.wfile.write(reply.body)

            def log_message(self, format: str, *args: Any) -> None:
                return None

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}/v1"

    def completion(self, asked: dict[str, Any]) -> bytes:
        text = asked["messages"][-1]["content"]
        a, b = (re.search(rf"<answer_{letter}>\n(.*?)\n</answer_{letter}>", text, re.DOTALL) for letter in "ab")
        assert a is not None
        assert b is not None
        said = f"I have looked at both.\n\n**Verdict: {self.opinion(a[1], b[1])}**"
        return json.dumps(
            {"choices": [{"message": {"content": said}}], "usage": {"prompt_tokens": 100, "completion_tokens": 7}}
        ).encode()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
