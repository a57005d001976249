"""Adapters merged into their base: a whole model in Hugging Face layout, streamed.

Called by the launcher for `outputs[].merge`, by `python -m finetune_trainers export --merge` and by
`checkpoint.exports` for checkpoints of adapters. No model is built and no torch imported; memory holds a few blocks of
rows: W + (alpha / rank) B A in fp32, rounded once to the output's type.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.failures import Problem
from finetune_api.progress import Artifact
from finetune_api.spec import Precision
from finetune_trainers.artifact_folder import ADAPTER_WEIGHTS, DIGESTS, PEFT_PREFIX, TOKENIZER_FILES
from finetune_trainers.checkpoint.exports.destination import Destination, new_destination
from finetune_trainers.checkpoint.exports.precision import as_f32, from_f32
from finetune_trainers.checkpoint.exports.streaming import BLOCK_BYTES, Weight, of_files, write_weights
from finetune_trainers.errors import UserError
from finetune_trainers.weights import BrokenWeightsError, WeightFiles

__all__ = [
    "SAFETENSORS_TYPES",
    "Pair",
    "base_weights",
    "copy_files",
    "merge_adapter",
    "merged_weights",
    "named_base",
    "pair_of",
    "transposed_by_shape",
]

SAFETENSORS_TYPES = {Precision.FP32: "F32", Precision.BF16: "BF16", Precision.FP16: "F16"}
_COPIED = ("README.md", *TOKENIZER_FILES)
"""Of the adapter's folder: the card, and its tokenizer."""
_OTHER_KINDS = ("use_dora", "use_rslora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")
_BLOCK = BLOCK_BYTES // 8
"""Elements; in fp32 they are there twice on the way."""
_PAIRS_KEPT = 8
"""Adapters in memory: those of the blocks that are being made, and a few more."""

Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class Pair:
    """The adapter of one layer."""

    out_features: int
    in_features: int
    load: Callable[[], tuple[Matrix, Matrix]]
    """-> A [rank, in], B [out, rank]"""


@dataclass(frozen=True)
class _Adapter:
    scale: float
    transposed: bool
    """The base keeps its weights as [in, out]."""
    pairs: dict[str, Pair]
    """By module."""


def merge_adapter(
    base_folder: Path,
    adapter_folder: Path,
    to: Path | str,
    dtype: Precision,
    field: str = "spec.outputs",
    writer: str | None = None,
) -> Artifact:
    """Write the model of `base_folder` with the LoRA adapter of `adapter_folder` merged in, at `to`: a folder or a URI.

    `field` named that, and `writer` is who writes there. Raises UserError when the adapter is not plain LoRA or not
    this base's, or something is at `to` that is not left of this writer.
    """
    base, adapter = base_weights(base_folder), _read_adapter(adapter_folder)
    pairs = _by_weight(base, adapter, adapter_folder)
    named = named_base(adapter_folder, base)
    with new_destination(str(to), field, writer) as out:
        weights = merged_weights(base, pairs, adapter.scale, adapter.transposed, SAFETENSORS_TYPES[dtype])
        out.record(write_weights(out.sink, weights))
        out.add_config(base_folder, dtype)
        copy_files(out, adapter_folder, _COPIED)
        return out.seal("model", named)


def copy_files(out: Destination, folder: Path, patterns: tuple[str, ...]) -> None:
    """Small files of a folder that match."""
    for path in sorted({path for pattern in patterns for path in folder.glob(pattern)}):
        out.add(path.name, path.read_bytes())


def base_weights(folder: Path) -> WeightFiles:
    """The weights of a base model's folder. Raises UserError."""
    try:
        base = WeightFiles.of(folder)
    except BrokenWeightsError as error:
        raise _refused(error.path, error.message) from error
    if base is None:
        raise _refused(folder, "holds no safetensors weights; name the base model's folder")
    return base


def transposed_by_shape(base: WeightFiles, pairs: Mapping[str, Pair]) -> bool | None:
    """Whether the base keeps the adapted weights as [in, out]; None when all of them are square."""
    for name, pair in pairs.items():
        if pair.in_features != pair.out_features:
            return base.shapes[name] == (pair.in_features, pair.out_features)
    return None


def merged_weights(
    base: WeightFiles, pairs: Mapping[str, Pair], scale: float, transposed: bool, dtype: str
) -> list[Weight]:
    """All tensors of the base, the adapters of `pairs` (by their weights' names in the files) added to theirs.

    Raises UserError when an adapter does not fit its weight.
    """
    for name, pair in pairs.items():
        shape = (pair.in_features, pair.out_features) if transposed else (pair.out_features, pair.in_features)
        if base.shapes[name] != shape:
            raise _refused(base.folder, f"has {name} of shape {base.shapes[name]}, and its adapter is of {shape}")

    @lru_cache(_PAIRS_KEPT)
    def change(name: str) -> tuple[Matrix, Matrix]:
        """Left [rows, rank] and right [rank, columns], of which the product is added."""
        down, up = pairs[name].load()
        left, right = (down.T, up.T) if transposed else (up, down)
        return np.float32(scale) * left, right

    return [
        _changed(base, weight, change, dtype) if weight.entry.name in pairs else weight
        for weight in of_files(base, dtype)
    ]


def _changed(base: WeightFiles, weight: Weight, change: Callable[[str], tuple[Matrix, Matrix]], dtype: str) -> Weight:
    [plain], name = of_files(base, "F32", [weight.entry.name]), weight.entry.name
    columns = weight.entry.shape[1]

    def read(start: int, end: int) -> memoryview:
        left, right = change(name)
        values = left[start // columns : end // columns] @ right
        values += as_f32(plain.read(start, end), "F32").reshape(-1, columns)
        return from_f32(values.reshape(-1), dtype)

    return Weight(weight.entry, weight.numel, max(_BLOCK // columns, 1) * columns, read)


def _by_weight(base: WeightFiles, adapter: _Adapter, folder: Path) -> dict[str, Pair]:
    pairs = {}
    for module, pair in adapter.pairs.items():
        name = base.stored_name(f"{module}.weight")
        if name is None:
            raise _refused(folder, f"adapts {module}, which the model in {base.folder} does not have")
        pairs[name] = pair
    return pairs


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


def _read_pairs(folder: Path) -> dict[str, Pair]:
    path = folder / ADAPTER_WEIGHTS
    try:
        files = WeightFiles.of_file(path)
    except BrokenWeightsError as error:
        raise _refused(error.path, error.message) from error
    weights = {weight.entry.name: weight for weight in of_files(files, "F32")}
    pairs = {}
    for name, down in weights.items():
        module, found, _ = name.partition(".lora_A.")
        if found:
            up = weights.get(name.replace(".lora_A.", ".lora_B."))
            if up is None:
                raise _refused(path, f"has {name} without its lora_B")
            pairs[module.removeprefix(PEFT_PREFIX)] = pair_of(down, up)
    if not pairs or 2 * len(pairs) != len(weights):
        raise _refused(path, "does not consist of pairs of lora_A and lora_B")
    return pairs


def pair_of(down: Weight, up: Weight) -> Pair:
    """A [rank, in] and B [out, rank], both to be read in fp32."""

    def load() -> tuple[Matrix, Matrix]:
        matrices = (as_f32(one.read(0, one.numel), "F32").reshape(one.entry.shape) for one in (down, up))
        return next(matrices), next(matrices)

    return Pair(up.entry.shape[0], down.entry.shape[1], load)


def named_base(adapter_folder: Path, base: WeightFiles) -> dict[str, Any]:
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
