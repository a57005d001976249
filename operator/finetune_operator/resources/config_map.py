"""The three ConfigMaps of a job: the plan of an attempt, the runtime as it was, and what the trainers report.

Plan and runtime are immutable: nobody changes them under a running job, and the kubelet need not watch them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from finetune_api.plan import RunPlan
from finetune_api.runtime import FineTuneRuntime
from finetune_operator import names
from finetune_operator.kinds import CONFIG_MAP
from finetune_operator.resources.metadata import Document, Owner, child

__all__ = [
    "PLAN_KEY",
    "RUNTIME_KEY",
    "plan_config_map",
    "progress_config_map",
    "read_runtime_config_map",
    "runtime_config_map",
    "runtime_hash",
]

PLAN_KEY = "plan.json"
RUNTIME_KEY = "runtime.json"


def plan_config_map(owner: Owner, plan: RunPlan, attempt: int) -> Document:
    """The RunPlan of one attempt; the trainers read it as a file."""
    text = plan.model_dump_json(by_alias=True, indent=2)
    content = {"immutable": True, "data": {PLAN_KEY: text}}
    return child(CONFIG_MAP, owner, names.plan_config_map(owner.name, attempt), content, attempt=attempt)


def runtime_config_map(owner: Owner, runtime: FineTuneRuntime) -> Document:
    """The runtime as it is now: all attempts of the job run on this copy, whatever becomes of the runtime."""
    kept = {
        "apiVersion": runtime.api_version,
        "kind": runtime.kind,
        "metadata": {"name": runtime.metadata.name},
        "spec": runtime.spec.to_document(),
    }
    content = {"immutable": True, "data": {RUNTIME_KEY: json.dumps(kept, indent=2, sort_keys=True)}}
    return child(CONFIG_MAP, owner, names.runtime_config_map(owner.name), content)


def read_runtime_config_map(document: Mapping[str, Any]) -> FineTuneRuntime | None:
    """The runtime in such a ConfigMap; None when somebody put something else into it."""
    data = document.get("data")
    text = data.get(RUNTIME_KEY) if isinstance(data, dict) else None
    try:
        return FineTuneRuntime.model_validate_json(text) if isinstance(text, str) else None
    except ValidationError:
        return None


def runtime_hash(runtime: FineTuneRuntime) -> str:
    """Which runtime it is, by what it says and not by its name: 16 hexadecimal digits."""
    canonical = json.dumps(runtime.spec.to_document(), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def progress_config_map(owner: Owner) -> Document:
    """A ConfigMap for the trainers to report into; finetune_operator.states names its keys."""
    return child(CONFIG_MAP, owner, names.progress_config_map(owner.name), {})
