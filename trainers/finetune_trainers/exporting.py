"""`export`: an artifact written somewhere else, merged into its base or in another type. Called by `__main__`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from finetune_api.failures import Problem
from finetune_api.progress import Artifact
from finetune_api.spec import Precision
from finetune_trainers.artifact_folder import DIGESTS, new_folder, seal
from finetune_trainers.checkpoint.exports.destination import new_destination
from finetune_trainers.checkpoint.exports.streaming import of_files, write_weights
from finetune_trainers.errors import UserError
from finetune_trainers.merge import SAFETENSORS_TYPES, merge_adapter
from finetune_trainers.model_sources import locate_model
from finetune_trainers.weights import WeightFiles

__all__ = ["base_of_adapter", "export_adapter", "export_model"]

_MADE_ANEW = (DIGESTS, "config.json", "generation_config.json")


def export_adapter(adapter: Path, to: Path, merge: bool, dtype: Precision | None) -> Artifact:
    """Copy an adapter, or write its base with it merged in (in bf16 unless `dtype` says otherwise)."""
    if merge:
        return merge_adapter(base_of_adapter(adapter), adapter, to, dtype or Precision.BF16)
    if dtype is not None:
        raise _refused("--dtype", dtype, "adapters keep their type; add --merge, or leave --dtype out")
    return _copy(adapter, to, "adapter")


def export_model(model: Path, to: Path, dtype: Precision | None) -> Artifact:
    """Copy a model folder, its weights converted to `dtype` when one is given."""
    if dtype is None:
        return _copy(model, to, "model")
    weights = WeightFiles.of(model)
    if weights is None:
        raise _refused("--model", str(model), "holds no safetensors weights; name a model's folder")
    with new_destination(str(to)) as out:
        out.record(write_weights(out.sink, of_files(weights, SAFETENSORS_TYPES[dtype])))
        out.add_config(model, dtype)
        for path in sorted(model.iterdir()):
            if path.is_file() and ".safetensors" not in path.name and path.name not in _MADE_ANEW:
                out.add(path.name, path.read_bytes())
        return out.seal("model", _named_base(model))


def base_of_adapter(adapter: Path) -> Path:
    """The folder of the model that an adapter was trained on, as its configuration names it."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text())
        name = str(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError) as error:
        raise _refused("--adapter", str(adapter), "has no adapter_config.json that names its base model") from error
    if Path(name).is_absolute():
        return locate_model(f"file://{name}", "base_model_name_or_path")
    return locate_model(f"hf://{name}", "base_model_name_or_path", config.get("revision"))


def _copy(source: Path, to: Path, kind: str) -> Artifact:
    with new_folder(to) as unfinished:
        for path in source.iterdir():
            if path.is_file() and path.name != DIGESTS:
                shutil.copyfile(path, unfinished / path.name)
        return seal(unfinished, to, kind, _named_base(source))


def _named_base(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / DIGESTS).read_text())["base"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # an artifact from elsewhere


def _refused(option: str, value: str, message: str) -> UserError:
    problem = Problem(path=option, value=value, message=message)
    return UserError(str(problem), [problem])
