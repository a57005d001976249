"""One rank of `test_evaluation_under_zero3`: evaluates a model whose parameters are spread over the ranks.

RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 python -m tests.trainers.zero3_worker OUT_FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_api.spec import GenerationEval
from finetune_trainers.attention import PACKED_ATTENTION
from finetune_trainers.data.batches import Batch
from finetune_trainers.data.prompts import EvalPrompt
from finetune_trainers.evaluation import evaluate, evaluate_generation

SETTINGS = GenerationEval(max_new_tokens=12)
PROMPTS = [EvalPrompt([2 + (7 * i + j) % 60 for j in range(1 + 5 * i)], "w2 w3 w4") for i in range(5)]


def batch_of(tokens: list[int]) -> Batch:
    return Batch(
        input_ids=torch.tensor([tokens]),
        labels=torch.tensor([[*tokens[1:], -100]]),
        position_ids=torch.arange(len(tokens))[None],
        cu_seqlens=torch.tensor([0, len(tokens)], dtype=torch.int32),
        max_seqlen=len(tokens),
        num_trained_tokens=len(tokens) - 1,
    )


def figures(
    module: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, context: Any
) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """Losses of three rows, the second rank having one and a dummy, and answers to five prompts."""
    rows = [batch_of([5, 9, 2, 33, 7, 1]), batch_of([8, 41, 1]), batch_of([60, 3, 17, 22]), batch_of([0])]
    losses = evaluate(module, rows[context.rank :: context.world_size], context)
    answers, samples = evaluate_generation(module, tokenizer, PROMPTS, SETTINGS, context)
    return losses, answers, [sample["answer"] for sample in samples]


def join_through(folder: Path) -> None:
    """The ranks meet in a file there: a port that is free now may be taken when they have imported everything."""
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=world_size)


class GlooContext:
    """The part of WorkerContext that evaluation uses, on torch's own process group."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor

    def all_gather_object(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values


def main(folder: Path) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no C++ build at the first collective
    join_through(folder)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    model = LlamaForCausalLM.from_pretrained(folder, attn_implementation=PACKED_ATTENTION)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "the model is not spread"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    result = figures(engine.module, tokenizer, GlooContext())
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
