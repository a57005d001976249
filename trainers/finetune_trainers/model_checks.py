"""What is checked of a model before any worker starts. Called by `models.prepare_model`; nothing here loads weights.

Each fault becomes a Problem: the field of the job, what was found there, and what would be right.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_api.failures import Problem
from finetune_api.plan import Device, RunPlan
from finetune_api.spec import Freeze, Lora, Precision, Quantization
from finetune_trainers.errors import UserError
from finetune_trainers.tuning import SCORE_HEAD, linear_names, lora_targets, matching, transposed
from finetune_trainers.weights import INDEX, BrokenWeightsError, WeightFiles

__all__ = ["check_folder", "check_job", "packing_fault"]

SOURCE = "spec.model.source"
NF4_BLOCK = 64
"""Weights that share a scale, as bitsandbytes has them by default."""


def check_folder(folder: Path, plan: RunPlan) -> tuple[Any, WeightFiles]:
    """The configuration and the weight files of a model folder. Raises UserError at the first fault."""
    config = _read_config(folder, plan)
    return config, _read_weights(folder, plan)


def _refused(plan: RunPlan, message: str, path: str = SOURCE, value: str | None = None) -> UserError:
    problem = Problem(path=path, value=value or plan.model.source, message=message)
    return UserError(str(problem), [problem])


def _read_config(folder: Path, plan: RunPlan) -> Any:
    if not folder.is_dir():
        raise _refused(
            plan, f"{folder.name} is neither a folder in Hugging Face layout nor a GGUF file; name one of these"
        )
    file = folder / "config.json"
    if not file.is_file():
        raise _refused(plan, f"{folder} has no config.json; name the folder of a model in Hugging Face layout")
    try:
        raw = json.loads(file.read_text())
        if not isinstance(raw, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise _refused(plan, f"{file} is not JSON: {error}; copy it again") from error
    kind = str(raw.get("model_type"))
    if not plan.model.trust_remote_code and kind not in CONFIG_MAPPING_NAMES:
        if raw.get("auto_map"):
            message = f"the model type {kind} is Python code of its repository; read it, then set trustRemoteCode: true"
            raise _refused(plan, message, "spec.model.trustRemoteCode", "false")
        raise _refused(plan, f"{file}: transformers knows no model_type {kind}; use a model of a type that it knows")
    try:
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=plan.model.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # a configuration class may raise whatever it likes about its fields
        raise _refused(plan, f"{file} cannot be used: {_first_line(error).rstrip(':')}; copy it again") from error
    _check_causal(config, raw, plan)
    return config


def _check_causal(config: Any, raw: dict[str, Any], plan: RunPlan) -> None:
    architectures = [str(name) for name in raw.get("architectures") or []]
    if plan.model.trust_remote_code and "AutoModelForCausalLM" in (raw.get("auto_map") or {}):
        return
    causal = _names(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type))
    if not causal or config.is_encoder_decoder or (architectures and not causal & set(architectures)):
        found = architectures[0] if architectures else config.model_type
        raise _refused(
            plan,
            f"{found} is not a causal language model; its config.json must name one, such as LlamaForCausalLM",
        )


def _names(entry: Any) -> set[str]:
    return set() if entry is None else {entry} if isinstance(entry, str) else set(entry)


def _read_weights(folder: Path, plan: RunPlan) -> WeightFiles:
    try:
        weights = WeightFiles.of(folder)
    except BrokenWeightsError as error:
        raise _refused(plan, str(error)) from error
    if weights is not None:
        return weights
    shards = sorted(folder.glob("model-*-of-*.safetensors"))
    if shards:
        raise _refused(plan, f"{folder} has {len(shards)} shards and no {INDEX}; copy the whole model")
    if next(iter([*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]), None) is not None:
        raise _refused(
            plan,
            f"{folder} holds its weights as pickles, which can run code when read; convert them where you trust them:"
            " AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)",
        )
    raise _refused(plan, f"{folder} has no model.safetensors and no {INDEX}; copy the whole model")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def check_job(
    plan: RunPlan, model: PreTrainedModel, weights: WeightFiles, tokenizer: PreTrainedTokenizerBase
) -> list[Problem]:
    """All that this job asks of this model and cannot have. `model` is on the meta device."""
    unfit = _check_score(plan, model) or _check_architecture(plan, model)
    return unfit or [
        *_check_tensors(plan, model, weights),
        *_check_vocabulary(plan, model, tokenizer),
        *_check_length(plan, model),
        *_check_device(plan),
        *_check_quantization(plan, model),
        *_check_tuning(plan, model),
    ]


_KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def _check_architecture(plan: RunPlan, model: PreTrainedModel) -> list[Problem]:
    fault = packing_fault(model)
    if fault is None:
        return []
    message = f"{fault}; use a model with plain causal attention"
    return [Problem(path=SOURCE, value=plan.model.source, message=message)]


def packing_fault(model: PreTrainedModel) -> str | None:
    """Why `model` cannot read several documents at once, if it cannot: they must not see one another, which only
    attention that goes by the boundaries can promise."""
    name = type(model).__name__
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if model._is_stateful or not kinds <= _KNOWN_LAYERS:
        return f"{name} has recurrent or chunked layers, which cannot keep packed documents apart"
    if not model._supports_attention_backend:
        return f"{name} brings its own attention, which cannot keep packed documents apart"
    if any(getattr(module, "is_causal", True) is False for module in model.modules()):
        return f"{name} reads in both directions"
    if any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules()):
        return f"{name} counts positions its own way, which cannot keep packed documents apart"
    return None


def _check_score(plan: RunPlan, model: PreTrainedModel) -> list[Problem]:
    """A reward model needs transformers' way of putting a score in the place of the output head."""
    if plan.method.reward is None or isinstance(getattr(model, SCORE_HEAD, None), nn.Linear):
        return []
    message = f"transformers knows no {type(model).__name__} with a score in the place of its output head"
    return [Problem(path=SOURCE, value=plan.model.source, message=f"{message}; use another model for method.reward")]


def _check_tensors(plan: RunPlan, model: PreTrainedModel, weights: WeightFiles) -> list[Problem]:
    """Every parameter must come from the files: transformers would fill a missing one with random numbers."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    if get_checkpoint_conversion_mapping(model.config.model_type) is not None:
        return []  # parameters are made of several tensors under other names
    problems = []
    names_of: dict[int, list[str]] = {}
    shapes: dict[int, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(id(parameter), []).append(name)
        shapes[id(parameter)] = tuple(parameter.shape)
    for key, names in names_of.items():
        if plan.method.reward is not None and names == [f"{SCORE_HEAD}.weight"]:
            continue  # begins anew
        stored = [found for name in names if (found := weights.stored_name(name)) is not None]
        if not stored:
            problems.append(
                f"the tensor {names[0]} is in none of its {len(weights.shards)} weight files; copy all of them"
            )
        elif weights.shapes[stored[0]] != shapes[key]:
            sizes = f"{list(weights.shapes[stored[0]])}, and config.json says {list(shapes[key])}"
            problems.append(
                f"the tensor {stored[0]} in {weights.shard_of[stored[0]]} has the shape {sizes}; copy both again"
            )
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return [Problem(path=SOURCE, value=plan.model.source, message=text + more) for text in problems[:1]]


def _check_vocabulary(plan: RunPlan, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Problem]:
    rows = model.get_input_embeddings().weight.shape[0]  # type: ignore[index]
    highest = max(tokenizer.get_vocab().values(), default=-1)
    if highest < rows:
        return []
    return [
        Problem(
            path=SOURCE if plan.model.tokenizer is None else "spec.model.tokenizer",
            value=plan.model.tokenizer or plan.model.source,
            message=f"the tokenizer has tokens up to id {highest} and the model has embeddings for {rows};"
            " name the tokenizer that belongs to the model",
        )
    ]


def _check_length(plan: RunPlan, model: PreTrainedModel) -> list[Problem]:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = plan.method.settings.max_seq_length
    if positions is None or length <= positions:
        return []
    message = f"the model has {positions} positions; set at most that"
    return [Problem(path=f"spec.method.{plan.method.chosen}.maxSeqLength", value=str(length), message=message)]


def _check_device(plan: RunPlan) -> list[Problem]:
    if plan.workers.device is Device.CPU and plan.precision is Precision.FP16:
        message = "fp16 needs a GPU; set bf16 or fp32"
        return [Problem(path="spec.training.precision", value="fp16", message=message)]
    return []


def _check_quantization(plan: RunPlan, model: PreTrainedModel) -> list[Problem]:
    """On processors with AVX-512, bitsandbytes reads 4-bit rows wrongly that are no whole number of blocks."""
    quantization = Quantization.NONE if plan.tuning.lora is None else plan.tuning.lora.quantization
    on_cpu = plan.workers.device is Device.CPU
    if quantization is Quantization.NONE:
        return []
    if importlib.util.find_spec("bitsandbytes") is None:
        message = "needs the package bitsandbytes: pip install 'finetune-operator[quantization]', or set none"
    elif quantization is Quantization.NF4 and on_cpu and (odd := _rows_of_no_whole_blocks(model)):
        message = (
            f"a CPU needs layers whose inputs are a multiple of {NF4_BLOCK}, unlike {odd[0]} of this model; set int8"
        )
    else:
        return []
    return [Problem(path="spec.tuning.lora.quantization", value=quantization, message=message)]


def _rows_of_no_whole_blocks(model: PreTrainedModel) -> list[str]:
    layers = [(name, model.get_submodule(name)) for name in linear_names(model)]
    return [name for name, layer in layers if getattr(layer, "in_features", NF4_BLOCK) % NF4_BLOCK]


def _check_tuning(plan: RunPlan, model: PreTrainedModel) -> list[Problem]:
    if plan.tuning.lora is not None:
        return _check_lora(plan.tuning.lora, model)
    if plan.tuning.freeze is not None:
        return _check_freeze(plan.tuning.freeze, model)
    return []


def _check_lora(lora: Lora, model: PreTrainedModel) -> list[Problem]:
    field = "spec.tuning.lora.targetModules"
    kinds = sorted({name.rpartition(".")[2] for name in linear_names(model)})
    targets = lora_targets(model, lora.target_modules)
    problems = [
        Problem(
            path=f"{field}[{index}]",
            value=pattern,
            message=f"matches no linear layer of the model; it has {', '.join(kinds)}",
        )
        for index, (pattern, names) in enumerate(targets.items())
        if not names
    ]
    head = model.get_output_embeddings()
    shares_weights = head is not None and head.weight is model.get_input_embeddings().weight
    for pattern, names in targets.items():
        if shares_weights and any(model.get_submodule(name) is head for name in names):
            message = "matches the output head, which shares its weights with the embeddings; leave it out"
            problems.append(Problem(path=field, value=pattern, message=message))
    chosen = [name for names in targets.values() for name in names]
    if chosen and any(transposed(model, [name]) for name in chosen) and not transposed(model, chosen):
        message = "mixes layers that keep their weights in different layouts; name one kind only"
        problems.append(Problem(path=field, value=", ".join(lora.target_modules), message=message))
    return problems


def _check_freeze(freeze: Freeze, model: PreTrainedModel) -> list[Problem]:
    """Each pattern must match something, and each step of `unfreeze` something that does not learn yet."""
    problems: list[Problem] = []
    example = next(name for name, _ in model.named_parameters())

    def check(patterns: list[str], field: str) -> set[str]:
        for index, pattern in enumerate(patterns):
            if not matching(model, [pattern]):
                message = f"matches no parameter of the model; names look like {example}"
                problems.append(Problem(path=f"{field}[{index}]", value=pattern, message=message))
        return set(matching(model, patterns))

    learning = check(freeze.train, "spec.tuning.freeze.train")
    for index, step in sorted(enumerate(freeze.unfreeze), key=lambda item: item[1].at):
        field = f"spec.tuning.freeze.unfreeze[{index}].layers"
        names = check(step.layers, field)
        if names and names <= learning:
            message = f"all that these match learns already before {step.at}; remove the step or name other layers"
            problems.append(Problem(path=field, value=", ".join(step.layers), message=message))
        learning |= names
    return problems
