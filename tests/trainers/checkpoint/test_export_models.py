"""Checkpoints of real trainings leave as what training itself would have written, and open in transformers and PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.plan import RunPlan
from finetune_api.progress import Outcome, Result
from finetune_api.spec import Precision
from finetune_trainers.checkpoint.exports import ExportOptions, export_checkpoint
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError
from finetune_trainers.lean_peft import peft
from finetune_trainers.merge import merge_adapter
from tests.trainers.conftest import SmallWorld
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.judged_world import JudgedWorld

pytestmark = [
    *WHEN_TRAINING,
]
STEPS = {"training.maxSteps": 3, "training.precision": "fp32", "checkpoint": {"everySteps": 3}}
FP32 = ExportOptions(dtype=Precision.FP32)
LORA = {"tuning": {"lora": {"rank": 4, "alpha": 9, "targetModules": ["all-linear"]}}}
FREEZE = {"tuning": {"freeze": {"train": ["model.layers.1.*"]}}}
PROBE = torch.arange(3, 15)[None]


@dataclass(frozen=True)
class Trained:
    """A finished run: its artifact, and the checkpoint of its last step."""

    folder: Path
    model: Path
    storage: Storage
    manifest: Manifest

    @property
    def artifact(self) -> Path:
        return self.folder / "run" / "artifact"

    def export(self, to: Path, options: ExportOptions = FP32) -> Path:
        export_checkpoint(self.storage, self.manifest, str(to), "hf", options)
        return to


def trained(world: SmallWorld, folder: Path, changes: dict[str, Any]) -> Trained:
    return saved_and_trained(world.plan(STEPS | changes), folder, world.train, world.model)


def saved_and_trained(plan: RunPlan, folder: Path, train: Callable[[RunPlan, Path], Outcome], model: Path) -> Trained:
    assert plan.checkpoint is not None
    uri = f"file://{folder}/checkpoints"
    plan = plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update={"uri": uri})})
    assert train(plan, folder / "run").result is Result.SUCCEEDED
    storage = open_storage(uri)
    manifest = find_newest(storage).manifest
    assert manifest is not None
    return Trained(folder, model, storage, manifest)


@pytest.fixture(scope="module")
def whole(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(small_world, tmp_path_factory.mktemp("whole"), {})


@pytest.fixture(scope="module")
def lora(small_world: SmallWorld, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return trained(small_world, tmp_path_factory.mktemp("lora"), LORA)


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=PROBE).logits.float()  # type: ignore[no-any-return]


def test_a_checkpoint_is_exported_as_the_model_that_training_writes(whole: Trained, tmp_path: Path) -> None:
    out = whole.export(tmp_path / "out")
    assert_same(weights(out), weights(whole.artifact))
    exported = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits_of(exported), logits_of(AutoModelForCausalLM.from_pretrained(whole.artifact)))
    text = "the cat sees a dog"
    assert AutoTokenizer.from_pretrained(out)(text) == AutoTokenizer.from_pretrained(whole.model)(text)
    listed = json.loads((out / "digests.json").read_text())
    assert listed["files"].keys() == {path.name for path in out.iterdir()} - {"digests.json"}
    assert listed["base"]["digest"] == json.loads((whole.artifact / "digests.json").read_text())["base"]["digest"]


def test_every_type_and_size_of_files_opens(whole: Trained, tmp_path: Path) -> None:
    options = ExportOptions(dtype=Precision.FP16, max_shard_bytes=40_000)
    out = whole.export(tmp_path / "out", options)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype is torch.float16
    assert_same(weights(out), {name: tensor.half() for name, tensor in weights(whole.artifact).items()})


def test_what_was_frozen_comes_from_the_base(small_world: SmallWorld, tmp_path: Path) -> None:
    run = trained(small_world, tmp_path, FREEZE)
    assert_same(weights(run.export(tmp_path / "out")), weights(run.artifact))


def test_a_lora_checkpoint_is_exported_as_the_adapter_that_training_writes(lora: Trained, tmp_path: Path) -> None:
    out = lora.export(tmp_path / "out")
    assert_same(weights(out), weights(lora.artifact))
    files = (out, lora.artifact)
    written, wanted = (json.loads((folder / "adapter_config.json").read_text()) for folder in files)
    assert written == wanted
    exported = peft.AutoPeftModelForCausalLM.from_pretrained(out)
    assert torch.equal(logits_of(exported), logits_of(peft.AutoPeftModelForCausalLM.from_pretrained(lora.artifact)))


def test_a_lora_checkpoint_is_merged_into_its_base(lora: Trained, tmp_path: Path) -> None:
    out = lora.export(tmp_path / "out", ExportOptions(dtype=Precision.FP32, merge=True))
    merge_adapter(lora.model, lora.artifact, tmp_path / "merged", Precision.FP32)
    assert_same(weights(out), weights(tmp_path / "merged"))
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(lora.artifact)
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(logits_of(merged), logits_of(adapted), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tuning", [{}, LORA], ids=["full", "lora"])
def test_a_reward_model_is_exported_with_its_score(tmp_path: Path, tuning: dict[str, Any]) -> None:
    judged = JudgedWorld.at(tmp_path / "world", tied=False)
    plan = judged.plan("reward", STEPS | tuning)
    run = saved_and_trained(plan, tmp_path, judged.train, judged.world.model)
    out = run.export(tmp_path / "out")
    assert_same(weights(out), weights(run.artifact))
    file = "adapter_config.json" if tuning else "config.json"
    assert json.loads((out / file).read_text()) == json.loads((run.artifact / file).read_text())
    assert AutoTokenizer.from_pretrained(out).pad_token == AutoTokenizer.from_pretrained(run.artifact).pad_token


def test_a_base_with_other_weights_is_refused_when_its_weights_are_used(lora: Trained, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(lora.model, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    from safetensors.torch import save_file

    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="is not the base of this checkpoint"):
        lora.export(tmp_path / "out", ExportOptions(merge=True, base=other))
    assert not (tmp_path / "out").exists()


def test_a_base_that_is_gone_is_asked_for(lora: Trained, tmp_path: Path) -> None:
    assert lora.manifest.intent.base_model is not None
    pin = lora.manifest.intent.base_model.model_copy(update={"source": f"file://{tmp_path}/gone"})
    moved = lora.manifest.model_copy(update={"intent": lora.manifest.intent.model_copy(update={"base_model": pin})})
    with pytest.raises(UserError, match="name the folder where the base model is with --base"):
        export_checkpoint(lora.storage, moved, str(tmp_path / "out"), "hf")
    options = ExportOptions(base=lora.model, dtype=Precision.FP32)
    export_checkpoint(lora.storage, moved, str(tmp_path / "out"), "hf", options)
    assert_same(weights(tmp_path / "out"), weights(lora.artifact))


def test_nothing_is_written_over(whole: Trained, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="--to: holds something already"):
        whole.export(tmp_path)
