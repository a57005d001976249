"""A model that never learns is split where ZeRO-3 splits the one that does, and says what it says in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.integrations import deepspeed as zero3_switch

from finetune_api.plan import RunPlan
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.frozen import NEVER_LEARNS, load_frozen
from finetune_trainers.models import load_model
from finetune_trainers.prepared import PreparedModel
from finetune_trainers.resting import RestingWeights
from finetune_trainers.rollout.zero3 import inside, is_split
from finetune_trainers.teacher import load_teacher
from finetune_trainers.worker import load
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.judged_world import zero
from tests.trainers.school import School
from tests.trainers.tiny import packed_inputs

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

KEEP_NOTHING: dict[str, Any] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
OFFLOAD = {"optimizer": "cpu", "parameters": "cpu"}
SPLIT: dict[str, dict[str, Any]] = {
    "zero 3": {"deepspeed": {"zeroStage": 3, "config": KEEP_NOTHING}},
    "bf16": {"deepspeed": {"zeroStage": 3, "config": KEEP_NOTHING}, "training.precision": "bf16"},
    "offloaded": {"deepspeed": {"zeroStage": 3, "offload": OFFLOAD, "config": KEEP_NOTHING}},
}


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> School:
    return School.at(tmp_path_factory.mktemp("school"))


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    """What transformers makes in the next test is whole, whatever became of this one's engine."""
    yield
    zero3_switch.unset_hf_deepspeed_config()


def frozen(model: PreparedModel, plan: RunPlan) -> nn.Module:
    as_model = plan.model_copy(update={"tuning": NEVER_LEARNS})
    return load_frozen(partial(load_model, model, as_model, torch.device("cpu")), plan)


@torch.no_grad()
def logits(module: nn.Module) -> torch.Tensor:
    found: torch.Tensor = module(**packed_inputs([5, 9, 3])).logits
    return found


@pytest.mark.parametrize("way", SPLIT)
def test_beside_an_engine_it_is_split_and_says_to_the_bit_what_the_whole_one_says(
    way: str, school: School, tmp_path: Path
) -> None:
    plan = school.plan(SPLIT[way])
    prepared = school.world.prepare(plan, tmp_path)
    wanted = logits(frozen(prepared.model, school.plan({"training.precision": plan.precision})))
    load(plan, prepared, SingleProcessContext(plan, tmp_path))
    knew = zero3_switch._hf_deepspeed_config_weak_ref
    model = frozen(prepared.model, plan)
    assert zero3_switch._hf_deepspeed_config_weak_ref is knew, "generating asks whether the policy is split"
    assert is_split(model)
    for _ in range(2):
        assert torch.equal(logits(model), wanted)
    assert not any(parameter.numel() or parameter.requires_grad for parameter in model.parameters())
    assert not any(part.training for part in inside(model).modules())


def test_the_teacher_is_split_as_well(school: School, tmp_path: Path) -> None:
    plan = school.plan(zero(3))
    prepared = school.world.prepare(plan, tmp_path)
    load(plan, prepared, SingleProcessContext(plan, tmp_path))
    assert prepared.teacher is not None
    teacher = load_teacher(prepared.teacher, plan, torch.device("cpu"))
    assert is_split(teacher)


@pytest.mark.parametrize("stage", [0, 2])
def test_where_the_model_that_learns_is_whole_so_is_it(stage: int, school: School, tmp_path: Path) -> None:
    plan = school.plan(zero(stage))
    model = frozen(school.world.prepare(plan, tmp_path).model, plan)
    assert not is_split(model)
    assert all(parameter.numel() and not parameter.requires_grad for parameter in model.parameters())


def test_what_lies_in_parts_on_the_ranks_does_not_rest_in_files(school: School, tmp_path: Path) -> None:
    plan = school.plan(zero(3))
    prepared = school.world.prepare(plan, tmp_path)
    load(plan, prepared, SingleProcessContext(plan, tmp_path))
    assert RestingWeights(frozen(prepared.model, plan), school.world.model).num_resting_bytes == 0
