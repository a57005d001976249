"""The trained model as files: a PEFT adapter folder, or a model folder in Hugging Face layout.

    adapter_model.safetensors, adapter_config.json    or    model*.safetensors, config.json, generation_config.json
    tokenizer.json, tokenizer_config.json, chat_template.jinja
    README.md       the model card
    digests.json    blake3 and size of each file, and the base model by source, revision and digest

Written beside its place and renamed, so an artifact is there whole or not at all. `write_artifact` is called by the
launcher's rank 0 at the end of training, `merge_adapter` for `outputs[].merge` and by `export`.

An adapter names its base by what reloads it: for an hf:// source the repository and revision, for every other source
the folder that the run used (for a GGUF file, the unpacked one in the cache). The source as the job named it and the
digest of the base's weights are in digests.json.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import Tensor

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_api.progress import Artifact
from finetune_api.spec import Lora
from finetune_trainers.errors import UserError
from finetune_trainers.model_card import CardFacts, model_card
from finetune_trainers.models import load_tokenizer
from finetune_trainers.prepared import PreparedModel
from finetune_trainers.tuning import ALL_LINEAR
from finetune_trainers.weights import WeightFiles, file_digest, read_tensors, write_tensors

__all__ = ["DIGESTS", "write_artifact"]

DIGESTS = "digests.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PEFT_PREFIX = "base_model.model."
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def write_artifact(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    prepared: PreparedModel,
    plan: RunPlan,
    card: CardFacts,
) -> Artifact:
    """Write the trained `tensors` (name as in the tuned module, CPU tensor) as an artifact at `folder`.

    LoRA: the adapters alone, as they are. Otherwise a whole model in the plan's precision, in which a parameter that
    is not among `tensors` comes from the base. Raises UserError when something is at `folder` already.
    """
    with _new_folder(folder) as unfinished:
        if plan.tuning.lora is not None:
            _write_adapter(unfinished, tensors, prepared, plan)
        else:
            _write_model(unfinished, tensors, prepared, _DTYPES[plan.precision])
        load_tokenizer(prepared, plan.model.trust_remote_code).save_pretrained(unfinished)
        (unfinished / "README.md").write_text(model_card(plan, prepared, card))
        base = {"source": plan.model.source, "revision": plan.model.revision, "digest": prepared.digest}
        return _seal(unfinished, folder, "adapter" if plan.tuning.lora is not None else "model", base)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that becomes it when the block ends well."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        problem = Problem(
            path="spec.outputs",
            value=str(folder),
            message="something is there already; name a folder that is not there yet",
        )
        raise UserError(str(problem), [problem])
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _seal(unfinished: Path, folder: Path, kind: str, base: dict[str, Any]) -> Artifact:
    """Write digests.json over all files, and describe the artifact that will be at `folder`."""
    paths = sorted(path for path in unfinished.rglob("*") if path.is_file())
    files = {
        str(path.relative_to(unfinished)): {"blake3": file_digest(path), "bytes": path.stat().st_size}
        for path in paths
    }
    text = json.dumps({"kind": kind, "base": base, "files": files}, indent=2) + "\n"
    (unfinished / DIGESTS).write_text(text)
    return Artifact(
        uri=folder.resolve().as_uri(),
        kind=kind,
        digest=blake3(text.encode()).hexdigest(),
        bytes=sum(path.stat().st_size for path in paths) + len(text.encode()),
    )


def _write_adapter(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], prepared: PreparedModel, plan: RunPlan
) -> None:
    assert plan.tuning.lora is not None
    stored = {name.replace(".default.", "."): tensor for name, tensor in tensors}
    write_tensors(folder, stored.items(), single=ADAPTER_WEIGHTS, shard_bytes=1 << 62)
    _adapter_config(plan.tuning.lora, stored, prepared, plan).save_pretrained(str(folder))


def _adapter_config(lora: Lora, names: Iterable[str], prepared: PreparedModel, plan: RunPlan) -> Any:
    import peft

    adapted = {name.removeprefix(_PEFT_PREFIX).partition(".lora_")[0] for name in names}
    targets = {name.rpartition(".")[2] for name in adapted}
    if lora.target_modules != [ALL_LINEAR] and set(lora.target_modules) != targets:
        targets = adapted  # chosen by path or wildcard: only the full names say which
    from_hub = plan.model.source.startswith("hf://")
    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank; a fraction is as good
        lora_dropout=lora.dropout,
        target_modules=sorted(targets),
        base_model_name_or_path=plan.model.source.removeprefix("hf://") if from_hub else prepared.folder,
        revision=plan.model.revision if from_hub else None,
        inference_mode=True,
    )


def _write_model(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], prepared: PreparedModel, dtype: torch.dtype
) -> None:
    from transformers import AutoConfig, GenerationConfig

    base = WeightFiles.of(Path(prepared.folder))
    assert base is not None
    seen: set[str] = set()

    def all_tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in tensors:
            seen.add(name)
            yield name, tensor.to(dtype)
        for name, tensor in read_tensors(base, [name for name in base.shard_of if name not in seen]):
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor

    write_tensors(folder, all_tensors())
    config = AutoConfig.from_pretrained(prepared.folder)
    config.dtype = dtype
    config.save_pretrained(folder)
    if (Path(prepared.folder) / "generation_config.json").is_file():
        GenerationConfig.from_pretrained(prepared.folder).save_pretrained(folder)
