"""One rank of `test_vllm_team`: shares a vLLM with the other, which learns under ZeRO-3 as it does.

RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 ROLLOUT_VLLM_PYTHON=… python -m tests.trainers.rollout.vllm_team_writer FOLDER

FOLDER has the policy in `model` and a plan with `vllm` in plan.json.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import deepspeed
import psutil
import torch.distributed as dist

from finetune_api.plan import RunPlan
from finetune_api.spec import Vllm
from finetune_trainers.context import WorkerContext
from finetune_trainers.errors import UserError
from finetune_trainers.prepared import PreparedModel
from finetune_trainers.rollout import Sampling
from finetune_trainers.rollout.vllm_engine import start_vllm
from tests.trainers.rollout.writers import PROMPTS, load_policy, requests_for
from tests.trainers.rollout.zero3_writer import END_IDS, shares
from tests.trainers.zero3_worker import GlooContext, join_through

__all__ = ["DRAWN"]

DRAWN = Sampling(max_new_tokens=12, temperature=0.0)
SHARED = Vllm(tensor_parallel_size=2, kv_cache_gib=1)


class TeamContext(GlooContext):
    def report(self, *_: Any, **__: Any) -> None:
        """Nobody listens."""


def spread(folder: Path) -> Any:
    """The policy in an engine of DeepSpeed, of which each rank has a part."""
    model = load_policy(folder)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "the model is not spread"
    return engine


def main(folder: Path) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no C++ build at the first collective
    join_through(folder)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    module, context = spread(folder / "model"), cast("WorkerContext", TeamContext())
    plan = RunPlan.model_validate_json((folder / "plan.json").read_text())
    length = plan.model_dump()["method"]["grpo"]["max_seq_length"]

    def prepared(model: Path) -> PreparedModel:
        return PreparedModel(
            folder=str(model),
            tokenizer_folder=str(model),
            chat_template=None,
            num_parameters=1,
            vocabulary_size=1,
            max_positions=None,
            digest="",
        )

    engine: Any = start_vllm(plan, prepared(folder / "model"), SHARED, length, module, END_IDS, context)
    processes = len(psutil.Process(os.getpid()).children())
    engine.update_weights()
    digests = engine._engine.digests() if processes else []
    requests, told, answers = requests_for(PROMPTS), [], []
    for call in range(3):
        own = [requests[index] for index in shares()[call * 2 + context.rank]]
        engine.start(own, DRAWN)
        answers.append([asdict(one) for one in engine.collect(lambda done, num: told.append((done, num)))])
    engine.sleep()
    engine.wake()
    engine.close()
    left = len(psutil.Process(os.getpid()).children())
    try:
        start_vllm(plan, prepared(folder / "nowhere"), SHARED, length, module, END_IDS, context)
        refused = ""
    except UserError as error:
        refused = str(error)
    found = {
        "processes": processes,
        "left": left,
        "answers": answers,
        "told": told,
        "refused": refused,
        "digests": digests,
    }
    (folder / f"rank-{context.rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
