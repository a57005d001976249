"""Reads DeepSpeed's checkpoints of ZeRO 1 to 3 by any number of ranks, and universal ones.

    zero_pp_rank_<rank>_mp_rank_00_optim_states.pt   flat groups of masters and moments; `bf16_` may stand before it
    [zero_pp_rank_0_]mp_rank_00_model_states.pt      the parameters' names and shapes, the steps done
    zero/<name>/{fp32,exp_avg,exp_avg_sq,step}.pt    of a universal one

All of these are pickles. They are read by torch's `weights_only` reader, which executes nothing; the few classes of
DeepSpeed's in them are given harmless stand-ins, so DeepSpeed need not be installed. Files are mapped, not loaded.
Refused by name: tensor, pipeline and expert parallelism, whose parts would have to be joined otherwise.
Facts about DeepSpeed are those of 0.19.8.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_trainers.checkpoint.imports import ImportOptions
from finetune_trainers.checkpoint.imports.storing import Foreign, demand_pickles_allowed, store
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.slices import even_slice
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError

__all__ = ["read"]

_MOMENTS = ("exp_avg", "exp_avg_sq")
_KEYS = {"param": "fp32", "exp_avg": "exp_avg", "exp_avg_sq": "exp_avg_sq"}
_RANK_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


class _Ignored:
    """In the place of what is not needed, such as a loss scaler."""


class _Fragment:
    """In the place of DeepSpeed's fragment_address."""

    start: int
    numel: int


_STAND_INS: list[Any] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Ignored, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
]


@dataclass(frozen=True)
class _Part:
    """Elements of a parameter: [start, start + numel) of a flat group of a rank, in the order of ranks."""

    rank: int
    group: int
    start: int
    numel: int


def read(source: Path, storage: Storage, options: ImportOptions, now: datetime) -> Manifest:
    """Raises UserError."""
    folder = _folder(source)
    demand_pickles_allowed(options, f"DeepSpeed's files in {folder} are pickles")
    foreign = _universal(folder) if (folder / "zero").is_dir() else _of_ranks(folder)
    return store(foreign, storage, options, now)


def _folder(source: Path) -> Path:
    """The tag's folder, of a checkpoint that is named by it or by the folder of all."""
    for pointer in ("latest", "latest_universal"):
        if (source / pointer).is_file():
            tag = (source / pointer).read_text().strip()
            if Path(tag).name == tag and (source / tag).is_dir():
                return source / tag
            raise UserError(f"--from: {source / pointer} names {tag!r}, and there is no such folder; name one yourself")
    return source


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if "GLOBAL" in line]
        raise UserError(f"--from: {path} is not read: {(lines or str(error).splitlines())[0]}") from None


def _universal(folder: Path) -> Foreign:
    places = {str(path.parent.relative_to(folder / "zero")): path.parent for path in folder.glob("zero/**/fp32.pt")}

    def whole(name: str, state: str) -> Tensor:
        held = _load(places[name] / f"{_KEYS[state]}.pt")
        return held["param"] if isinstance(held, dict) else held  # type: ignore[no-any-return]

    shapes = {name: tuple(whole(name, "param").shape) for name in places}
    steps = {}
    for name, place in places.items():
        count = int(_load(place / "step.pt")) if (place / "step.pt").is_file() else 1
        if count and all((place / f"{moment}.pt").is_file() for moment in _MOMENTS):
            steps[name] = count
    return Foreign(_steps_done(folder), shapes, steps, whole)


def _steps_done(folder: Path) -> int | None:
    for path in sorted(folder.glob("*model_states.pt")):
        return int(_load(path).get("global_steps", 0))
    return None


def _of_ranks(folder: Path) -> Foreign:
    files = {int(found[1]): path for path in folder.iterdir() if (found := _RANK_FILE.fullmatch(path.name))}
    others = [path.name for path in folder.glob("*optim_states.pt") if path not in files.values()]
    models = sorted(folder.glob("*model_states.pt"))
    if others:
        raise UserError(f"--from: {others[0]} is of tensor, pipeline or expert parallelism, which is not read here")
    ranks = [_load(files[rank])["optimizer_state_dict"] for rank in sorted(files)]
    if not models or sorted(files) != list(range(max(map(_world, ranks), default=1))):
        raise UserError(f"--from: {folder} does not have the files of all ranks of a DeepSpeed checkpoint")
    model = _load(models[0])
    shapes = {name: tuple(shape) for group in model["param_shapes"] for name, shape in group.items()}
    stage = int(ranks[0]["zero_stage"])
    parts = _parts_of_slices(ranks, model["param_shapes"]) if stage == 3 else _parts_of_groups(ranks)
    for name, shape in shapes.items():
        if sum(part.numel for part in parts.get(name, ())) != prod(shape):
            raise UserError(f"--from: the ranks' files do not hold all elements of {name}")
    flat = _flat_of_3 if stage == 3 else _flat_of_2
    return Foreign(int(model["global_steps"]), shapes, _steps(ranks, parts, flat), _whole(ranks, parts, flat))


def _world(rank: dict[str, Any]) -> int:
    """Of how many ranks its files tell; ZeRO 1 and 2 say it for each group."""
    count = rank["partition_count"]
    return max(count) if isinstance(count, list) else int(count)


def _parts_of_groups(ranks: list[dict[str, Any]]) -> dict[str, list[_Part]]:
    """ZeRO 1 and 2 say where the fragments of each parameter are."""
    parts: dict[str, list[_Part]] = {}
    for rank, state in enumerate(ranks):
        for group, places in enumerate(state["param_slice_mappings"]):
            for name, place in places.items():
                parts.setdefault(name, []).append(_Part(rank, group, place.start, place.numel))
    return parts


def _parts_of_slices(ranks: list[dict[str, Any]], groups: list[dict[str, Any]]) -> dict[str, list[_Part]]:
    """ZeRO 3 lays even slices end to end; those of the last ranks are padded."""
    parts: dict[str, list[_Part]] = {}
    world = len(ranks)
    for group, shapes in enumerate(groups):
        offset = 0
        for name, shape in shapes.items():
            numel = prod(shape)
            for rank in range(world):
                start, end = even_slice(numel, rank, world)
                parts.setdefault(name, []).append(_Part(rank, group, offset, end - start))
            offset += -(-numel // world)
    return parts


_Flat = Callable[[dict[str, Any], int, str], Any]
"""(a rank's state, group, state or `step`) -> a flat tensor, a count, or None where there is none."""


def _flat_of_2(rank: dict[str, Any], group: int, state: str) -> Any:
    if state == "param":
        return rank["single_partition_of_fp32_groups"][group]
    base = rank["base_optimizer_state"]
    return base["state"].get(group, {}).get(state, base["param_groups"][group].get(state))


def _flat_of_3(rank: dict[str, Any], group: int, state: str) -> Any:
    if state == "param":
        return rank["fp32_flat_groups"][group]
    base = rank["optimizer_state_dict"]
    return base["state"].get(group, {}).get(state)


def _whole(ranks: list[dict[str, Any]], parts: dict[str, list[_Part]], flat: _Flat) -> Callable[[str, str], Tensor]:
    def whole(name: str, state: str) -> Tensor:
        held = [part for part in parts[name] if part.numel]
        pieces = [flat(ranks[part.rank], part.group, state).narrow(0, part.start, part.numel) for part in held]
        return torch.cat(pieces) if len(pieces) != 1 else pieces[0]

    return whole


def _steps(ranks: list[dict[str, Any]], parts: dict[str, list[_Part]], flat: _Flat) -> dict[str, int]:
    steps = {}
    for name, held in parts.items():
        first = next((part for part in held if part.numel), None)
        if first is None or flat(ranks[first.rank], first.group, "exp_avg") is None:
            continue
        count = flat(ranks[first.rank], first.group, "step")
        if int(1 if count is None else count):
            steps[name] = int(1 if count is None else count)
    return steps
