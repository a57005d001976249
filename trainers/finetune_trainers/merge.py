"""Adapters merged into their base: a whole model in Hugging Face layout, made tensor by tensor.

Called by the launcher for `outputs[].merge` and by `python -m finetune_trainers export --merge`. No model is built,
and memory holds one shard: W + (alpha / rank) B A in fp32, rounded once to the output's type.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from finetune_api.failures import Problem
from finetune_api.progress import Artifact
from finetune_api.spec import Precision
from finetune_trainers.artifact import (
    ADAPTER_WEIGHTS,
    DIGESTS,
    PEFT_PREFIX,
    new_folder,
    seal,
    write_config,
)
from finetune_trainers.errors import UserError
from finetune_trainers.models import DTYPES
from finetune_trainers.weights import BrokenWeightsError, WeightFiles, read_tensors, write_tensors

__all__ = ["merge_adapter"]

_COPIED = ("README.md", "chat_template.jinja", "token*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model")
"""Of the adapter's folder: the card, and whatever its tokenizer consists of."""
_OTHER_KINDS = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")


@dataclass(frozen=True)
class _Adapter:
    scale: float
    transposed: bool
    """The base keeps its weights as [in, out]."""
    pairs: dict[str, tuple[Tensor, Tensor]]
    """Module name -> A [rank, in], B [out, rank]."""


def merge_adapter(base_folder: Path, adapter_folder: Path, out_folder: Path, dtype: Precision) -> Artifact:
    """Write the model of `base_folder` with the LoRA adapter of `adapter_folder` merged in, at `out_folder`.

    Raises UserError when the adapter is not plain LoRA or not this base's, or something is at `out_folder`.
    """
    try:
        base = WeightFiles.of(base_folder)
    except BrokenWeightsError as error:
        raise _refused(error.path, error.message) from error
    if base is None:
        raise _refused(base_folder, "holds no safetensors weights; name the base model's folder")
    adapter = _read_adapter(adapter_folder)
    names = {module: base.stored_name(f"{module}.weight") for module in adapter.pairs}
    unknown = sorted(module for module, name in names.items() if name is None)
    if unknown:
        raise _refused(adapter_folder, f"adapts {unknown[0]}, which the model in {base_folder} does not have")
    named_base = _named_base(adapter_folder, base)
    pairs = {str(names[module]): pair for module, pair in adapter.pairs.items()}
    with new_folder(out_folder) as unfinished:
        write_tensors(unfinished, _merged(base, pairs, adapter, DTYPES[dtype]))
        write_config(unfinished, base_folder, dtype)
        for pattern in _COPIED:
            for path in adapter_folder.glob(pattern):
                shutil.copyfile(path, unfinished / path.name)
        return seal(unfinished, out_folder, "model", named_base)


def _merged(
    base: WeightFiles, pairs: dict[str, tuple[Tensor, Tensor]], adapter: _Adapter, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for name, weight in read_tensors(base):
        if name in pairs:
            down, up = (matrix.float() for matrix in pairs[name])
            change = adapter.scale * (up @ down)
            weight = weight.float() + (change.t() if adapter.transposed else change)
        yield name, weight.to(dtype) if weight.is_floating_point() else weight


def _read_adapter(folder: Path) -> _Adapter:
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        scale = config["lora_alpha"] / config["r"]
        other = [key for key in _OTHER_KINDS if config.get(key)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _refused(folder, "has no adapter_config.json of a LoRA adapter; name an adapter's folder") from error
    if config.get("peft_type") != "LORA" or other:
        kind = ", ".join(other) or str(config.get("peft_type"))
        raise _refused(folder, f"is an adapter with {kind}; only plain LoRA is merged here (PEFT merges the rest)")
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise _refused(folder, f"has no {ADAPTER_WEIGHTS}")
    return _Adapter(scale, bool(config.get("fan_in_fan_out")), _read_pairs(folder))


def _read_pairs(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    pairs = {}
    with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
        names = set(file.keys())
        for name in names:
            module, found, _ = name.partition(".lora_A.")
            if found:
                up = name.replace(".lora_A.", ".lora_B.")
                if up not in names:
                    raise _refused(folder / ADAPTER_WEIGHTS, f"has {name} without its lora_B")
                pairs[module.removeprefix(PEFT_PREFIX)] = (file.get_tensor(name), file.get_tensor(up))
    if not pairs or 2 * len(pairs) != len(names):
        raise _refused(folder / ADAPTER_WEIGHTS, "does not consist of pairs of lora_A and lora_B")
    return pairs


def _named_base(adapter_folder: Path, base: WeightFiles) -> dict[str, Any]:
    """How the adapter names its base; refused when the weights at hand are others."""
    digest = base.digest()
    try:
        named: dict[str, Any] = dict(json.loads((adapter_folder / DIGESTS).read_text())["base"])
    except (OSError, ValueError, KeyError, TypeError):
        return {"source": str(base.folder), "revision": None, "digest": digest}  # an adapter from elsewhere
    if named.get("digest") != digest:
        raise _refused(
            base.folder,
            f"is not the base of this adapter: its weights have the digest {digest[:16]}…, and the adapter was"
            f" trained on {str(named.get('digest'))[:16]}… ({named.get('source')})",
        )
    return named


def _refused(path: Path, message: str) -> UserError:
    problem = Problem(file=str(path), message=message)
    return UserError(str(problem), [problem])
