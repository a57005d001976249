"""A reward that is a service, against a real server on the loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from finetune_api.spec import HttpReward
from finetune_trainers.errors import UserError
from finetune_trainers.rewards.endpoint import HttpScorer
from tests.trainers.rewards.worlds import episodes

PATH = "spec.method.grpo.rewards[0].http"
SECRET = "Bearer do-not-tell"


@dataclass(frozen=True)
class Reply:
    """What the service does with a request. `body` None: hold it until the test is over."""

    status: int = 200
    body: bytes | None = b"{}"
    headers: dict[str, str] = field(default_factory=dict)


class Service:
    """Scores each answer with its length, after the replies that a test has put before it."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.replies: list[Reply] = []
        self.disliked: str | None = None
        """A request with this answer has no reply but 500."""
        self.over = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append(asked)
                service.headers.append(dict(self.headers))
                scores = {"scores": [len(text) for text in asked["completions"]]}
                if service.disliked in asked["completions"]:
                    self._reply(Reply(500, b"no GPU"))
                else:
                    self._reply(service.replies.pop(0) if service.replies else Reply(body=json.dumps(scores).encode()))

            def do_GET(self) -> None:
                raise AssertionError("nothing is asked for by GET")

            def _reply(self, reply: Reply) -> None:
                if reply.body is None:
                    service.over.wait()
                    self.close_connection = True
                    return
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
        return f"http://127.0.0.1:{self.server.server_port}/score"

    def close(self) -> None:
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


Make = Callable[..., HttpScorer]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    service = Service()
    yield service
    service.close()


@pytest.fixture
def waits() -> list[float]:
    """How long was waited before each further attempt."""
    return []


@pytest.fixture
def make(service: Service, waits: list[float]) -> Iterator[Make]:
    made: list[HttpScorer] = []

    def scorer(**fields: Any) -> HttpScorer:
        made.append(HttpScorer(HttpReward(**({"url": service.url} | fields)), PATH, sleep=waits.append))
        return made[-1]

    yield scorer
    for one in made:
        one.close()


def test_answers_are_posted_with_prompts_and_columns_and_scores_come_back(service: Service, make: Make) -> None:
    scored = make().score(episodes(["abc", ""], answer=["x", None]))
    assert scored == ([3.0, 0.0], {})
    assert service.requests == [
        {
            "prompts": [[{"role": "user", "content": "question 0"}], [{"role": "user", "content": "question 1"}]],
            "completions": ["abc", ""],
            "fields": {"answer": ["x", None]},
        }
    ]
    assert service.headers[0]["Content-Type"] == "application/json"


def test_many_answers_go_in_batches_and_keep_their_order(service: Service, make: Make) -> None:
    texts = ["x" * count for count in range(23)]
    assert make(batch_size=5).score(episodes(texts)).values == [float(count) for count in range(23)]
    assert sorted(len(request["completions"]) for request in service.requests) == [3, 5, 5, 5, 5]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_service_is_asked_again_after_longer_and_longer_waits(
    service: Service, make: Make, waits: list[float], status: int
) -> None:
    service.replies = [Reply(status)] * 3
    assert make(retries=3).score(episodes(["abc"])).values == [3.0]
    assert waits == [0.5, 1.0, 2.0]


def test_a_service_that_says_when_is_asked_then(service: Service, make: Make, waits: list[float]) -> None:
    service.replies = [Reply(429, headers={"Retry-After": "7"}), Reply(429, headers={"Retry-After": "7000"})]
    assert make().score(episodes(["abc"])).values == [3.0]
    assert waits == [7.0, 30.0]


def test_only_the_answers_of_a_request_without_scores_are_without(service: Service, make: Make) -> None:
    service.disliked = "ccc"
    scored = make(retries=0, batch_size=2).score(episodes(["a", "bb", "ccc", "dddd", "eeeee"]))
    assert scored.values == [1.0, 2.0, None, None, 5.0]
    assert scored.faults == dict.fromkeys([2, 3], "the service answers 500 Internal Server Error: no GPU")


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(404), "the service answers 404 Not Found"),
        (Reply(401), "the service answers 401 Unauthorized"),
        (Reply(302, headers={"Location": "/elsewhere"}), "the service answers 302 with another place"),
        (Reply(body=b"<html>"), 'the service answers <html>, and not {"scores": [...]}'),
        (Reply(body=b"[1, 2]"), 'and not {"scores": [...]}'),
        (Reply(body=b'{"scores": [1]}'), "the service answers 1 scores for 2 answers"),
        (Reply(body=b'{"scores": 1}'), "the service answers 1 for 2 answers"),
    ],
)
def test_an_answer_that_asking_again_would_not_mend_is_taken_at_once(
    service: Service, make: Make, waits: list[float], reply: Reply, said: str
) -> None:
    service.replies = [reply]
    scored = make().score(episodes(["a", "b"]))
    assert scored.values == [None, None]
    assert all(said in fault for fault in scored.faults.values())
    assert len(service.requests) == 1
    assert waits == []


def test_what_is_no_finite_number_is_a_failure_and_null_is_no_opinion(service: Service, make: Make) -> None:
    service.replies = [Reply(body=b'{"scores": [1, NaN, "2", true, null, -Infinity]}')]
    scored = make().score(episodes(list("abcdef")))
    assert scored.values == [1.0, None, None, None, None, None]
    assert sorted(scored.faults) == [1, 2, 3, 5]
    assert scored.faults[1] == "the service answers NaN, which is no finite number"


def test_a_service_that_hangs_is_given_up(service: Service, make: Make, waits: list[float]) -> None:
    service.replies = [Reply(body=None)] * 2
    scored = make(timeout_seconds=0.2, retries=1).score(episodes(["a"]))
    assert scored.values == [None]
    assert "timed out" in scored.faults[0] or "took longer than 0.2 s" in scored.faults[0]
    assert waits == [0.5]


def test_a_service_that_is_not_there_is_a_failure(make: Make, service: Service) -> None:
    service.close()
    scored = make(retries=0).score(episodes(["a"]))
    assert scored.values == [None]
    assert scored.faults[0].startswith("the service cannot be reached: ConnectionRefusedError")


def test_headers_come_from_the_environment(service: Service, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", SECRET)
    make(headers_from_env={"Authorization": "JUDGE"}).score(episodes(["a"]))
    assert service.headers[0]["Authorization"] == SECRET


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, "the environment variable JUDGE is not set"),
        ("", "the environment variable JUDGE holds what no header can hold"),
        (f"{SECRET}\n", "the environment variable JUDGE holds what no header can hold"),
    ],
)
def test_a_header_that_cannot_be_sent_is_refused_without_telling_it(
    make: Make, monkeypatch: pytest.MonkeyPatch, value: str | None, said: str
) -> None:
    monkeypatch.delenv("JUDGE", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE", value)
    with pytest.raises(UserError) as refused:
        make(headers_from_env={"Authorization": "JUDGE"})
    [problem] = refused.value.problems
    assert problem.path == f"{PATH}.headersFromEnv.Authorization"
    assert said in problem.message
    assert SECRET not in str(refused.value)


def test_no_failure_tells_what_a_header_holds(service: Service, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE", SECRET)
    service.replies = [Reply(403, b"no"), Reply(body=b"no")]
    scorer = make(headers_from_env={"Authorization": "JUDGE"})
    told = [fault for _ in range(2) for fault in scorer.score(episodes(["a"])).faults.values()]
    assert len(told) == 2
    assert not any(SECRET in fault for fault in told)
