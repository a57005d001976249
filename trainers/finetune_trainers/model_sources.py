"""From a model's URI to files on this machine's disk. Called by `models.prepare_model` on the driver.

hf://org/name           a snapshot in the Hub's own cache (HF_HOME), downloaded when it is not there
file:///path            a folder or a GGUF file
pvc://claim/path        the claim mounted under FINETUNE_PVC_ROOT (default /mnt/pvc)
package://package/path  a file or folder inside an installed package, which is not imported
s3://, gs://            an artifact in a bucket, fetched into the cache and verified
"""

from __future__ import annotations

from pathlib import Path

from finetune_api.failures import Problem
from finetune_api.uris import Scheme, Uri, in_bucket, parse_uri
from finetune_trainers.errors import UserError
from finetune_trainers.places import claim_folder, package_folder

__all__ = ["local_path", "locate_model"]

_SNAPSHOT_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
"""What a causal model consists of. Weights of other frameworks and pickles stay where they are."""


def locate_model(source: str, field: str, revision: str | None = None, remote_code: bool = False) -> Path:
    """The folder or file that `source` names. Raises UserError about `field` when there is none."""
    uri = parse_uri(source)
    if uri.scheme is Scheme.HF:
        return _hub_snapshot(uri, source, field, revision, remote_code)
    if in_bucket(source):
        from finetune_trainers.buckets import fetch_artifact

        return fetch_artifact(source, field)
    if uri.scheme is Scheme.PACKAGE:
        folder = package_folder(uri.authority)
        if folder is None:
            top = uri.authority.split(".")[0]
            raise _refused(field, source, f"the Python package {top} is not installed here; pip install it")
        path = folder / uri.path
        where = f"the installed package {uri.authority} has no such file or folder; correct the path"
    elif uri.scheme is Scheme.PVC:
        path = local_path(source)
        where = f"nothing is at {path}; mount the claim there, or set FINETUNE_PVC_ROOT to where it is mounted"
    elif uri.scheme is Scheme.FILE:
        path = local_path(source)
        where = "no such file or folder; correct the path"
    else:
        raise _refused(field, source, f"a model cannot be read from {uri.scheme}://")
    if not path.exists():
        raise _refused(field, source, where)
    return path


def local_path(source: str) -> Path:
    """The path that a file:// or pvc:// URI stands for, whether or not something is there."""
    uri = parse_uri(source, (Scheme.FILE, Scheme.PVC))
    if uri.scheme is Scheme.FILE:
        return Path(uri.path)
    return claim_folder(uri.authority) / uri.path


def _hub_snapshot(uri: Uri, source: str, field: str, revision: str | None, remote_code: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = "/".join(part for part in (uri.authority, uri.path) if part)
    patterns = [*_SNAPSHOT_FILES, *(["*.py"] if remote_code else [])]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        message = "the repository is gated; ask for access on its page and set HF_TOKEN to your token"
    except RevisionNotFoundError:
        message = f"the repository has no revision {revision}; give a branch, a tag or a whole commit id"
    except RepositoryNotFoundError:
        message = "the Hub has no such repository, or it is private: check the name, or set HF_TOKEN"
    except LocalEntryNotFoundError:
        at = "" if revision is None else f" at revision {revision}"
        message = f"the Hub cannot be reached and its cache does not hold this repository{at}"
    except (HfHubHTTPError, OSError) as error:
        message = f"the Hub did not give the files: {str(error).splitlines()[0]}"
    raise _refused(field, source, message)


def _refused(field: str, source: str, message: str) -> UserError:
    problem = Problem(path=field, value=source, message=message)
    return UserError(str(problem), [problem])
