"""A training goes on from a checkpoint that came back from another program as if it had never been away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune_api.plan import RunPlan
from finetune_api.progress import Progress, Result
from finetune_trainers.checkpoint.exports import export_checkpoint
from finetune_trainers.checkpoint.find import newest_first
from finetune_trainers.checkpoint.imports import ImportOptions, import_checkpoint
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError
from tests.trainers.checkpoint.command import Ckpt
from tests.trainers.checkpoint.trained import NOON
from tests.trainers.conftest import SmallWorld
from tests.trainers.foreign_warnings import PEFT_ASKS_TRANSFORMERS

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    PEFT_ASKS_TRANSFORMERS,
]
WAYS: dict[str, dict[str, Any]] = {
    "dcp": {},
    "deepspeed": {"tuning": {"lora": {"rank": 4, "targetModules": ["all-linear"]}}},
}


def plan_at(world: SmallWorld, place: str, changes: dict[str, Any]) -> RunPlan:
    settings = {"training.maxSteps": 6, "training.precision": "fp32", "checkpoint": {"everySteps": 3, "keepLast": 5}}
    plan = world.plan(settings | changes)
    assert plan.checkpoint is not None
    return plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update={"uri": place})})


def weights(run: Path) -> dict[str, Tensor]:
    return {
        name: tensor for file in (run / "artifact").glob("*.safetensors") for name, tensor in load_file(file).items()
    }


def at_step(storage: Storage, step: int) -> Manifest:
    return next(one for one in newest_first(storage) if isinstance(one, Manifest) and one.intent.step == step)


@pytest.mark.parametrize("way", WAYS)
def test_a_training_goes_on_from_what_came_back(small_world: SmallWorld, tmp_path: Path, ckpt: Ckpt, way: str) -> None:
    here, there = f"file://{tmp_path}/here", f"file://{tmp_path}/there"
    plan = plan_at(small_world, here, WAYS[way])
    assert small_world.train(plan, tmp_path / "whole").result is Result.SUCCEEDED
    saved = at_step(open_storage(here), 3)
    export_checkpoint(open_storage(here), saved, str(tmp_path / "out"), way)
    (tmp_path / "plan.json").write_text(plan.model_dump_json(by_alias=True))
    done = ckpt("import", there, "--from", tmp_path / "out", "--for", tmp_path / "plan.json", "--allow-pickle")
    assert done.exit_code == 0, done.stderr
    assert f"goes on after step 3 at {there}" in done.stdout
    assert "Note" not in done.stdout
    again = plan_at(small_world, there, WAYS[way])
    assert small_world.train(again, tmp_path / "rest").result is Result.SUCCEEDED
    reports = (tmp_path / "rest" / "progress.jsonl").read_text().splitlines()
    assert 3 in {Progress.model_validate_json(line).resumed_from_step for line in reports}
    found, wanted = weights(tmp_path / "rest"), weights(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_is_not_of_the_base_model_is_refused(small_world: SmallWorld, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import save

    options = ImportOptions(base=small_world.model, allow_pickle=True)
    save({"model.norm.weight": torch.zeros(3)}, checkpoint_id=str(tmp_path / "shape"), no_dist=True)
    with pytest.raises(UserError, match=r"norm\.weight has shape \(3,\), and the base model has it as \(64,\)"):
        import_checkpoint(tmp_path / "shape", open_storage(f"file://{tmp_path}/1"), "dcp", options, NOON)
    save({"encoder.weight": torch.zeros(3)}, checkpoint_id=str(tmp_path / "name"), no_dist=True)
    with pytest.raises(UserError, match=r"encoder\.weight is no parameter of the model in .*; say with --prefix"):
        import_checkpoint(tmp_path / "name", open_storage(f"file://{tmp_path}/2"), "dcp", options, NOON)
