"""The places that a job names for its result: checked before training by `launch`, filled after it by `worker`."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_api.progress import Artifact
from finetune_trainers.errors import UserError
from finetune_trainers.model_sources import local_path
from finetune_trainers.places import uri_of
from finetune_trainers.prepared import PreparedModel

__all__ = ["check_outputs", "publish"]


def check_outputs(plan: RunPlan) -> None:
    """Raise UserError for outputs that cannot be written: something is there already, or two are the same."""
    problems: list[Problem] = []
    seen: set[Path] = set()
    for index, output in enumerate(plan.outputs):
        folder = local_path(output.to).absolute()
        path = f"spec.outputs[{index}].to"
        if folder in seen:
            problems.append(
                Problem(path=path, value=output.to, message="is named twice; give each output its own folder")
            )
        elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            problems.append(
                Problem(
                    path=path, value=output.to, message="holds something already; name a folder that is not there yet"
                )
            )
        seen.add(folder)
    if problems:
        raise UserError("; ".join(map(str, problems)), problems)


def publish(plan: RunPlan, model: PreparedModel, artifact: Artifact) -> list[Artifact]:
    """Write each output of the job from the artifact in the run's folder: a copy, or the merged model."""
    parts = urlsplit(artifact.uri)
    source = Path(unquote(parts.path)) if parts.scheme == "file" else local_path(artifact.uri)
    published = []
    for output in plan.outputs:
        folder = local_path(output.to).absolute()
        if output.merge:
            from finetune_trainers.merge import merge_adapter

            published.append(merge_adapter(Path(model.folder), source, folder, plan.precision))
        else:
            _copy(source, folder)
            published.append(artifact.model_copy(update={"uri": uri_of(folder)}))
    return published


def _copy(source: Path, folder: Path) -> None:
    """Copy a folder beside its place and rename it: it is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        shutil.copytree(source, unfinished, dirs_exist_ok=True)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
