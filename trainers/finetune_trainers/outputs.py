"""The places that a job names for its result: checked before training by `launch`, filled after it by `worker`.

A folder appears whole, by a rename; in a bucket the list of digests comes last. Where the runtime's storage is a bucket
the machine's disk goes with the pod, so the run's own artifact goes into the storage too: unless an output takes it as
it is.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_api.progress import Artifact
from finetune_api.uris import in_bucket
from finetune_trainers.artifact_folder import DIGESTS, RUN_ARTIFACT
from finetune_trainers.buckets import STORAGE_FIELD, open_for_writing
from finetune_trainers.checkpoint.exports.destination import left_behind, new_destination
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.errors import StorageError, UserError
from finetune_trainers.model_sources import local_path
from finetune_trainers.places import appearing_whole, uri_of
from finetune_trainers.prepared import PreparedModel

__all__ = ["check_buckets", "check_outputs", "publish"]


def check_outputs(plan: RunPlan) -> None:
    """Raise UserError for outputs that cannot be written: something is there already, or two are the same. What is in
    buckets is not looked at."""
    problems: list[Problem] = []
    seen: set[str] = set()
    for index, output in enumerate(plan.outputs):
        folder = None if in_bucket(output.to) else local_path(output.to).absolute()
        place, path = output.to.rstrip("/") if folder is None else str(folder), f"spec.outputs[{index}].to"
        if place in seen:
            problems.append(
                Problem(path=path, value=output.to, message="is named twice; give each output its own folder")
            )
        elif folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            problems.append(
                Problem(
                    path=path, value=output.to, message="holds something already; name a folder that is not there yet"
                )
            )
        seen.add(place)
    if problems:
        raise UserError("; ".join(map(str, problems)), problems)


def check_buckets(plan: RunPlan) -> None:
    """Write a trifle into each bucket that the run will write to, and delete it. Raises UserError for what a person
    must mend, StorageError for a store that does not answer."""
    if plan.storage is not None and in_bucket(plan.storage):
        open_for_writing(plan.storage, STORAGE_FIELD)
    for index, output in enumerate(plan.outputs):
        if in_bucket(output.to):
            field = f"spec.outputs[{index}].to"
            left_behind(open_for_writing(output.to, field), output.to, field, _writer(plan))


def publish(
    plan: RunPlan, model: PreparedModel, artifact: Artifact, tell: Callable[[str], None] = lambda place: None
) -> list[Artifact]:
    """Write each output of the job from the artifact in the run's folder: a copy, or the merged model. `tell` hears of
    each place before it is written.

    -> all artifacts of the run that will be there when its machine is not: the first is the one in the run's folder,
    where that is not a pod's own disk.
    """
    parts = urlsplit(artifact.uri)
    source = Path(unquote(parts.path)) if parts.scheme == "file" else local_path(artifact.uri)
    published = [] if in_bucket(plan.storage) else [artifact]
    if in_bucket(plan.storage) and all(output.merge for output in plan.outputs):
        place = _own_place(plan)
        tell(place)
        published.append(_upload(source, artifact, place, STORAGE_FIELD, _writer(plan)))
    for index, output in enumerate(plan.outputs):
        field = f"spec.outputs[{index}].to"
        to = output.to.rstrip("/") if in_bucket(output.to) else str(local_path(output.to).absolute())
        tell(output.to)
        if output.merge:
            from finetune_trainers.merge import merge_adapter

            merged = merge_adapter(Path(model.folder), source, to, plan.precision, field, _writer(plan))
            published.append(merged)
        elif in_bucket(to):
            published.append(_upload(source, artifact, to, field, _writer(plan)))
        else:
            _copy(source, Path(to))
            published.append(artifact.model_copy(update={"uri": uri_of(Path(to))}))
    return published


def _writer(plan: RunPlan) -> str:
    """Who writes: all attempts of a job are one."""
    return f"{plan.namespace}/{plan.name}"


def _own_place(plan: RunPlan) -> str:
    """Below the storage, as it would lie on a claim. What a deleted job of the same name has left there stays."""
    from finetune_trainers.intents import attempt_number  # brings torch

    place = f"{plan.storage}/attempt-{attempt_number()}/{RUN_ARTIFACT}"
    others = (f"{place}-{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([place], others) if _is_free(one, _writer(plan)))


def _is_free(place: str, writer: str) -> bool:
    try:
        left_behind(open_storage(place, exclusive=True), place, STORAGE_FIELD, writer)
    except UserError:
        return False
    return True


def _upload(source: Path, artifact: Artifact, to: str, field: str, writer: str) -> Artifact:
    """The same artifact in a bucket, with the same list of digests."""
    named_base = json.loads((source / DIGESTS).read_text())["base"]
    with new_destination(to, field, writer) as destination:
        for path in sorted(path for path in source.rglob("*") if path.is_file() and path.name != DIGESTS):
            destination.add_file(path.relative_to(source).as_posix(), path)
        uploaded = destination.seal(artifact.kind, named_base)
    if uploaded.digest != artifact.digest:
        raise StorageError(f"{to}: what was uploaded is not what was written to {source}")
    return uploaded


def _copy(source: Path, folder: Path) -> None:
    with appearing_whole(folder) as unfinished:
        shutil.copytree(source, unfinished, dirs_exist_ok=True)
