"""Reports reach the job's ConfigMap, not too often, and whatever happens to them training goes on."""

from __future__ import annotations

import datetime
import json
import logging
import queue
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_api.progress import Outcome, Progress, Result, SavedCheckpoint, Stage
from finetune_trainers import progress as progress_module
from finetune_trainers.cluster_sink import ClusterSink, Mailbox, cluster_sink
from finetune_trainers.progress import FileSink
from tests.certificates import self_signed

NOON = datetime.datetime(2026, 1, 1, 12, tzinfo=UTC)
DONE = Outcome(result=Result.SUCCEEDED, step=3, total_steps=3)
PATIENCE = 30


def report(step: int, stage: Stage = Stage.TRAINING) -> Progress:
    return Progress(stage=stage, step=step, updated_at=NOON)


@dataclass
class Patch:
    path: str
    headers: dict[str, str]
    data: dict[str, Any]


@dataclass
class ApiServer:
    """Knows one ConfigMap, PATCH, and nothing else."""

    url: str = ""
    statuses: list[int] = field(default_factory=list)
    """Answers to come; 200 when there are none left."""
    patches: queue.Queue[Patch] = field(default_factory=queue.Queue)
    config_map: dict[str, str] = field(default_factory=dict)
    answer: bytes = b""
    """Instead of the ConfigMap."""

    def next(self) -> Patch:
        return self.patches.get(timeout=PATIENCE)


def serve(certificate: Path | None = None) -> tuple[ApiServer, ThreadingHTTPServer]:
    state = ApiServer()

    class Handler(BaseHTTPRequestHandler):
        def do_PATCH(self) -> None:  # the name is http.server's
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = state.statuses.pop(0) if state.statuses else 200
            if status == 200:
                changes = body["data"]
                state.config_map.update({key: value for key, value in changes.items() if value is not None})
                for key in [key for key, value in changes.items() if value is None]:
                    state.config_map.pop(key, None)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(state.answer or json.dumps({"kind": "ConfigMap", "data": state.config_map}).encode())
            state.patches.put(Patch(self.path, dict(self.headers), body["data"]))

        def log_message(self, format: str, *args: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    scheme = "http"
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        scheme = "https"
    state.url = f"{scheme}://127.0.0.1:{server.server_port}/api/v1/namespaces/team/configmaps/bot-progress"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return state, server


@pytest.fixture
def api() -> Iterator[ApiServer]:
    state, server = serve()
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No request is given up because the machine is busy."""
    monkeypatch.setattr("finetune_trainers.cluster_sink.TIMEOUT_SECONDS", float(PATIENCE))


@pytest.fixture
def account(tmp_path: Path) -> Path:
    folder = tmp_path / "account"
    folder.mkdir()
    (folder / "token").write_text("first\n")
    return folder


@pytest.fixture
def sink(api: ApiServer, account: Path) -> ClusterSink:
    return ClusterSink(api.url, "2", account, clock=lambda: 0.0)


def test_a_mailbox_gives_out_the_newest_report_every_fifteen_seconds() -> None:
    box = Mailbox()
    assert box.wait(0) is None
    box.put(report(1))
    assert box.take(0) == report(1)
    box.put(report(2))
    box.put(report(3))
    assert (box.wait(4), box.take(14.9)) == (11, None)
    assert box.take(15) == report(3)
    assert box.take(40) is None


def test_a_new_stage_does_not_wait() -> None:
    box = Mailbox()
    box.put(report(1))
    box.take(0)
    box.put(report(1, Stage.EVALUATING))
    assert box.take(1) == report(1, Stage.EVALUATING)
    box.put(report(2, Stage.TRAINING))
    box.put(report(3, Stage.TRAINING))
    assert box.take(2) == report(3)


def test_a_report_is_a_merge_patch_with_its_attempt(api: ApiServer, sink: ClusterSink) -> None:
    sink.report(report(1))
    patch = api.next()
    assert patch.path == "/api/v1/namespaces/team/configmaps/bot-progress"
    assert patch.headers["Content-Type"] == "application/merge-patch+json"
    assert patch.headers["Authorization"] == "Bearer first"
    assert patch.data["attempt"] == "2"
    assert Progress.model_validate_json(patch.data["progress.json"]) == report(1)


@dataclass
class Stops:
    """Counts what a sink is told to do."""

    num: int = 0
    error: OSError | None = None

    def stop(self) -> None:
        self.num += 1
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(("wanted", "num"), [(None, 0), ("1", 0), ("2", 1), ("3", 0)])
def test_the_attempt_that_the_operator_wants_to_stop_learns_it_from_the_answer_to_its_report(
    wanted: str | None, num: int, api: ApiServer, account: Path
) -> None:
    stops = Stops()
    sink = ClusterSink(api.url, "2", account, on_stop=stops.stop)
    api.config_map = {"stop-attempt": wanted} if wanted else {}
    sink.report(report(1))
    sink.finish(DONE, waits=())  # waits for the report
    assert stops.num == num


@pytest.mark.parametrize("answer", [b"{", b"[]", b"null", b'{"data": null}', b'{"data": {"stop-attempt": 2}}'])
def test_an_answer_that_is_no_config_map_stops_nothing_and_is_no_fault(
    answer: bytes, api: ApiServer, account: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stops = Stops()
    api.answer = answer
    assert ClusterSink(api.url, "2", account, on_stop=stops.stop).finish(DONE, waits=(0,))
    assert (stops.num, caplog.records) == (0, [])


def test_a_stop_that_cannot_be_passed_on_is_logged_and_reports_go_on(
    api: ApiServer, account: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stops = Stops(error=OSError("the folder is read-only"))
    api.config_map = {"stop-attempt": "2"}
    sink = ClusterSink(api.url, "2", account, on_stop=stops.stop)
    sink.report(report(1))
    assert sink.finish(DONE, waits=(0,))
    assert "the folder is read-only" in caplog.text


def test_a_runs_own_sink_passes_the_wish_on(
    api: ApiServer, account: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        progress_module, "cluster_sink", lambda on_stop: ClusterSink(api.url, "2", account, on_stop=on_stop)
    )
    api.config_map = {"stop-attempt": "2"}
    stop_file = tmp_path / "stop"
    file = FileSink(tmp_path / "progress.jsonl", on_stop=stop_file.touch)
    file.report(Stage.TRAINING, step=1)
    file.finish(DONE)
    assert stop_file.exists()


def test_reports_that_come_too_soon_are_not_written_one_by_one(api: ApiServer, sink: ClusterSink) -> None:
    sink.report(report(1))
    api.next()
    for step in range(2, 50):
        sink.report(report(step))
    sink.report(report(50, Stage.EXPORTING))
    assert json.loads(api.next().data["progress.json"])["step"] == 50


def test_the_outcome_is_the_last_word_and_names_its_attempt(api: ApiServer, sink: ClusterSink) -> None:
    sink.report(report(1))
    assert sink.finish(DONE)
    sink.report(report(2, Stage.EVALUATING))
    assert Outcome.model_validate_json(api.config_map["outcome.json"]) == DONE
    assert (api.config_map["attempt"], api.config_map["outcome-attempt"]) == ("2", "2")
    assert json.loads(api.config_map["progress.json"])["step"] == 1


def test_what_was_said_before_an_attempt_starts_is_not_taken_for_its_own(api: ApiServer, sink: ClusterSink) -> None:
    api.config_map = {"attempt": "1", "outcome.json": "{}", "progress.json": "{}"}
    sink.begin()
    assert api.config_map == {"attempt": "2"}


def test_the_outcome_is_tried_until_it_is_written(api: ApiServer, sink: ClusterSink) -> None:
    api.statuses = [500, 429, 503]
    assert sink.finish(DONE, waits=(0, 0, 0, 0))
    assert "outcome.json" in api.config_map


def test_an_outcome_that_cannot_be_written_is_given_up(api: ApiServer, sink: ClusterSink) -> None:
    api.statuses = [403, 403]
    assert not sink.finish(DONE, waits=(0, 0))


def test_a_failure_is_logged_once_and_the_next_report_is_written(
    api: ApiServer, sink: ClusterSink, caplog: pytest.LogCaptureFixture
) -> None:
    api.statuses = [500, 500]
    with caplog.at_level(logging.INFO):
        for step, stage in enumerate([Stage.TRAINING, Stage.EVALUATING, Stage.EXPORTING]):
            sink.report(report(step, stage))
            api.next()
        assert sink.finish(DONE)
    assert [record.message.split(" to ")[0] for record in caplog.records] == [
        "Progress cannot be written",
        "Progress can be written again.",
    ]
    assert "first" not in caplog.text  # the token
    assert json.loads(api.config_map["progress.json"])["step"] == 2


def test_the_token_is_read_anew_because_the_kubelet_renews_it(api: ApiServer, sink: ClusterSink, account: Path) -> None:
    sink.begin()
    (account / "token").write_text("second")
    sink.begin()
    assert [api.next().headers["Authorization"] for _ in range(2)] == ["Bearer first", "Bearer second"]


@pytest.mark.parametrize("broken", ["no token", "no server", "not HTTP at all"])
def test_nothing_that_goes_wrong_reaches_the_training(broken: str, api: ApiServer, account: Path) -> None:
    url = {"no server": "http://127.0.0.1:1/x", "not HTTP at all": "nonsense"}.get(broken, api.url)
    if broken == "no token":
        (account / "token").unlink()
    sink = ClusterSink(url, "1", account)
    sink.begin()
    sink.report(report(1))
    assert not sink.finish(DONE, waits=(0,))


def test_a_proxy_for_the_world_outside_is_not_asked(
    api: ApiServer, sink: ClusterSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert sink.finish(DONE, waits=(0,))


def test_the_server_is_known_by_the_mounted_authority(tmp_path: Path, account: Path) -> None:
    certificate = self_signed(tmp_path)
    state, server = serve(certificate)
    try:
        stranger = self_signed(tmp_path / "other")
        (account / "ca.crt").write_bytes(stranger.read_bytes())
        assert not ClusterSink(state.url, "1", account).finish(DONE, waits=(0,))
        (account / "ca.crt").write_bytes(certificate.read_bytes())
        assert ClusterSink(state.url, "1", account).finish(DONE, waits=(0,))
    finally:
        server.shutdown()
        server.server_close()


POD = {
    "FINETUNE_PROGRESS_CONFIGMAP": "bot-progress",
    "FINETUNE_NAMESPACE": "team",
    "FINETUNE_ATTEMPT": "3",
    "KUBERNETES_SERVICE_HOST": "fd00::1",
    "KUBERNETES_SERVICE_PORT": "6443",
}


def test_a_pod_of_the_operators_knows_where_to_report(account: Path) -> None:
    made = cluster_sink(POD, account)
    assert made is not None
    assert made._url == (
        "https://[fd00::1]:6443/api/v1/namespaces/team/configmaps/bot-progress?fieldManager=finetune-trainers"
    )
    assert made._attempt == "3"


@pytest.mark.parametrize("missing", ["FINETUNE_PROGRESS_CONFIGMAP", "FINETUNE_NAMESPACE", "KUBERNETES_SERVICE_HOST"])
def test_elsewhere_there_is_nothing_to_report_to(missing: str, account: Path) -> None:
    assert cluster_sink({key: value for key, value in POD.items() if key != missing}, account) is None


def test_without_a_token_there_is_nothing_to_report_with(tmp_path: Path) -> None:
    assert cluster_sink(POD, tmp_path) is None


def test_what_goes_into_the_runs_file_goes_to_the_cluster_too(
    api: ApiServer, sink: ClusterSink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_module, "cluster_sink", lambda on_stop: sink)
    file = FileSink(tmp_path / "progress.jsonl")
    file.begin()
    file.report(Stage.TRAINING, step=4)
    assert api.next().data == {"attempt": "2", "progress.json": None, "outcome.json": None}
    assert json.loads(api.next().data["progress.json"]) == json.loads((tmp_path / "progress.jsonl").read_text())
    file.finish(DONE)
    assert "outcome.json" in api.config_map


def test_what_is_said_after_training_includes_how_far_that_has_come(tmp_path: Path) -> None:
    saved = SavedCheckpoint(uri="file:///c/4", step=4, saved_at=NOON, world_size=2, bytes=10)
    FileSink(tmp_path / "progress.jsonl").report(
        Stage.TRAINING, step=5, total_steps=9, eta_seconds=3.0, message="m", resumed_from_step=2, checkpoint=saved
    )
    driver = FileSink(tmp_path / "progress.jsonl")
    for stage, figures in ((Stage.EXPORTING, {"step": 5}), (Stage.EXPORTING, {}), (Stage.DONE, {})):
        driver.report(stage, urgent=True, **figures)
        said = Progress.model_validate_json((tmp_path / "progress.jsonl").read_bytes().splitlines()[-1])
        assert (said.stage, said.step, said.total_steps, said.resumed_from_step) == (stage, 5, 9, 2)
        assert (said.checkpoint, said.message, said.eta_seconds) == (saved, None, None)


@pytest.mark.parametrize("before", [None, b"", b"{", b'{"stage": "Flying"}\n'])
def test_a_driver_that_cannot_tell_how_far_it_came_says_only_what_it_knows(
    before: bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / "progress.jsonl"
    if before is not None:
        file.write_bytes(before)
    FileSink(file).report(Stage.DONE)
    assert b'"stage":"Done"' in file.read_bytes()
