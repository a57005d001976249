"""Which files a data source means, and what kind they are. Called by `prepare`; nothing is read here.

    file:///path, file://./path     this machine; relative to the working directory
    pvc://claim/path                below $FINETUNE_PVC_ROOT (default /mnt/pvc)
    package://package/path          inside an installed Python package, which is not imported
    hf://org/name                   a data set on the Hub, through the Hub's own cache

The first three may name a file, a folder (every data file below it) or a glob (`**` crosses folders).
All files of one source are of one kind, so that a stray file is noticed and not trained on.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from finetune_api.failures import Problem
from finetune_api.spec import DataSource
from finetune_api.uris import Scheme, Uri, parse_uri
from finetune_trainers.errors import DataError
from finetune_trainers.places import claim_folder, package_folder

__all__ = ["DataFiles", "FileKind", "HubSplit", "find_files"]


class FileKind(StrEnum):
    """How a file is read."""

    JSONL = "jsonl"
    JSON = "json"
    PARQUET = "parquet"
    CSV = "csv"
    TXT = "txt"
    HUB = "hub"
    """A data set folder from the Hub, which the `datasets` library reads."""


SUFFIXES = {f".{kind}": kind for kind in FileKind if kind is not FileKind.HUB}
SUFFIX_LIST = ", ".join(SUFFIXES)


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set repository, in a snapshot on this machine."""

    name: str
    """hf://org/name, as the job has it."""
    folder: Path
    split: str


@dataclass(frozen=True)
class DataFiles:
    """The files of one source, in the order in which they are read."""

    kind: FileKind
    files: list[Path]
    """Never empty. For HUB: all files of the snapshot."""
    hub: HubSplit | None = None
    """Set when the kind is HUB."""

    @property
    def num_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def find_files(source: DataSource, path: str) -> DataFiles:
    """Resolve `source`, which stands at the field `path` of the job. Raises DataError when there is nothing
    to read."""
    uri = parse_uri(source.source)
    if uri.scheme is Scheme.HF:
        return _hub_files(uri, source, path)
    place = _place(uri, source, path)
    if place.is_dir():
        found = _in_folder(place, source, path)
    elif place.is_file():
        if place.suffix not in SUFFIXES:
            raise _refuse(source, path, f"has the suffix {place.suffix!r}; data files end in {SUFFIX_LIST}")
        found = [place]
    else:
        found = _by_glob(place, source, path)
    kinds = sorted({SUFFIXES[file.suffix] for file in found})
    if len(kinds) > 1:
        listed = " and ".join(f".{kind}" for kind in kinds)
        raise _refuse(source, path, f"holds {listed} files; name one kind by a glob that ends in *.{kinds[0]}")
    return DataFiles(FileKind(kinds[0]), found)


def _place(uri: Uri, source: DataSource, path: str) -> Path:
    """The file system path that `uri` stands for; a glob stays a glob."""
    if uri.scheme is Scheme.FILE:
        return Path(uri.path)
    if uri.scheme is Scheme.PVC:
        claim = claim_folder(uri.authority)
        if not claim.is_dir():
            raise _refuse(
                source, path, f"names a claim that is not mounted at {claim}; mount it there, or set FINETUNE_PVC_ROOT"
            )
        return claim / uri.path
    folder = package_folder(uri.authority)
    if folder is None:
        top = uri.authority.split(".")[0]
        raise _refuse(source, path, f"names the Python package {top!r}, which is not installed here; pip install it")
    return folder / uri.path


def _in_folder(folder: Path, source: DataSource, path: str) -> list[Path]:
    """Every data file below `folder`, hidden ones left out, sorted by name."""
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not found:
        raise _refuse(source, path, f"is a folder without data files; they end in {SUFFIX_LIST}")
    return found


def _by_glob(pattern: Path, source: DataSource, path: str) -> list[Path]:
    if not any(character in str(pattern) for character in "*?["):
        raise _refuse(
            source, path, f"does not exist: there is no file or folder at {pattern.absolute()}; correct the path"
        )
    base = Path(pattern.anchor)
    matches = sorted(base.glob(str(pattern.relative_to(base))))
    found = [match for match in matches if match.is_file() and match.suffix in SUFFIXES]
    if not found:
        what = f"no data files; they end in {SUFFIX_LIST}" if matches else "no file; correct the pattern"
        raise _refuse(source, path, f"is a glob that matches {what}")
    return found


def _hub_files(uri: Uri, source: DataSource, path: str) -> DataFiles:
    if importlib.util.find_spec("datasets") is None:
        raise _refuse(source, path, "needs the Python package datasets to be read: pip install 'datasets>=5.2'")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = "/".join(part for part in (uri.authority, uri.path) if part)
    try:
        folder = snapshot_download(repository, repo_type="dataset", revision=source.revision)
    except LocalEntryNotFoundError as error:
        raise _refuse(
            source, path, "is not in the local Hub cache, and the Hub cannot be reached; name a file"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        # The first line says it; the rest are addresses and request ids.
        raise _refuse(source, path, f"cannot be read from the Hub: {str(error).strip().splitlines()[0]}") from error
    root = Path(folder)
    files = sorted(file for file in root.rglob("*") if file.is_file())
    if not files:
        raise _refuse(source, path, "is an empty data set repository")
    return DataFiles(FileKind.HUB, files, HubSplit(source.source, root, source.split or "train"))


def _refuse(source: DataSource, path: str, message: str) -> DataError:
    problem = Problem(path=f"{path}.source", value=source.source, message=message)
    return DataError(str(problem), [problem])
