"""Where a run's figures go: metrics.jsonl and the log always, and TensorBoard, Weights & Biases or MLflow when the job
asks.

The driver calls `check_trackers` before any worker starts; rank 0 calls `open_trackers`, then `log` at each step.

    metrics.jsonl              {"step": 20, "time": "2026-01-31T10:15:02Z", "metrics": {"loss": 1.84}}, one per line
    samples/step-000100.jsonl  answers of an evaluation, one per line
    tracking.json              ids of the W&B and MLflow runs, so that a restart goes on in the same ones
    tensorboard/ wandb/        files of those trackers

A figure is written once per step. A restarted run that passes through steps again adds only what is missing. Packages
are imported when asked for, and their own reports to their makers are switched off.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import netrc
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from finetune_api.failures import Problem
from finetune_api.figures import line_of
from finetune_api.plan import RunPlan
from finetune_api.progress import Result
from finetune_api.spec import MlflowTracking, WandbTracking
from finetune_trainers.errors import UserError

__all__ = ["Tracker", "Trackers", "check_trackers", "open_trackers"]

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
_RUN_IDS_FILE = "tracking.json"


class Tracker(Protocol):
    """A place for figures. One that raises is dropped, and training goes on."""

    name: str

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self, result: Result) -> None: ...


class Trackers:
    """All the places of one run."""

    def __init__(self, workdir: Path, others: Iterable[Tracker]) -> None:
        self._workdir = workdir
        self._metrics_file = MetricsFile(workdir / METRICS_FILE)
        self._others = list(others)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record figures of an optimizer step. Those that the step already has are left as they are."""
        new = self._metrics_file.append(step, metrics)
        if new:
            logger.info(line_of(step, new))
            self._tell(lambda tracker: tracker.log(step, new))

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> Path:
        """Write the answers of one evaluation; returns their file. The same step again replaces it."""
        path = self._workdir / "samples" / f"step-{step:06}.jsonl"
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
            encoding="utf-8",
        )
        return unfinished.replace(path)

    def close(self, result: Result) -> None:
        self._tell(lambda tracker: tracker.close(result))
        self._metrics_file.close()

    def _tell(self, message: Callable[[Tracker], None]) -> None:
        """Pass a message on. A server that is down must not end a training that goes well."""
        for tracker in list(self._others):
            try:
                message(tracker)
            except Exception as error:
                self._others.remove(tracker)
                logger.warning(
                    "%s failed and gets no more figures of this run: %s",
                    tracker.name,
                    error,
                )


class MetricsFile:
    """metrics.jsonl: append-only, every line on disk before the next step."""

    def __init__(self, path: Path) -> None:
        self._written = _figures_in(path)
        self._file = path.open("a", encoding="utf-8")

    def append(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Write what the step does not have yet, and return that. NaN and infinities, which JSON has not, are null."""
        known = self._written.setdefault(step, set())
        new = {name: float(value) for name, value in metrics.items() if name not in known}
        if new:
            known.update(new)
            figures = {name: value if math.isfinite(value) else None for name, value in new.items()}
            now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            self._file.write(json.dumps({"step": step, "time": now, "metrics": figures}) + "\n")
            self._file.flush()
        return new

    def close(self) -> None:
        self._file.close()


def _figures_in(path: Path) -> dict[int, set[str]]:
    """The names of the figures that an earlier start has written, by step. A last line that was cut off while it was
    written is removed."""
    written: dict[int, set[str]] = {}
    if not path.exists():
        return written
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    for line in whole.splitlines():
        point = json.loads(line)
        written.setdefault(point["step"], set()).update(point["metrics"])
    return written


class RunIds:
    """tracking.json: by tracker, the id of this run there."""

    def __init__(self, workdir: Path) -> None:
        self._path = workdir / _RUN_IDS_FILE

    def get(self, tracker: str) -> str | None:
        return self._read().get(tracker)

    def put(self, tracker: str, run_id: str) -> None:
        self._path.write_text(json.dumps(self._read() | {tracker: run_id}), encoding="utf-8")

    def _read(self) -> dict[str, str]:
        return dict(json.loads(self._path.read_text(encoding="utf-8"))) if self._path.exists() else {}


class TensorBoard:
    """Event files that `tensorboard --logdir` shows."""

    name = "TensorBoard"

    def __init__(self, plan: RunPlan, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(log_dir=str(folder))
        self._writer.add_text("plan", f"```json\n{plan.model_dump_json(by_alias=True, indent=2)}\n```")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, result: Result) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run; offline it is files under wandb/ that `wandb sync` sends later."""

    name = "Weights & Biases"

    def __init__(
        self,
        plan: RunPlan,
        settings: WandbTracking,
        workdir: Path,
        run_name: str,
        ids: RunIds,
    ) -> None:
        os.environ["WANDB_ERROR_REPORTING"] = "false"  # read when the package is imported
        import wandb

        run_id = ids.get("wandb")
        self._teardown = wandb.teardown
        self._run = wandb.init(
            project=settings.project,
            entity=settings.entity,
            name=run_name,
            id=run_id,
            resume="allow" if run_id and settings.mode == "online" else None,
            mode=settings.mode,
            dir=str(workdir),
            config=plan.to_document(),
            settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
        )
        ids.put("wandb", self._run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self, result: Result) -> None:
        self._run.summary["result"] = result.value
        self._run.finish(exit_code=0 if result is Result.SUCCEEDED else 1)
        # finish() returns while W&B's own process still writes, and a worker may be ended right after; this waits.
        self._teardown()


class Mlflow:
    """An MLflow run on a tracking server, or in a database file on this machine."""

    name = "MLflow"

    def __init__(self, plan: RunPlan, settings: MlflowTracking, run_name: str, ids: RunIds) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when the package is imported
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=settings.tracking_uri or os.environ["MLFLOW_TRACKING_URI"])
        run_id = ids.get("mlflow")
        if run_id is None:
            run_id = self._client.create_run(self._experiment(settings.experiment), run_name=run_name).info.run_id
            params = [Param(key, value) for key, value in _flat(plan.to_document())]
            for start in range(0, len(params), 100):  # the most that a server takes at once
                self._client.log_batch(run_id, params=params[start : start + 100])
            ids.put("mlflow", run_id)
        else:
            self._client.set_terminated(run_id, status="RUNNING")
        self._run_id = run_id

    def _experiment(self, name: str) -> str:
        known = self._client.get_experiment_by_name(name)
        return known.experiment_id if known else self._client.create_experiment(name)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        now_ms = int(datetime.now(UTC).timestamp() * 1000)
        self._client.log_batch(
            self._run_id,
            metrics=[self._metric(name, value, now_ms, step) for name, value in metrics.items()],
        )

    def close(self, result: Result) -> None:
        status = {
            Result.SUCCEEDED: "FINISHED",
            Result.FAILED: "FAILED",
            Result.CANCELLED: "KILLED",
        }[result]
        self._client.set_terminated(self._run_id, status=status)


def _flat(document: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Leaves of nested objects as MLflow's parameters: dotted names, values as JSON of at most 6,000 characters."""
    leaves: list[tuple[str, str]] = []
    for key, value in document.items():
        if isinstance(value, Mapping):
            leaves += _flat(value, f"{prefix}{key}.")
        else:
            leaves.append(
                (
                    f"{prefix}{key}"[:250],
                    (value if isinstance(value, str) else json.dumps(value))[:6000],
                )
            )
    return leaves


def open_trackers(plan: RunPlan, workdir: Path, run_name: str) -> Trackers:
    """Open what the plan asks for. For rank 0 only. Raises UserError when a tracker refuses to start."""
    tracking, ids = plan.tracking, RunIds(workdir)
    others: list[Tracker] = []
    if tracking.tensorboard:
        others.append(TensorBoard(plan, workdir / "tensorboard"))
    if wandb := tracking.wandb:
        others.append(_started("wandb", lambda: WeightsAndBiases(plan, wandb, workdir, run_name, ids)))
    if mlflow := tracking.mlflow:
        others.append(_started("mlflow", lambda: Mlflow(plan, mlflow, run_name, ids)))
    return Trackers(workdir, others)


def _started(field: str, start: Callable[[], Tracker]) -> Tracker:
    try:
        return start()
    except Exception as error:  # each package has its own errors; the person can mend or remove the tracker
        raise _refused(field, f"the tracker did not start: {error}") from error


def check_trackers(plan: RunPlan) -> None:
    """Raise UserError for a tracker that cannot work: its package is missing, or nobody said where it should log."""
    tracking = plan.tracking
    for field, package in (
        ("tensorboard", "tensorboard"),
        ("wandb", "wandb"),
        ("mlflow", "mlflow"),
    ):
        if getattr(tracking, field) and importlib.util.find_spec(package) is None:
            raise _refused(
                field,
                f"the Python package {package} is not installed; "
                f"install it with: pip install 'finetune-operator[{field}]'",
            )
    if tracking.wandb and tracking.wandb.mode == "online" and not _has_wandb_key():
        raise _refused(
            "wandb",
            "there is no key for Weights & Biases; set WANDB_API_KEY, or mode: offline",
        )
    if tracking.mlflow:
        _check_mlflow_uri(tracking.mlflow.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI"))


def _check_mlflow_uri(uri: str | None) -> None:
    if not uri:
        raise _refused(
            "mlflow.trackingUri",
            "is not set, and neither is MLFLOW_TRACKING_URI; give a server (https://host) or sqlite:////path/mlflow.db",
        )
    scheme = urlsplit(uri).scheme
    if scheme in ("", "file"):
        raise _refused(
            "mlflow.trackingUri",
            "MLflow no longer logs to folders; give a server (https://host) or sqlite:////path/mlflow.db",
            uri,
        )
    if scheme not in ("http", "https", "databricks") and importlib.util.find_spec("sqlalchemy") is None:
        raise _refused(
            "mlflow.trackingUri",
            "a database needs the Python packages sqlalchemy and alembic; "
            "install them with: pip install 'finetune-operator[mlflow]'",
            uri,
        )


def _has_wandb_key() -> bool:
    """A key by environment, or one that `wandb login` left in the netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _refused(field: str, message: str, value: str | None = None) -> UserError:
    problem = Problem(path=f"spec.tracking.{field}", value=value, message=message)
    return UserError(str(problem), [problem])
