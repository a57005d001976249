"""Runs many plans, one after the other, inside one Ray Train group: starting a group costs more than they do.

`train_all` is the group's worker function. Each folder <workdir>/<name>/ holds plan.json and prepared.json of a run;
rank 0 leaves there what the run leaves, and every rank leaves ended-<rank>.json with how it ended.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from finetune_api.plan import RunPlan
from finetune_trainers import worker
from finetune_trainers.context import RayTrainContext
from finetune_trainers.errors import TrainerError
from finetune_trainers.loop import LoopResult
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.worker_process import LOG_FILE, log_to

__all__ = ["train_all"]


def train_all(orders: dict[str, str]) -> worker.WorkerResult:
    workdir = Path(orders["workdir"])
    log_to(workdir / LOG_FILE, "worker")
    for run in sorted(path.parent for path in workdir.glob("*/plan.json")):
        plan = RunPlan.model_validate_json((run / "plan.json").read_bytes())
        prepared = PreparedRun.model_validate_json((run / "prepared.json").read_bytes())
        context = RayTrainContext(plan, run)
        ended: dict[str, object] = {"failure": None}
        try:
            worker.run(plan, prepared, context, run)
        except TrainerError as error:
            ended = {"failure": error.failure_class, "message": error.message, "step": error.step}
        (run / f"ended-{context.rank}.json").write_text(json.dumps(ended))
    return worker.WorkerResult(time.time(), LoopResult())
