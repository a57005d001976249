"""Complete default objects for tests; a test names only what matters to it.

job_document()                                          a small valid FineTuneJob, as YAML would give it
job_document({"training.globalBatchSize": 64})          dotted paths below spec
job_document({"training.epochs": ABSENT})               a field taken out
job_document({"data.train.0.format": "text"})           a number is a place in a list
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from finetune_api.base import API_VERSION
from finetune_api.job import FineTuneJob
from finetune_api.runtime import FineTuneRuntime

__all__ = ["ABSENT", "job", "job_document", "runtime", "runtime_document", "with_changes"]

ABSENT: Any = object()
"""As a new value: take the field out."""

_JOB_SPEC: dict[str, Any] = {
    "model": {"source": "hf://HuggingFaceTB/SmolLM2-135M"},
    "data": {
        "train": [{"source": "file:///data/train.jsonl"}],
        "eval": [{"source": "file:///data/eval.jsonl"}],
    },
    "method": {"sft": {}},
    "tuning": {"lora": {}},
    "training": {"epochs": 1},
}


def job_document(changes: Mapping[str, Any] | None = None, name: str = "example") -> dict[str, Any]:
    """A FineTuneJob as plain values; `changes` by dotted path below spec."""
    document = {
        "apiVersion": API_VERSION,
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": _JOB_SPEC,
    }
    return with_changes(document, {f"spec.{path}": value for path, value in (changes or {}).items()})


def job(changes: Mapping[str, Any] | None = None, name: str = "example") -> FineTuneJob:
    """The same as a model."""
    return FineTuneJob.model_validate(job_document(changes, name))


def runtime_document(changes: Mapping[str, Any] | None = None, name: str = "pool") -> dict[str, Any]:
    """A FineTuneRuntime as plain values; `changes` by dotted path below spec."""
    document = {"apiVersion": API_VERSION, "kind": "FineTuneRuntime", "metadata": {"name": name}, "spec": {}}
    return with_changes(document, {f"spec.{path}": value for path, value in (changes or {}).items()})


def runtime(changes: Mapping[str, Any] | None = None, name: str = "pool") -> FineTuneRuntime:
    """The same as a model."""
    return FineTuneRuntime.model_validate(runtime_document(changes, name))


def with_changes(document: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `document` with the value at each dotted path replaced; mappings that it lacks are made."""
    changed: dict[str, Any] = copy.deepcopy(dict(document))
    for path, value in changes.items():
        *way, last = path.split(".")
        here: Any = changed
        for step in way:
            here = here[int(step)] if isinstance(here, list) else here.setdefault(step, {})
        if value is ABSENT:
            del here[last]
        else:
            here[int(last) if isinstance(here, list) else last] = copy.deepcopy(value)
    return changed
