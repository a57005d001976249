"""Where the models that jobs have written are, seen from this machine. Used by `client` and by `finetune serve`."""

from __future__ import annotations

import os
from pathlib import Path

from finetune_api.uris import BUCKETS, Scheme, Uri, parse_uri
from finetune_client.advice import typed
from finetune_client.errors import NoModel
from finetune_client.views import JobView

__all__ = ["folder_of", "model_folder"]


def folder_of(uri: Uri) -> Path | None:
    """On this machine, whether or not it is there; None for what can only be elsewhere."""
    if uri.scheme is Scheme.FILE:
        return Path(uri.path)
    if uri.scheme is Scheme.PVC:
        return Path(os.environ.get("FINETUNE_PVC_ROOT", "/mnt/pvc"), uri.authority, uri.path)
    return None


def model_folder(view: JobView) -> Path:
    """The first model of the job whose folder is here. Raises NoModel with what to do about it."""
    uris = [parse_uri(artifact.uri) for artifact in view.artifacts]
    for folder in map(folder_of, uris):
        if folder is not None and folder.is_dir():
            return folder
    if not uris:
        raise NoModel(f"job {view.name} is {view.phase} and has written no model; {typed('describe', view)} says why")
    raise NoModel(f"the model of job {view.name} is {uris[0]}, which is not on this machine; {_how_to_get(uris[0])}")


def _how_to_get(uri: Uri) -> str:
    if uri.scheme in BUCKETS:
        tool = "aws s3 sync" if uri.scheme is Scheme.S3 else "gcloud storage rsync -r"
        return f"copy it here: {tool} {uri} ./model"
    if uri.scheme is Scheme.PVC:
        return f"mount claim {uri.authority} here and let FINETUNE_PVC_ROOT name the folder above it, or copy it here"
    return "copy that folder here from the machine that has trained it"
