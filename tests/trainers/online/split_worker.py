"""One rank of `test_split_roles`: a whole run, and how much of each model it held whenever a step began.

RANK=0 WORLD_SIZE=2 LOCAL_RANK=0 python -m tests.trainers.online.split_worker FOLDER    (FOLDER holds the run's files)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from finetune_api.plan import RunPlan
from finetune_trainers import worker
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.data.batches import StepBatches
from finetune_trainers.online.method import Online
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.rewards import judge
from finetune_trainers.rewards.weighted import WeightedRewards
from tests.trainers.zero3_worker import join_through


class GlooContext(SingleProcessContext):
    """A rank of torch's own process group."""

    def __init__(self, plan: RunPlan, workdir: Path) -> None:
        super().__init__(plan, workdir)
        self.rank = self.local_rank = dist.get_rank()
        self.world_size = self.local_world_size = dist.get_world_size()

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        dist.barrier()

    def broadcast_object(self, value: Any) -> Any:
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        boxes: list[Any] = [None] * self.world_size
        dist.all_gather_object(boxes, value)
        return boxes


def roles(method: Online) -> dict[str, nn.Module]:
    """The models of a method, by what they are for."""
    parts = method._parts
    assert parts.models._reference is not None
    assert isinstance(parts.rewards, WeightedRewards)
    found = {"policy and critic": parts.models.policy, "reference": parts.models._reference}
    for reward in parts.rewards._rewards:
        assert isinstance(reward.scorer, judge.Judge)
        found[reward.name] = reward.scorer._module
    return found


def held(module: nn.Module) -> tuple[int, int]:
    """Numbers of `module` that this rank holds, and that there are."""
    parameters = list(module.parameters())
    own = sum(one.numel() + (one.ds_tensor.numel() if hasattr(one, "ds_tensor") else 0) for one in parameters)
    return own, sum(getattr(one, "ds_numel", one.numel()) for one in parameters)


def main(folder: Path) -> None:
    join_through(folder)
    plan = RunPlan.model_validate_json((folder / "plan.json").read_bytes())
    prepared = PreparedRun.model_validate_json((folder / "prepared.json").read_bytes())
    judge._TOKENS_PER_PASS["cpu"] = 1  # one answer each: a rank with fewer of them has fewer passes to make
    found: list[dict[str, tuple[int, int]]] = []
    plain = Online.step

    def noted(self: Online, step: int) -> StepBatches | None:
        batches = plain(self, step)
        found.append({name: held(module) for name, module in roles(self).items()})
        return batches

    Online.step = noted  # type: ignore[method-assign]
    worker.run(plan, prepared, GlooContext(plan, folder), folder)
    (folder / f"held-{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
