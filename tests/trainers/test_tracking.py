"""Figures are read back from each tracker's own files, by the tracker's own reader where it has one."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune_api.job import FineTuneJob
from finetune_api.plan import RunPlan
from finetune_api.progress import Result
from finetune_operator.planning import plan_run
from finetune_trainers.errors import UserError
from finetune_trainers.tracking import Tracker, Trackers, check_trackers, open_trackers


def a_plan(**tracking: Mapping[str, Any]) -> RunPlan:
    document = {
        "metadata": {"name": "tracked"},
        "spec": {
            "model": {"source": "hf://org/model-8B"},
            "data": {"train": [{"source": "file:///rows.jsonl"}]},
            "method": {"sft": {}},
            "tuning": {"lora": {}},
            "training": {"maxSteps": 10},
            "tracking": tracking,
        },
    }
    return plan_run(FineTuneJob.model_validate(document))


def points(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Trackers]]:
    """Open trackers as a start of the run does; whatever is open at the end of the test is closed."""
    opened: list[Trackers] = []

    def start(*others: Tracker) -> Trackers:
        opened.append(Trackers(tmp_path, others))
        return opened[-1]

    yield start
    for trackers in opened:
        trackers.close(Result.SUCCEEDED)


Start = Callable[..., Trackers]

# metrics.jsonl


def test_each_log_is_one_line_with_step_time_and_metrics(tmp_path: Path) -> None:
    trackers = open_trackers(a_plan(), tmp_path, "tracked")
    trackers.log(1, {"loss": 2.5, "learning_rate": 1e-4})
    (point,) = points(tmp_path)  # on disk before close
    assert point.pop("time").endswith("Z")
    assert point == {"step": 1, "metrics": {"loss": 2.5, "learning_rate": 1e-4}}
    trackers.close(Result.SUCCEEDED)


def test_the_log_tells_each_figure_once_too(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    trackers = start()
    with caplog.at_level(logging.INFO):
        trackers.log(1, {"loss": 2.5})
        trackers.log(1, {"loss": 2.5, "eval_loss": math.nan})
    assert caplog.messages == ['step 1: {"loss": 2.5}', 'step 1: {"eval_loss": NaN}']


def test_evaluation_figures_of_the_same_step_are_added(tmp_path: Path, start: Start) -> None:
    trackers = start()
    trackers.log(1, {"loss": 2.5})
    trackers.log(1, {"eval_loss": 2.4})
    assert [point["metrics"] for point in points(tmp_path)] == [
        {"loss": 2.5},
        {"eval_loss": 2.4},
    ]


def test_a_restart_adds_only_what_the_file_does_not_have(tmp_path: Path, start: Start) -> None:
    first = start()
    for step in (1, 2, 3):
        first.log(step, {"loss": 1 / step})
    first.close(Result.FAILED)
    second = start()
    for step in (2, 3, 4):
        second.log(step, {"loss": 1 / step})
    second.log(3, {"eval_loss": 0.5, "loss": 1 / 3})
    assert [(point["step"], sorted(point["metrics"])) for point in points(tmp_path)] == [
        (1, ["loss"]),
        (2, ["loss"]),
        (3, ["loss"]),
        (4, ["loss"]),
        (3, ["eval_loss"]),
    ]


def test_a_line_that_was_cut_off_is_removed_and_its_step_written_again(tmp_path: Path, start: Start) -> None:
    first = start()
    first.log(1, {"loss": 2.0})
    first.close(Result.FAILED)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time": "20')
    second = start()
    second.log(2, {"loss": 1.5})
    assert [point["metrics"] for point in points(tmp_path)] == [
        {"loss": 2.0},
        {"loss": 1.5},
    ]


def test_a_figure_that_is_not_a_number_is_null(tmp_path: Path, start: Start) -> None:
    start().log(1, {"grad_norm": math.inf, "loss": 2.0})
    assert points(tmp_path)[0]["metrics"] == {"grad_norm": None, "loss": 2.0}


def test_samples_of_a_step_are_one_file_and_the_same_step_again_replaces_it(tmp_path: Path, start: Start) -> None:
    trackers = start()
    trackers.log_samples(100, [{"answer": "old"}, {"answer": "old"}])
    path = trackers.log_samples(100, [{"answer": "naïve"}])
    assert path == tmp_path / "samples" / "step-000100.jsonl"
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"answer": "naïve"}]
    assert [file.name for file in path.parent.iterdir()] == ["step-000100.jsonl"]


class Failing:
    name = "Failing"

    def __init__(self) -> None:
        self.num_calls = 0

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.num_calls += 1
        raise ConnectionError("server is down")

    def close(self, result: Result) -> None:
        raise AssertionError("a dropped tracker is not closed")


def test_a_tracker_that_fails_is_dropped_with_one_warning(
    tmp_path: Path, start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    failing = Failing()
    trackers = start(failing)
    with caplog.at_level(logging.WARNING):
        trackers.log(1, {"loss": 2.0})
        trackers.log(2, {"loss": 1.0})
    assert failing.num_calls == 1
    assert [record.getMessage() for record in caplog.records] == [
        "Failing failed and gets no more figures of this run: server is down"
    ]
    assert len(points(tmp_path)) == 2


# TensorBoard


def test_tensorboard_shows_the_figures_and_the_plan(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trackers = open_trackers(a_plan(tensorboard={}), tmp_path, "tracked")
    trackers.log(1, {"loss": 2.5})
    trackers.log(2, {"loss": 1.5, "eval_loss": 2.0})
    trackers.close(Result.SUCCEEDED)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (1, 2.5),
        (2, 1.5),
    ]
    assert [(event.step, event.value) for event in events.Scalars("eval_loss")] == [(2, 2.0)]
    assert "hf://org/model-8B" in str(events.Tensors("plan/text_summary")[0].tensor_proto.string_val[0])


# Weights & Biases


def wandb_records(path: Path) -> list[Any]:
    """The records of a .wandb file: LevelDB's log format (blocks of 32 KiB, 7-byte headers) after 7 bytes of magic."""
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]  # generated

    data, position, parts, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
        _, length, kind = struct.unpack_from("<IHB", data, position)
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(parts))
            parts = b""
    return records


def wandb_history(workdir: Path) -> list[dict[str, Any]]:
    history: list[dict[str, Any]] = []
    for path in sorted(workdir.glob("wandb/offline-run-*/run-*.wandb")):
        rows = [record.history for record in wandb_records(path) if record.HasField("history")]
        for row in rows:
            values = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item}
            history.append({key: value for key, value in values.items() if key[0] != "_" or key == "_step"})
    return history


@pytest.fixture
def num_connections(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Number of connections that anyone tried to make to the outside: a proxy that counts and hangs up."""
    server = socket.create_server(("127.0.0.1", 0))
    accepted: list[Any] = []

    def accept() -> None:
        while True:
            try:
                connection, address = server.accept()
            except OSError:
                return
            accepted.append(address)
            connection.close()

    threading.Thread(target=accept, daemon=True).start()
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield lambda: len(accepted)
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def test_wandb_offline_keeps_the_figures_in_files_and_calls_nobody(tmp_path: Path, num_connections: Any) -> None:
    plan = a_plan(wandb={"project": "tests", "mode": "offline"})
    trackers = open_trackers(plan, tmp_path, "tracked")
    trackers.log(1, {"loss": 2.5})
    trackers.log(1, {"eval_loss": 2.25})
    trackers.log(2, {"loss": 1.5})
    trackers.close(Result.SUCCEEDED)
    assert wandb_history(tmp_path) == [
        {"_step": 1, "loss": 2.5, "eval_loss": 2.25},
        {"_step": 2, "loss": 1.5},
    ]
    assert num_connections() == 0


def test_wandb_goes_on_in_the_same_run_after_a_restart(tmp_path: Path, start: Start) -> None:
    plan = a_plan(wandb={"project": "tests", "mode": "offline"})
    for steps in ((1, 2), (2, 3)):
        trackers = open_trackers(plan, tmp_path, "tracked")
        for step in steps:
            trackers.log(step, {"loss": 1 / step})
        trackers.close(Result.FAILED)
    ids = {path.stem for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")}
    assert len(ids) == 1
    assert [row["_step"] for row in wandb_history(tmp_path)] == [1, 2, 3]


# MLflow


# MLflow 3.17 still sets a loader strategy that SQLAlchemy 2.1 deprecates.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_mlflow_keeps_the_figures_in_a_database_and_one_run_over_restarts(
    tmp_path: Path,
) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    plan = a_plan(mlflow={"experiment": "tests", "trackingUri": uri})
    for steps, result in (((1, 2), Result.FAILED), ((2, 3), Result.SUCCEEDED)):
        trackers = open_trackers(plan, tmp_path, "tracked")
        for step in steps:
            trackers.log(step, {"loss": 1 / step, "eval_loss": 2 / step})
        trackers.close(result)
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("tests")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("tracked", "FINISHED")
    assert run.data.params["model.source"] == "hf://org/model-8B"
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [
        (1, 1.0),
        (2, 0.5),
        (3, 1 / 3),
    ]


# What is refused before workers start


def problem_of(plan: RunPlan) -> str:
    with pytest.raises(UserError) as raised:
        check_trackers(plan)
    return str(raised.value.problems[0])


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("tensorboard", {}),
        ("wandb", {"project": "p", "mode": "offline"}),
        ("mlflow", {"experiment": "e", "trackingUri": "https://mlflow.example"}),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    monkeypatch: pytest.MonkeyPatch, field: str, settings: dict[str, Any]
) -> None:
    check_trackers(a_plan(**{field: settings}))  # with the package, nothing is wrong
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert problem_of(a_plan(**{field: settings})) == (
        f"spec.tracking.{field}: the Python package {field} is not installed; "
        f"install it with: pip install 'finetune-operator[{field}]'"
    )


def test_wandb_online_needs_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    plan = a_plan(wandb={"project": "p"})
    assert "set WANDB_API_KEY, or mode: offline" in problem_of(plan)
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    check_trackers(plan)
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "key")
    check_trackers(plan)


def test_mlflow_must_be_told_where_to_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    plan = a_plan(mlflow={"experiment": "e"})
    assert "MLFLOW_TRACKING_URI" in problem_of(plan)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    check_trackers(plan)


def test_a_folder_for_mlflow_is_refused_because_mlflow_refuses_it() -> None:
    message = problem_of(a_plan(mlflow={"experiment": "e", "trackingUri": "file:///tmp/mlruns"}))
    assert "sqlite:////path/mlflow.db" in message
    assert "(found file:///tmp/mlruns)" in message
