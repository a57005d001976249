"""A checkpoint as DeepSpeed's universal checkpoint, which its engines load at any number of ranks, ZeRO 1 to 3.

    latest_universal
    global_step<N>/zero/<name>/{fp32,exp_avg,exp_avg_sq,step}.pt   one small pickle of torch.save each
    global_step<N>/zero/optimizer_state.pt
    global_step<N>/[zero_pp_rank_0_]mp_rank_00_model_states.pt     counters; ZeRO 3 looks for the longer name

    config  {"checkpoint": {"load_universal": true}, ...}
    engine.load_checkpoint(folder, load_lr_scheduler_states=False)

The layout of `save_checkpoint` itself would fit one number of ranks and one stage only. The files name no
hyper-parameters: DeepSpeed would copy those of the first group onto all (its engine's own stay). The step is a tensor,
as torch's AdamW has it, or a number, as DeepSpeed's FusedAdam and CPUAdam do; either refuses the other's. A parameter
that was never updated gets moments of zero. What was frozen is not in it, and DeepSpeed leaves that as it is.

Under ZeRO 3 DeepSpeed gives one and the same step to all its groups. A tensor is then counted up once for each of them:
with torch's AdamW and several groups its bias correction runs ahead. FusedAdam and CPUAdam are not concerned.

Facts about DeepSpeed are those of 0.19.8, which is not imported. Memory is that of the largest tensor.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from finetune_api.progress import Artifact
from finetune_trainers.artifact_folder import new_folder, seal
from finetune_trainers.checkpoint.exports import ExportOptions
from finetune_trainers.checkpoint.exports.destination import local_folder
from finetune_trainers.checkpoint.exports.training_state import TrainingState
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError

__all__ = ["write"]

_VERSION = "0.19.8"
_UNIVERSAL_VERSION = 0.2
_MOMENTS = ("exp_avg", "exp_avg_sq")
_OPTIMIZERS = ("torch", "deepspeed")
_MOST_GROUPS = 64
"""DeepSpeed goes through its own groups and these side by side, and stops where either ends."""


def write(storage: Storage, manifest: Manifest, to: str, options: ExportOptions) -> Artifact:
    """Raises UserError, DamagedError."""
    if options.optimizer not in _OPTIMIZERS:
        raise UserError(f"--optimizer: {options.optimizer!r} is none; use one of {', '.join(_OPTIMIZERS)}")
    folder, state = local_folder(to), TrainingState(storage, manifest, options.role)
    assert folder is not None
    with new_folder(folder, "--to") as unfinished:
        tag = unfinished / f"global_step{state.step}"
        for name in state.shapes:
            _write_parameter(tag / "zero" / name, state, name, options.optimizer == "torch")
        _write_globals(tag, state, options.optimizer == "torch")
        (unfinished / "latest_universal").write_text(tag.name)
        return seal(unfinished, folder, "deepspeed", state.base)


def _write_parameter(folder: Path, state: TrainingState, name: str, tensor_step: bool) -> None:
    folder.mkdir(parents=True)
    whole = state.whole(name, "param")
    _save({"param": whole, "cat_dim": 0}, folder / "fp32.pt")
    for moment in _MOMENTS:
        value = state.whole(name, moment) if state.steps[name] else torch.zeros_like(whole)
        _save({"param": value, "cat_dim": 0}, folder / f"{moment}.pt")
    _save(_step(state.steps[name], tensor_step), folder / "step.pt")


def _write_globals(tag: Path, state: TrainingState, tensor_step: bool) -> None:
    groups: list[dict[str, Any]] = [{"params": []} for _ in range(_MOST_GROUPS)]
    counts = _step(max(state.steps.values()), tensor_step)
    optimizer = {"state": {0: {"step": counts}}, "param_groups": groups}  # ZeRO 3 asks here, ZeRO 1 and 2 above it
    _save(
        {"ds_version": _VERSION, "param_groups": groups, "optimizer_state_dict": optimizer},
        tag / "zero" / "optimizer_state.pt",
    )
    model = {
        "module": {},
        "buffer_names": [],
        "param_shapes": [{name: torch.Size(shape) for name, shape in state.shapes.items()}],
        "shared_params": {},
        "lr_scheduler": None,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "global_steps": state.step,
        "global_samples": state.samples,
        "skipped_steps": 0,
        "ds_version": _VERSION,
        "universal_checkpoint_info": {"universal_checkpoint_version": _UNIVERSAL_VERSION},
    }
    for name in ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt"):
        _save(model, tag / name)


def _step(count: int, as_tensor: bool) -> torch.Tensor | int:
    return torch.tensor(float(count)) if as_tensor else count


def _save(content: Mapping[str, Any] | torch.Tensor | int, path: Path) -> None:
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
