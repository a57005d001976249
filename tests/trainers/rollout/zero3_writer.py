"""One rank of `test_under_zero3`: writes with a model whose parameters are spread over the ranks.

RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 python -m tests.trainers.rollout.zero3_writer FOLDER
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from finetune_trainers.rollout import Sampling
from tests.trainers.rollout.writers import PROMPTS, engine_for, load_policy, requests_for
from tests.trainers.zero3_worker import join_through

__all__ = ["DRAWN", "END_IDS", "shares"]

DRAWN = Sampling(max_new_tokens=12, temperature=0.9)
END_IDS = list(range(10, 30))


def shares() -> list[list[int]]:
    """Numbers of the prompts of each rank, call by call: unequal, and none on one rank or the other."""
    return [list(range(7)), [7, 8, 9], [], [0, 1], [2], []]


class GlooContext:
    """The part of WorkerContext that rollout uses, on torch's own process group."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.local_world_size = self.world_size

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor


def main(folder: Path) -> None:
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # no C++ build at the first collective
    join_through(folder)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    model = load_policy(folder / "model")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "weight_decay": 0.0}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    ds, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    assert all(parameter.numel() == 0 for parameter in model.parameters()), "the model is not spread"
    requests = requests_for(PROMPTS)
    results: dict[str, Any] = {}
    for gather in (True, False):
        engine = engine_for(ds, END_IDS, GlooContext(), gather=gather)
        for call in range(3):
            own = shares()[call * 2 + dist.get_rank()]
            answers = engine.generate([requests[index] for index in own], DRAWN)
            results[f"{gather} {call}"] = [asdict(answer) for answer in answers]
            loss = ds(input_ids=torch.tensor([[3, 4, 5, 6 + call]])).logits.float().logsumexp(-1).sum()
            ds.backward(loss * 0.0)  # training goes on in between, and changes nothing
            ds.step()
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
