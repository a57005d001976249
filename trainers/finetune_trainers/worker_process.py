"""The outermost function of a Ray Train worker: reads its orders, sends its output to the run's log, types its errors.

Imports nothing heavy until it runs, because Ray's driver imports it too.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.plan import RunPlan
from finetune_trainers.errors import classified
from finetune_trainers.prepared import PreparedRun

if TYPE_CHECKING:
    from finetune_trainers.worker import WorkerResult

__all__ = ["LOG_FILE", "log_to", "train"]

LOG_FILE = "trainer.log"
"""In the run's folder: all that the launcher and the workers print, tracebacks included."""


def train(orders: dict[str, str]) -> WorkerResult:
    """Run one worker of the group. `orders` holds plan and prepared as JSON, workdir, and the group's id
    where it may be asked to give way to a larger one. Raises TrainerError only."""
    import ray.train

    workdir = Path(orders["workdir"])
    rank = ray.train.get_context().get_world_rank()
    log_to(workdir / LOG_FILE, f"worker {rank}")
    try:
        from finetune_trainers import worker
        from finetune_trainers.context import RayTrainContext
        from finetune_trainers.preparing import prepared_here

        plan = RunPlan.model_validate_json(orders["plan"])
        context = RayTrainContext(plan, workdir, orders.get("group"))
        prepared = prepared_here(plan, PreparedRun.model_validate_json(orders["prepared"]), context)
        return worker.run(plan, prepared, context, workdir)
    except BaseException as error:
        logging.getLogger(__name__).exception("The worker failed")
        raise classified(error) from None


def log_to(path: Path, who: str) -> None:
    """Send this process's output, what C++ prints included, and its log records to the end of the file at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for number in (1, 2):
        os.dup2(descriptor, number)
    os.close(descriptor)
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format=f"%(asctime)s {who} %(levelname)s %(message)s", force=True
    )
    logging.captureWarnings(True)
    # DeepSpeed calls collectives by names that torch has renamed, at every layer of every step
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
