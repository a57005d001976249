"""What the driver has prepared, on a worker's machine. Called by `worker_process`.

Driver and worker are different pods, which need not share a disk. Where a worker does not find the model and the data
that the driver has seen to be right, it makes them from the same sources, by the same functions, in a cache of its own:
they are named by what they are made of, so it is seen whether they are the same.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_api.plan import RunPlan
from finetune_api.progress import Stage
from finetune_trainers.context import WorkerContext
from finetune_trainers.errors import DataError
from finetune_trainers.places import cache_folder
from finetune_trainers.prepared import PreparedModel, PreparedRun

__all__ = ["prepared_here"]

_LOCK = ".preparing.lock"


def prepared_here(plan: RunPlan, prepared: PreparedRun, context: WorkerContext) -> PreparedRun:
    """`prepared`, with folders that this process can read. Raises UserError or DataError, as the driver would, and when
    a source has changed since the driver read it."""
    if all(Path(folder).is_dir() for folder in _folders(prepared)):
        return prepared
    context.report(
        Stage.PREPARING_DATA, message="model and data, on the worker's own disk: it shares none with the head"
    )
    with _one_at_a_time(cache_folder()) as cache:
        made = _made(plan, prepared, cache)
    if _names(made) != _names(prepared):
        raise DataError("the model or the data has changed since the run began to read it; start the job anew")
    return made


def _made(plan: RunPlan, prepared: PreparedRun, cache: Path) -> PreparedRun:
    from finetune_trainers.data.prepare import prepare_data
    from finetune_trainers.models import prepare_model
    from finetune_trainers.teacher import prepare_teacher

    def silent(percent: float, text: str) -> None:
        """The driver has told it all once."""

    model = prepare_model(plan, cache, silent)
    teacher = None if prepared.teacher is None else prepare_teacher(plan, model, cache, silent)
    data = prepare_data(plan, model, cache, silent)
    return prepared.model_copy(update={"model": model, "teacher": teacher, "data": data})


@contextmanager
def _one_at_a_time(cache: Path) -> Iterator[Path]:
    """Of the workers on this machine; those that come later find what the first has made."""
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / _LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield cache


def _models(prepared: PreparedRun) -> list[PreparedModel]:
    return [model for model in (prepared.model, prepared.teacher) if model is not None]


def _folders(prepared: PreparedRun) -> list[str]:
    of_models = [folder for model in _models(prepared) for folder in (model.folder, model.tokenizer_folder)]
    return [*of_models, *(source.folder for source in (*prepared.data.train, *prepared.data.eval))]


def _names(prepared: PreparedRun) -> list[str]:
    """Of contents: the same for the same model and the same rows."""
    sources = [Path(source.folder).name for source in (*prepared.data.train, *prepared.data.eval)]
    return [*(model.digest for model in _models(prepared)), *sources]
