"""What a person calls a model -> where it is, as the trainers are told, and a name for it.

job://support-bot                   its newest run below ./runs with a model, else what the job elsewhere has written
runs/support-bot/20250101-120000    a run's folder, or an artifact's
pvc://models/support-bot            a folder of a claim that is mounted here; file:///path too
s3://bucket/support-bot             an artifact in a bucket, which the trainers fetch; gs:// too
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.job import Phase
from finetune_api.uris import BUCKETS, Scheme, Uri, parse_uri
from finetune_client.advice import typed
from finetune_client.cli.artifacts import find_artifact
from finetune_client.cli.exits import ABSENT, INVALID
from finetune_client.cli.jobs.verbs import Where, code_of
from finetune_client.errors import ClientError
from finetune_client.models import folder_of
from finetune_client.views import JobView

__all__ = ["NotServable", "Served", "to_serve"]

SAMPLE = "manifests/samples/serving/adapter.yaml"
_RUNS = Path("runs")


class NotServable(ValueError):
    """There is no such model here; the message says what would be right."""

    def __init__(self, message: str, code: int = INVALID) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Served:
    """A model that can be had on this machine."""

    option: list[str]
    """How the trainers' command line names it."""
    what: str
    """For people: what it is and where."""
    name: str
    is_whole: bool = False
    """It is known to be no adapter."""


def to_serve(source: str, where: Where) -> Served:
    """What `source` names. `where` is asked for a job that has not run here. Raises NotServable."""
    if "://" not in source:
        return _of_folder(Path(source), None)
    try:
        uri = parse_uri(source)
    except ValueError as error:
        raise NotServable(f"{source} {error}") from error
    if uri.scheme is Scheme.JOB:
        return _of_job(uri.authority, where)
    return _of_uris([uri], None)


def _of_uris(uris: Sequence[Uri], name: str | None) -> Served:
    """The first of them that can be had here, disks before buckets."""
    for uri in uris:
        folder = folder_of(uri)
        if folder is not None and folder.is_dir():
            return _of_folder(folder, name)
    for uri in uris:
        if uri.scheme in BUCKETS and uri.path.strip("/"):
            return Served(
                ["--artifact", str(uri)], f"the artifact at {uri}", name or uri.path.rstrip("/").split("/")[-1]
            )
    raise NotServable(f"{uris[0]} {_elsewhere(uris[0])}")


def _of_folder(folder: Path, name: str | None) -> Served:
    try:
        artifact = find_artifact(folder)
    except ValueError as error:
        if _is_at_work(folder):
            raise NotServable(f"{folder} is the folder of a run at work, which has written no model yet") from error
        raise NotServable(str(error)) from error
    kind = "adapter" if artifact.is_adapter else "model"
    name = name or _job_of(artifact.folder) or artifact.folder.resolve().name
    return Served(artifact.option, f"the {kind} in {artifact.folder}", name, is_whole=not artifact.is_adapter)


def _job_of(artifact: Path) -> str | None:
    """Its name, where the artifact lies in the folder of a run."""
    try:
        name = json.loads((artifact.parent / "plan.json").read_bytes())["name"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(name) if artifact.name == "artifact" else None


def _of_job(name: str, where: Where) -> Served:
    runs = [] if where.is_said else sorted((file.parent for file in (_RUNS / name).glob("*/plan.json")), reverse=True)
    for run in runs:
        if (run / "artifact").is_dir():
            return _of_folder(run, name)
    if runs:
        return _of_folder(runs[0], name)  # says why not
    try:
        with where.client() as client:
            view = client.job(name).view()
    except ClientError as error:
        here = "" if where.is_said else f"there is no run of {name} below {_RUNS}/, and "
        raise NotServable(f"{here}{error}", code_of(error)) from error
    return _of_view(view)


def _of_view(view: JobView) -> Served:
    """The model of a job that ran elsewhere, where its disk is here too."""
    if not view.artifacts:
        raise NotServable(_nothing_yet(view), ABSENT)
    try:
        return _of_uris([parse_uri(artifact.uri) for artifact in view.artifacts], view.name)
    except NotServable as error:
        raise NotServable(f"the model of job {view.name} is not on this machine: {error}", ABSENT) from error


def _nothing_yet(view: JobView) -> str:
    if view.phase is Phase.FAILED:
        return f"job {view.name} has failed and written no model; {typed('describe', view)} says why"
    return f"job {view.name} is {view.phase} and has written no model yet; {typed('watch', view)} follows it"


def _elsewhere(uri: Uri) -> str:
    """What to do with a model that is not here."""
    if uri.scheme is Scheme.PVC:
        return (
            f"is on a volume of the cluster, and claim {uri.authority} is not mounted here. Serve it in the cluster, as"
            f" {SAMPLE} does; or copy it here (kubectl cp) and name its folder"
        )
    if uri.scheme in BUCKETS:
        return "is a whole bucket; name the artifact in it"
    if uri.scheme is Scheme.FILE:
        return "is no folder of this machine; name one that is"
    return "is not what a job has trained; name job://NAME, a run's folder, or an artifact's folder"


def _is_at_work(folder: Path) -> bool:
    """Whether somebody runs in it: a run holds the lock of its folder, or of the one above with several jobs."""
    return any(_is_locked(one) for one in (folder, folder.absolute().parent))


def _is_locked(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False
