"""Reads YAML files of FineTuneJobs and FineTuneRuntimes, strictly: what kubectl would refuse or misread is refused.

Called by the CLI and the SDK. Several documents may stand in one file, several files in one folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from finetune_api.base import API_VERSION
from finetune_api.failures import Problem
from finetune_api.job import FineTuneJob
from finetune_api.problems import InvalidManifest, shorten, validate_document
from finetune_api.runtime import FineTuneRuntime

__all__ = ["LoadedJob", "Manifests", "collect_manifests", "load_manifests", "read_documents", "with_absolute_paths"]

_KINDS: dict[str, type[FineTuneJob] | type[FineTuneRuntime]] = {
    "FineTuneJob": FineTuneJob,
    "FineTuneRuntime": FineTuneRuntime,
}


@dataclass(frozen=True)
class LoadedJob:
    """A job and the file it came from."""

    file: str
    job: FineTuneJob


@dataclass
class Manifests:
    """All objects of some files, and all that is wrong with them."""

    jobs: list[LoadedJob] = field(default_factory=list)
    runtimes: dict[str, FineTuneRuntime] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


def load_manifests(*paths: Path) -> Manifests:
    """Read every document of `paths`; a folder stands for its *.yaml, *.yml and *.json files.

    Raises InvalidManifest when anything is wrong, with the problems of all files.
    """
    found = collect_manifests(*paths)
    if found.problems:
        raise InvalidManifest(found.problems)
    return found


def collect_manifests(*paths: Path, edit: Callable[[Any], Any] | None = None) -> Manifests:
    """As `load_manifests`, but what is wrong is in the result beside what is right.

    `edit` is given each raw document before it is validated and returns the document to use instead; it may
    raise InvalidManifest.
    """
    found = Manifests()
    for path in paths:
        for file in _files(path, found.problems):
            _load_file(file, found, edit)
    if not found.problems and not (found.jobs or found.runtimes):
        found.problems.append(Problem(file=str(paths[0]), message="holds no FineTuneJob and no FineTuneRuntime"))
    return found


def read_documents(text: str, file: str) -> list[Any]:
    """The YAML documents in `text`, empty ones left out. Raises InvalidManifest for faults of syntax."""
    try:
        return [document for document in yaml.load_all(text, Loader=_StrictLoader) if document is not None]
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{file}:{mark.line + 1}" if mark else file
        message = f"is not valid YAML: {error.problem or error.context}"
        raise InvalidManifest([Problem(file=where, message=message)]) from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a number with thousands of digits
        raise InvalidManifest([Problem(file=file, message=f"is not valid YAML: {error}")]) from None
    except RecursionError:
        raise InvalidManifest([Problem(file=file, message="is nested too deeply")]) from None


def _files(path: Path, problems: list[Problem]) -> Sequence[Path]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in (".yaml", ".yml", ".json"))
        if not files:
            problems.append(Problem(file=str(path), message="is a folder without .yaml, .yml or .json files"))
        return files
    if not path.exists():
        problems.append(Problem(file=str(path), message="does not exist; name a file or a folder of manifests"))
        return []
    return [path]


def _load_file(file: Path, found: Manifests, edit: Callable[[Any], Any] | None) -> None:
    name = str(file)
    try:
        documents = read_documents(file.read_text(encoding="utf-8"), name)
    except InvalidManifest as invalid:
        found.problems.extend(invalid.problems)
        return
    except (UnicodeDecodeError, OSError) as error:
        found.problems.append(Problem(file=name, message=f"cannot be read as UTF-8 text: {error}"))
        return
    if not documents:
        found.problems.append(Problem(file=name, message="is empty; write a FineTuneJob into it"))
    for document in documents:
        try:
            _load_document(edit(document) if edit else document, file, found)
        except InvalidManifest as invalid:
            found.problems.extend(invalid.problems)


def _load_document(document: Any, file: Path, found: Manifests) -> None:
    name = str(file)
    model = _KINDS[_kind_of(document, name)]
    value = validate_document(model, document, name)
    if isinstance(value, FineTuneRuntime):
        found.runtimes[value.metadata.name] = value
    else:
        found.jobs.append(LoadedJob(name, with_absolute_paths(value, document, file.parent.resolve())))


def _kind_of(document: Any, file: str) -> str:
    if not isinstance(document, dict):
        message = "must be a mapping with apiVersion, kind, metadata and spec"
        raise InvalidManifest([Problem(file=file, value=shorten(document), message=message)])
    problems = []
    version, kind = document.get("apiVersion"), document.get("kind")
    if version != API_VERSION:
        problems.append(_wrong(file, "apiVersion", version, f"must be {API_VERSION}"))
    if not isinstance(kind, str) or kind not in _KINDS:
        problems.append(_wrong(file, "kind", kind, f"must be one of {', '.join(_KINDS)}"))
    if problems:
        raise InvalidManifest(problems)
    return str(kind)


def _wrong(file: str, path: str, value: object, message: str) -> Problem:
    return Problem(file=file, path=path, value=None if value is None else shorten(value), message=message)


def with_absolute_paths(job: FineTuneJob, document: dict[str, Any], folder: Path) -> FineTuneJob:
    """The job that `document` holds, with `file://./x` and `file://../x` taken from `folder`."""
    spec = document["spec"]
    if not any(uri.startswith("file://.") for uri in _strings(spec)):
        return job
    return FineTuneJob.model_validate(document | {"spec": _absolute(spec, folder)})


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for child in value.values() if isinstance(value, dict) else value:
            yield from _strings(child)


def _absolute(value: Any, folder: Path) -> Any:
    if isinstance(value, dict):
        return {key: _absolute(child, folder) for key, child in value.items()}
    if isinstance(value, list):
        return [_absolute(child, folder) for child in value]
    if isinstance(value, str) and value.startswith("file://."):
        # Joined as text: a glob stays as it is, and symbolic links are not followed.
        return f"file://{Path(folder, value.removeprefix('file://')).as_posix()}"
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML as Kubernetes reads it: duplicate keys are faults, 2e-4 is a number, dates are text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue  # `<<: *name` is no key; the keys that it brings yield to those that stand here
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is not text; put it in quotes", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} stands twice; remove one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_StrictLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_StrictLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(?:\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
