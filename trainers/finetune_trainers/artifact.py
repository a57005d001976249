"""The trained model as files: a PEFT adapter folder, or a model folder in Hugging Face layout.

    adapter_model.safetensors, adapter_config.json                    of an adapter
    model*.safetensors, config.json, generation_config.json           of a model
    tokenizer.json, tokenizer_config.json, chat_template.jinja        of both, and
    calibration.json                                                  of a reward model: where its scores lie
    README.md       the model card
    digests.json    blake3 and size of each file, and the base model by source, revision and digest

Written beside its place and renamed, so an artifact is there whole or not at all. Called by rank 0 at the end of
training; `finetune_trainers.merge` makes a model of an adapter.

An adapter names its base by what reloads it: for an hf:// source the repository and revision, for every other
source the folder that the run used (for a GGUF file, the unpacked one in the cache). The source as the job named
it and the digest of the base's weights are in digests.json.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finetune_api.plan import RunPlan
from finetune_api.progress import Artifact
from finetune_api.spec import Lora
from finetune_trainers.artifact_folder import ADAPTER_WEIGHTS, CALIBRATION, PEFT_PREFIX, new_folder, seal, write_config
from finetune_trainers.methods.reward import Calibration
from finetune_trainers.model_card import CardFacts, model_card
from finetune_trainers.models import meta_model, stored_tokenizer
from finetune_trainers.precisions import DTYPES
from finetune_trainers.prepared import PreparedModel
from finetune_trainers.score_head import padding_token, score_settings
from finetune_trainers.tuning import ALL_LINEAR, SCORE_HEAD, transposed
from finetune_trainers.weights import WeightFiles, read_tensors, write_tensors

__all__ = ["adapter_config", "adapter_tensor_name", "second_names", "write_artifact", "write_score_config"]


def write_artifact(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    prepared: PreparedModel,
    plan: RunPlan,
    card: CardFacts,
    calibration: Calibration | None = None,
) -> Artifact:
    """Write the trained `tensors` (name as in the tuned module, CPU tensor) as an artifact at `folder`.

    LoRA: the adapters alone, as they are. Otherwise a whole model in the plan's precision, in which a parameter
    that is not among `tensors` is the base's. Raises UserError when something is at `folder` already.
    """
    base = {"source": plan.model.source, "revision": plan.model.revision, "digest": prepared.digest}
    with new_folder(folder) as unfinished:
        if plan.tuning.lora is not None:
            _write_adapter(unfinished, tensors, prepared, plan, plan.tuning.lora)
        else:
            _write_model(unfinished, tensors, prepared, plan)
        tokenizer = stored_tokenizer(prepared, plan.model.trust_remote_code)
        if plan.method.reward is not None:
            tokenizer.pad_token = padding_token(tokenizer)
        tokenizer.save_pretrained(unfinished)
        if calibration is not None:
            (unfinished / CALIBRATION).write_text(calibration.model_dump_json(by_alias=True, indent=2) + "\n")
        (unfinished / "README.md").write_text(model_card(plan, prepared, card))
        return seal(unfinished, folder, "adapter" if plan.tuning.lora is not None else "model", base)


def _write_adapter(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    prepared: PreparedModel,
    plan: RunPlan,
    lora: Lora,
) -> None:
    stored = {adapter_tensor_name(name): tensor for name, tensor in tensors}
    write_tensors(folder, stored.items(), single=ADAPTER_WEIGHTS, shard_bytes=1 << 62)
    source = plan.model
    config = adapter_config(
        lora, stored, source.source, source.revision, Path(prepared.folder), source.trust_remote_code
    )
    config.save_pretrained(str(folder))


def adapter_tensor_name(name: str) -> str:
    """PEFT's name in files: without the adapter's own name, and without the wrapper of a module that learns whole."""
    return name.replace(".modules_to_save.default.", ".").replace(".default.", ".")


def adapter_config(
    lora: Lora,
    names: Collection[str],
    source: str,
    revision: str | None,
    folder: Path,
    trust_remote_code: bool = False,
) -> Any:
    """PEFT's LoraConfig of an adapter whose tensors have these `names`, on the model of `source`, which is at
    `folder`. What is among them and no adapter is the head of a reward model."""
    from finetune_trainers.lean_peft import peft

    adapted = {name.removeprefix(PEFT_PREFIX).partition(".lora_")[0] for name in names if ".lora_" in name}
    is_reward = any(".lora_" not in name for name in names)
    targets = {name.rpartition(".")[2] for name in adapted}
    if lora.target_modules != [ALL_LINEAR] and set(lora.target_modules) != targets:
        targets = adapted  # chosen by path or wildcard: only the full names say which
    from_hub = source.startswith("hf://")
    model = meta_model(_config(folder, trust_remote_code), trust_remote_code)
    return peft.LoraConfig(
        task_type="SEQ_CLS" if is_reward else "CAUSAL_LM",
        modules_to_save=[SCORE_HEAD] if is_reward else None,
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # PEFT only divides it by the rank
        lora_dropout=lora.dropout,
        target_modules=sorted(targets),
        base_model_name_or_path=source.removeprefix("hf://") if from_hub else str(folder),
        revision=revision if from_hub else None,
        fan_in_fan_out=transposed(model, sorted(adapted)),
        inference_mode=True,
    )


def _config(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def _write_model(folder: Path, tensors: Iterable[tuple[str, Tensor]], prepared: PreparedModel, plan: RunPlan) -> None:
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    config = _config(Path(prepared.folder), plan.model.trust_remote_code)
    if get_checkpoint_conversion_mapping(config.model_type) is not None:
        _write_converted(folder, tensors, prepared, plan)
        return
    base = WeightFiles.of(Path(prepared.folder))
    assert base is not None
    is_reward = plan.method.reward is not None
    left_out = second_names(config, plan.model.trust_remote_code)
    model = meta_model(config, plan.model.trust_remote_code, scores=is_reward)
    if is_reward:  # it has no place for an output head
        left_out |= base.shard_of.keys() - {base.stored_name(name) for name, _ in model.named_parameters()}
    dtype = DTYPES[plan.precision]
    write_tensors(folder, _with_base(tensors, base, left_out, dtype))
    write_config(folder, Path(prepared.folder), plan.precision, plan.model.trust_remote_code)
    if is_reward:
        tokenizer = stored_tokenizer(prepared, plan.model.trust_remote_code)
        write_score_config(folder, type(model).__name__, tokenizer, plan.model.trust_remote_code)


def write_score_config(folder: Path, architecture: str, tokenizer: Any, trust_remote_code: bool = False) -> None:
    """What plain transformers must know to read the score, added to the config.json of a folder."""
    config = _config(folder, trust_remote_code)
    settings = score_settings(tokenizer)
    config.architectures = [architecture]
    config.num_labels = settings["num_labels"]
    config.get_text_config().pad_token_id = settings["pad_token_id"]
    config.save_pretrained(folder)


def second_names(config: Any, trust_remote_code: bool = False) -> set[str]:
    """Names of parameters that are another one, such as the output head where it is the embeddings."""
    model = meta_model(config, trust_remote_code)
    one_name = {name for name, _ in model.named_parameters()}
    return {name for name, _ in model.named_parameters(remove_duplicate=False)} - one_name


def _with_base(
    tensors: Iterable[tuple[str, Tensor]], base: WeightFiles, left_out: set[str], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """The trained tensors under the names that the base's files use, then the base's others but for `left_out`:
    second names of tensors that have one already, and what the model has no place for."""
    seen = set(left_out)
    for name, tensor in tensors:
        stored = base.stored_name(name) or name
        seen.add(stored)
        yield stored, tensor.to(dtype)
    for name, tensor in read_tensors(base, [name for name in base.shard_of if name not in seen]):
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor


def _write_converted(
    folder: Path, tensors: Iterable[tuple[str, Tensor]], prepared: PreparedModel, plan: RunPlan
) -> None:
    """For models whose parameters are put together from several tensors of the files: let transformers take them
    apart again, with the model in memory."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        prepared.folder, dtype=DTYPES[plan.precision], trust_remote_code=plan.model.trust_remote_code
    )
    parameters = dict(model.named_parameters())
    for name, tensor in tensors:
        parameters[name].data.copy_(tensor)
    model.save_pretrained(folder, max_shard_size="5GB")
