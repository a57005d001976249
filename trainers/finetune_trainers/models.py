"""The model: found and checked on the driver, loaded on every worker.

`prepare_model` runs once, before any worker exists, loads no weights and refuses whatever could not be trained.
`load_model` and `load_tokenizer` run on each worker, and in evaluation, chat and export.

What the weights are held in after loading (`load_dtype`), decided here and nowhere else:

    precision   full, freeze (torch)   full, freeze (deepspeed)   LoRA's base    LoRA's adapters
    fp32        fp32                   fp32                       fp32           fp32
    bf16        fp32 + autocast        bf16, fp32 masters         bf16           fp32 (torch) / bf16 (deepspeed)
    fp16        fp32 + autocast        fp16, fp32 masters         fp16           fp32 (torch) / fp16 (deepspeed)

The torch engine updates what the model holds, so whatever trains is held in fp32; DeepSpeed keeps fp32 masters itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_api.spec import Quantization
from finetune_trainers.attention import PACKED_ATTENTION
from finetune_trainers.cpu_bf16 import bf16_is_emulated
from finetune_trainers.cpu_products import use_fast_products
from finetune_trainers.errors import UserError
from finetune_trainers.gguf import is_gguf, unpack_gguf
from finetune_trainers.model_checks import check_folder, check_job
from finetune_trainers.model_sources import locate_model
from finetune_trainers.precisions import DTYPES
from finetune_trainers.prepared import PreparedModel
from finetune_trainers.score_head import HEAD, begin_head, has_score_head, read_packed, score_settings
from finetune_trainers.weights import file_digest

__all__ = [
    "load_dtype",
    "load_model",
    "load_tokenizer",
    "meta_model",
    "prepare_model",
    "stored_tokenizer",
]


def prepare_model(plan: RunPlan, cache: Path, on_progress: Callable[[float, str], None]) -> PreparedModel:
    """Find the model's files, see that they are whole and fit the job. Raises UserError with all problems found.

    `cache` is the cache root; a GGUF file is unpacked below it. `on_progress` gets percent and a sentence.
    """
    source = plan.model
    path = locate_model(source.source, "spec.model.source", source.revision, source.trust_remote_code)
    if is_gguf(path):
        path = unpack_gguf(path, file_digest(path), cache, on_progress)
    config, weights = check_folder(path, plan)
    tokenizer_folder = path
    if source.tokenizer is not None:
        tokenizer_folder = locate_model(source.tokenizer, "spec.model.tokenizer")
        if is_gguf(tokenizer_folder):
            tokenizer_folder = unpack_gguf(tokenizer_folder, file_digest(tokenizer_folder), cache, on_progress)
    tokenizer = _open_tokenizer(tokenizer_folder, plan)
    model = meta_model(config, source.trust_remote_code, scores=plan.method.reward is not None)
    problems = check_job(plan, model, weights, tokenizer)
    if problems:
        raise UserError("; ".join(str(problem) for problem in problems), problems)
    text = config.get_text_config()
    on_progress(90.0, "Computing the digest of the weights")
    return PreparedModel(
        folder=str(path),
        tokenizer_folder=str(tokenizer_folder),
        chat_template=_chat_template(plan, tokenizer),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        vocabulary_size=text.vocab_size,
        max_positions=getattr(text, "max_position_embeddings", None),
        digest=weights.digest(),
    )


def meta_model(config: Any, trust_remote_code: bool = False, scores: bool = False) -> PreTrainedModel:
    """The model without its weights: names, shapes and modules only. Tied weights are one parameter, as in training.

    `scores`: with a score in the place of the output head, where transformers knows such a model.
    """
    scored = scores and has_score_head(config)
    kind: Any = AutoModelForSequenceClassification if scored else AutoModelForCausalLM
    if scored:
        config = copy.deepcopy(config)
        config.num_labels = 1
    with torch.device("meta"):
        model = kind.from_config(config, attn_implementation=PACKED_ATTENTION, trust_remote_code=trust_remote_code)
    model.tie_weights()
    assert isinstance(model, PreTrainedModel)
    return model


def load_dtype(plan: RunPlan) -> torch.dtype:
    """What the weights are held in after loading; see the table at the top."""
    masters_here = plan.deepspeed.engine == "torch" and plan.tuning.lora is None
    return torch.float32 if masters_here else DTYPES[plan.precision]


def load_model(
    model: PreparedModel, plan: RunPlan, device: torch.device, zero3_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """The model on `device`, with packed attention, in `load_dtype(plan)`, before any tuning is applied.

    With `zero3_config` (the whole DeepSpeed configuration, torch.distributed being initialised) each parameter is
    split over the ranks as soon as it is read, so no rank ever holds the model.
    """
    arguments: dict[str, Any] = {
        "dtype": load_dtype(plan),
        "attn_implementation": PACKED_ATTENTION,
        "trust_remote_code": plan.model.trust_remote_code,
        "local_files_only": True,
    }
    quantization = plan.tuning.lora.quantization if plan.tuning.lora is not None else Quantization.NONE
    if quantization is not Quantization.NONE:
        arguments |= {
            "quantization_config": _bitsandbytes(quantization, _compute_dtype(arguments["dtype"], device)),
            "device_map": {"": device},
        }
    zero3 = None
    if zero3_config is not None:
        from transformers.integrations import HfDeepSpeedConfig

        zero3 = HfDeepSpeedConfig(zero3_config)
    loaded = _with_score(model, plan, arguments) if plan.method.reward is not None else None
    if loaded is None:
        loaded = AutoModelForCausalLM.from_pretrained(model.folder, **arguments)
    if zero3 is not None:
        # transformers holds this object weakly, and `generate` asks for it to keep the ranks in step
        loaded.finetune_zero3 = zero3
    elif quantization is Quantization.NONE:
        nn.Module.to(loaded, device)
    else:
        _stay_as_loaded(loaded)
    use_fast_products(loaded, DTYPES[plan.precision], device)
    return loaded


def _with_score(model: PreparedModel, plan: RunPlan, arguments: dict[str, Any]) -> PreTrainedModel:
    """The model with a new score head, which reads packed documents."""
    settings = score_settings(stored_tokenizer(model, plan.model.trust_remote_code))
    if "quantization_config" in arguments and plan.tuning.lora is not None:
        arguments["quantization_config"].llm_int8_skip_modules = [HEAD]
    loaded: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        model.folder, **arguments, num_labels=settings["num_labels"]
    )
    loaded.config.get_text_config().pad_token_id = settings["pad_token_id"]
    begin_head(loaded, plan.optimization.seed)
    read_packed(loaded)
    return loaded


def _compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    return torch.float32 if dtype is torch.bfloat16 and bf16_is_emulated(device) else dtype


def _bitsandbytes(quantization: Quantization, compute_dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    from finetune_trainers.lean_peft import with_bitsandbytes

    with_bitsandbytes()
    if quantization is Quantization.INT8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _stay_as_loaded(model: Any) -> None:
    """Where the processor has AVX-512 for bf16, bitsandbytes lays 4-bit weights out anew when they are first evaluated,
    in their place, for inference alone and for some shapes only. Here training goes on afterwards."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def stored_tokenizer(model: PreparedModel, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer with the job's chat template, otherwise as it is stored."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
        model.tokenizer_folder, trust_remote_code=trust_remote_code, local_files_only=True
    )
    tokenizer.chat_template = model.chat_template
    return tokenizer


def load_tokenizer(model: PreparedModel, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer with the job's chat template, ready for batches: one without a padding token pads with
    end-of-sequence."""
    tokenizer = stored_tokenizer(model, trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _open_tokenizer(folder: Path, plan: RunPlan) -> PreTrainedTokenizerBase:
    field = "spec.model.source" if plan.model.tokenizer is None else "spec.model.tokenizer"
    value = plan.model.tokenizer or plan.model.source
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=plan.model.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # each kind of tokenizer fails in its own way; all of them mean this
        problem = Problem(
            path=field,
            value=value,
            message="the tokenizer is missing or broken: the folder needs tokenizer.json (or tokenizer.model) and"
            " tokenizer_config.json; name another folder in spec.model.tokenizer",
        )
        raise UserError(str(problem), [problem]) from error
    return tokenizer


def _chat_template(plan: RunPlan, tokenizer: PreTrainedTokenizerBase) -> str | None:
    if plan.model.chat_template == "tokenizer":
        template = tokenizer.chat_template
        return template.get("default") if isinstance(template, dict) else template
    from finetune_trainers.data.template import STORED_TEMPLATES

    return STORED_TEMPLATES[plan.model.chat_template]
