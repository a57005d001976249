"""A checkpoint as what transformers and PEFT open: a model folder, an adapter folder, or both merged.

    full tuning     model*.safetensors under the names of the base's files, its config.json and tokenizer
    freeze tuning   the same; what was frozen is copied from the base
    LoRA            adapter_model.safetensors and adapter_config.json; with `merge` a whole model
    reward models   either, as transformers' ...ForSequenceClassification; calibration.json only training can write

Everything is streamed. Of the base only headers are read, unless its weights go into the model: then its digest must
be the one that the checkpoint names. A checkpoint that names no base (an import) gives weights alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_api.failures import Problem
from finetune_api.progress import Artifact
from finetune_api.spec import Lora, Precision
from finetune_trainers.artifact_folder import ADAPTER_WEIGHTS, PEFT_PREFIX, TOKENIZER_FILES
from finetune_trainers.checkpoint.exports import ExportOptions
from finetune_trainers.checkpoint.exports.destination import Destination, new_destination
from finetune_trainers.checkpoint.exports.streaming import Weight, of_checkpoint, of_files, write_weights
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError
from finetune_trainers.merge import (
    SAFETENSORS_TYPES,
    Pair,
    base_weights,
    copy_files,
    merged_weights,
    pair_of,
    transposed_by_shape,
)
from finetune_trainers.model_sources import locate_model
from finetune_trainers.places import cache_folder
from finetune_trainers.weights import WeightFiles

__all__ = ["write"]

_SCORE = "score.weight"
"""The head of a reward model."""


def write(storage: Storage, manifest: Manifest, to: str, options: ExportOptions) -> Artifact:
    """Raises UserError, DamagedError."""
    adapter = manifest.intent.adapter
    if adapter is None and options.merge:
        raise UserError("--merge: the checkpoint is of a whole model and has nothing to merge; leave it out")
    base = _base_folder(manifest, options)
    if adapter is not None and base is None:
        raise UserError("--base: the checkpoint is an adapter and names no base; name the base model's folder")
    with new_destination(to) as out:
        if adapter is None:
            return _write_model(out, storage, manifest, base, options)
        assert base is not None
        lora = Lora.model_validate(adapter)
        write_one = _write_merged if options.merge else _write_adapter
        return write_one(out, storage, manifest, base, lora, options)


def _base_folder(manifest: Manifest, options: ExportOptions) -> Path | None:
    """Where the base model is; None when the checkpoint has none."""
    pin = manifest.intent.base_model
    if options.base is not None:
        if not (options.base / "config.json").is_file():
            raise _refused(options.base, "has no config.json; name the base model's folder")
        return options.base
    if pin is None:
        return None
    try:
        found = locate_model(pin.source, "base", pin.revision)
    except UserError as error:
        raise UserError(f"{error.message}; name the folder where the base model is with --base") from None
    return found if found.is_dir() else _unpacked(found)


def _unpacked(path: Path) -> Path:
    """A GGUF file as the folder that training has made of it."""
    from finetune_trainers.gguf import unpack_gguf
    from finetune_trainers.weights import file_digest

    return unpack_gguf(path, file_digest(path), cache_folder(), lambda _percent, _text: None)


def _write_model(
    out: Destination, storage: Storage, manifest: Manifest, base: Path | None, options: ExportOptions
) -> Artifact:
    precision = options.dtype or Precision.BF16
    dtype, scored = SAFETENSORS_TYPES[precision], False
    if base is None:
        weights = of_checkpoint(storage, manifest, role=options.role, dtype=dtype)
    else:
        files = base_weights(base)
        names = _stored_names(manifest, files, options.role)
        scored = any(name.partition(".")[0] == "score" for name in names.values() if name not in files.shapes)
        weights = _whole_model(storage, manifest, files, names, scored, options.role, dtype)
    out.record(write_weights(out.sink, weights, max_shard_bytes=options.max_shard_bytes))
    if base is not None and scored:
        _add_reward_files(out, base, precision)
    elif base is not None:
        out.add_config(base, precision)
        copy_files(out, base, TOKENIZER_FILES)
    return out.seal("model", _named_base(manifest))


def _stored_names(manifest: Manifest, base: WeightFiles, role: str) -> dict[str, str]:
    """Parameter -> the name that the base's files use; its own where they lack it. Refused when shapes differ."""
    tensors = [tensor for tensor in manifest.intent.tensors if tensor.role == role]
    names = {tensor.name: base.stored_name(tensor.name) or tensor.name for tensor in tensors}
    for tensor in tensors:
        shape = base.shapes.get(names[tensor.name], tensor.shape)
        if shape != tensor.shape:
            text = f"has {names[tensor.name]} of shape {shape}, and it was trained as {tensor.shape}"
            raise _refused(base.folder, text)
    return names


def _whole_model(
    storage: Storage,
    manifest: Manifest,
    base: WeightFiles,
    names: dict[str, str],
    scored: bool,
    role: str,
    dtype: str,
) -> list[Weight]:
    """What was trained under the names that the base's files use, then the base's others."""
    weights = of_checkpoint(storage, manifest, names, role, dtype)
    others = base.shapes.keys() - set(names.values())
    if others or not base.shapes.keys() >= set(names.values()):
        others -= _left_out(base, scored)
        if others:
            _demand_base(manifest, base)
        weights += of_files(base, dtype, others)
    return weights


def _left_out(base: WeightFiles, scored: bool) -> set[str]:
    """Second names of parameters that have two, and what a reward model has no place for. Refused when files and
    parameters of the architecture are not the same."""
    from transformers import AutoConfig
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from finetune_trainers.artifact import second_names
    from finetune_trainers.models import meta_model

    config = AutoConfig.from_pretrained(base.folder)
    if get_checkpoint_conversion_mapping(config.model_type) is not None:
        text = f"is a {config.model_type}, whose files keep parameters in another form than memory does"
        raise _refused(base.folder, f"{text}; let training write the model, or export with --format dcp or deepspeed")
    left_out = second_names(config)
    if scored:
        model = meta_model(config, scores=True)
        left_out |= base.shapes.keys() - {base.stored_name(name) for name, _ in model.named_parameters()}
    return left_out


def _add_reward_files(out: Destination, base: Path, precision: Precision) -> None:
    """Configuration and tokenizer of a reward model, as training writes them."""
    from transformers import AutoConfig, AutoTokenizer

    from finetune_trainers.artifact import write_score_config
    from finetune_trainers.artifact_folder import write_config
    from finetune_trainers.models import meta_model
    from finetune_trainers.score_head import padding_token

    tokenizer = AutoTokenizer.from_pretrained(base)
    architecture = type(meta_model(AutoConfig.from_pretrained(base), scores=True)).__name__
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), base, precision)
        write_score_config(Path(folder), architecture, tokenizer)
        tokenizer.pad_token = padding_token(tokenizer)
        tokenizer.save_pretrained(folder)
        copy_files(out, Path(folder), ("*",))


def _write_adapter(
    out: Destination, storage: Storage, manifest: Manifest, base: Path, lora: Lora, options: ExportOptions
) -> Artifact:
    from finetune_trainers.artifact import adapter_config, adapter_tensor_name

    dtype = SAFETENSORS_TYPES[options.dtype or Precision.FP32]
    tensors = [tensor.name for tensor in manifest.intent.tensors if tensor.role == options.role]
    names = {name: adapter_tensor_name(name) for name in tensors}
    weights = of_checkpoint(storage, manifest, names, options.role, dtype)
    written = write_weights(out.sink, weights, ADAPTER_WEIGHTS.removesuffix(".safetensors"), max_shard_bytes=1 << 62)
    out.record(written)
    pin = manifest.intent.base_model
    source, revision = (pin.source, pin.revision) if pin is not None else (str(base), None)
    config = adapter_config(lora, set(names.values()), source, revision, base.absolute())
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        copy_files(out, Path(folder), ("adapter_config.json",))
    copy_files(out, base, TOKENIZER_FILES)
    return out.seal("adapter", _named_base(manifest))


def _write_merged(
    out: Destination, storage: Storage, manifest: Manifest, base: Path, lora: Lora, options: ExportOptions
) -> Artifact:
    precision, files = options.dtype or Precision.BF16, base_weights(base)
    pairs = _pairs(storage, manifest, files, options.role)
    _demand_base(manifest, files)
    transposed = transposed_by_shape(files, pairs)
    if transposed is None:
        transposed = _transposed_by_model(base, pairs)
    weights = merged_weights(files, pairs, lora.alpha / lora.rank, transposed, SAFETENSORS_TYPES[precision])
    out.record(write_weights(out.sink, weights, max_shard_bytes=options.max_shard_bytes))
    out.add_config(base, precision)
    copy_files(out, base, TOKENIZER_FILES)
    return out.seal("model", _named_base(manifest))


def _pairs(storage: Storage, manifest: Manifest, base: WeightFiles, role: str) -> dict[str, Pair]:
    """By the name of the weight in the base's files."""
    matrices = {weight.entry.name: weight for weight in of_checkpoint(storage, manifest, role=role, dtype="F32")}
    pairs = {}
    for name, down in matrices.items():
        module, found, _ = name.removeprefix(PEFT_PREFIX).partition(".lora_A.")
        if not found:
            continue
        stored = base.stored_name(f"{module}.weight")
        if stored is None:
            raise _refused(base.folder, f"has no {module}.weight, which the checkpoint adapts")
        pairs[stored] = pair_of(down, matrices[name.replace(".lora_A.", ".lora_B.")])
    if 2 * len(pairs) != len(matrices):
        raise UserError("--merge: the checkpoint does not consist of pairs of lora_A and lora_B; leave it out")
    return pairs


def _transposed_by_model(base: Path, pairs: Mapping[str, Pair]) -> bool:
    """All adapted weights are square: only the model's own classes know."""
    from transformers import AutoConfig

    from finetune_trainers.models import meta_model
    from finetune_trainers.tuning import transposed

    model = meta_model(AutoConfig.from_pretrained(base))
    found = {name.removesuffix(".weight") for name in pairs}
    modules = [name for name, _ in model.named_modules() if name in found or name.partition(".")[2] in found]
    return transposed(model, modules)


def _demand_base(manifest: Manifest, base: WeightFiles) -> None:
    pin = manifest.intent.base_model
    digest = base.digest()
    if pin is not None and pin.digest != digest:
        raise _refused(
            base.folder,
            f"is not the base of this checkpoint: its weights have the digest {digest[:16]}…, and training began"
            f" from {pin.digest[:16]}… ({pin.source})",
        )


def _named_base(manifest: Manifest) -> dict[str, Any]:
    pin = manifest.intent.base_model
    return {} if pin is None else {"source": pin.source, "revision": pin.revision, "digest": pin.digest}


def _refused(path: Path, message: str) -> UserError:
    problem = Problem(file=str(path), message=message)
    return UserError(str(problem), [problem])
