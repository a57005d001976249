"""A reward model that is an adapter of the policy's own base, as one more adapter on that base. Called by
`critic_beginning` and `judges`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from finetune_api.failures import Problem
from finetune_api.problems import shorten
from finetune_trainers.artifact_folder import ADAPTER_WEIGHTS, PEFT_PREFIX
from finetune_trainers.errors import UserError
from finetune_trainers.lean_peft import peft
from finetune_trainers.prepared import PreparedModel
from finetune_trainers.rewards.judge_checks import JudgeFiles
from finetune_trainers.score_head import HEAD
from finetune_trainers.weights import WeightFiles, read_tensors

__all__ = ["adapted_modules", "adapter_config", "fill_adapter", "head_weight", "misfit"]

_OF_HEAD = f".{HEAD}.weight"
_PLAIN = (".lora_A.weight", ".lora_B.weight", _OF_HEAD)
_OF_THE_FILE = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}
"""What a config.json says that does not show in what the model computes."""


def misfit(files: JudgeFiles, model: PreparedModel) -> str | None:
    """Why the reward model cannot be an adapter on the policy's base, as what is to be said of it; None: it can."""
    if files.adapter is None:
        return "is a whole model"
    if not _is_same_model(files.model, Path(model.folder), model.digest):
        return "is an adapter of another model than the policy's"
    config = peft.PeftConfig.from_pretrained(str(files.adapter))
    names = WeightFiles.of_file(files.adapter / ADAPTER_WEIGHTS).shapes
    is_plain = (
        isinstance(config, peft.LoraConfig)
        and isinstance(config.init_lora_weights, bool)  # some other beginnings change the base
        and not config.layer_replication
        and all(name.endswith(_PLAIN) for name in names)
    )
    return None if is_plain else "is an adapter of another kind than plain LoRA"


def adapter_config(adapter: Path) -> peft.LoraConfig:
    """Of a reward model's adapter that is no misfit, for a place beside the policy's."""
    config = peft.PeftConfig.from_pretrained(str(adapter))
    assert isinstance(config, peft.LoraConfig), "it is no misfit"
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    config.target_modules = sorted(adapted_modules(adapter))  # what it names may fit the policy's output head too
    return config


def adapted_modules(adapter: Path) -> set[str]:
    """Names of the layers that it changes, in the model that it was trained on."""
    names = WeightFiles.of_file(adapter / ADAPTER_WEIGHTS).shapes
    return {name.removeprefix(PEFT_PREFIX).rpartition(".lora_")[0] for name in names if not name.endswith(_OF_HEAD)}


def head_weight(adapter: Path) -> Tensor:
    """[1, H]: what makes a score of a token's hidden state."""
    [weight] = [tensor for name, tensor in _tensors(adapter) if name.endswith(_OF_HEAD)]
    return weight


@torch.no_grad()
def fill_adapter(model: nn.Module, name: str, adapter: Path, field: str) -> None:
    """Give the adapter `name` of `model` the weights in the folder `adapter`. Raises UserError about the reward model,
    which stands at `field` of the job, when they differ."""
    weights = {key: tensor for key, tensor in _tensors(adapter) if not key.endswith(_OF_HEAD)}
    parameters = {
        key.replace(f".{name}.", "."): parameter for key, parameter in model.named_parameters() if f".{name}." in key
    }
    if {key: one.shape for key, one in weights.items()} != {key: one.shape for key, one in parameters.items()}:
        problem = Problem(
            path=f"{field}.source",
            value=shorten(str(adapter)),
            message="has weights in other places, or of another shape, than its adapter_config.json says; train or copy"
            " it anew",
        )
        raise UserError(str(problem), [problem])
    for key, parameter in parameters.items():
        parameter.copy_(weights[key])


def _tensors(adapter: Path) -> Iterator[tuple[str, Tensor]]:
    return read_tensors(WeightFiles.of_file(adapter / ADAPTER_WEIGHTS))


def _is_same_model(folder: Path, other: Path, digest: str) -> bool:
    if folder.resolve() == other.resolve():
        return True
    files = WeightFiles.of(folder)
    return files is not None and files.digest() == digest and _config(folder) == _config(other)


def _config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key not in _OF_THE_FILE}
