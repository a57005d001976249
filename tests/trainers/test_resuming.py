"""Checkpoints of real trainings: what goes on from one ends as if it had never been interrupted, to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from finetune_api.failures import FailureClass
from finetune_api.plan import CheckpointPlan, RunPlan
from finetune_api.progress import Outcome, Progress, Result, Stage
from finetune_trainers.checkpoint.engine_state import EngineState
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.reading import SliceReader
from finetune_trainers.checkpoint.slices import tiling_faults
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.launch import run
from finetune_trainers.loop import Loop
from finetune_trainers.worker import load
from tests.trainers.conftest import SmallWorld
from tests.trainers.factories import tiny_model
from tests.trainers.foreign_warnings import WHEN_TRAINING

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

STEPS = {"training.maxSteps": 20, "training.microBatchSize": 2}
LORA = {"tuning": {"lora": {"rank": 4, "dropout": 0.2, "targetModules": ["all-linear"]}}}
UNFREEZE = {
    "tuning": {"freeze": {"train": ["model.layers.1.*"], "unfreeze": [{"at": 0.3, "layers": ["model.layers.0.*"]}]}},
    "training.optimizer": {"weightDecay": 0.1},
}
BF16 = {"training.precision": "bf16"}


def zero(stage: int) -> dict[str, Any]:
    """The DeepSpeed engine, also where one process would not need it.

    With small buckets: DeepSpeed maps two gigabytes for one, and does not give it back to a process of many engines.
    """
    config = {"wall_clock_breakdown": False, "zero_optimization": {"reduce_bucket_size": 1_000_000}}
    return {"deepspeed": {"zeroStage": stage, "config": config}}


WAYS: dict[str, dict[str, Any]] = {
    "torch": {},
    "torch, lora with dropout": LORA,
    "torch, unfreezing": UNFREEZE,
    **{f"zero {stage}": zero(stage) for stage in range(4)},
    "zero 0 in bf16": zero(0) | BF16,
    "zero 2 in bf16, lora with dropout": zero(2) | LORA | BF16,
    "zero 3 in bf16": zero(3) | BF16,
    "zero 2, unfreezing": zero(2) | UNFREEZE,
    "zero 3, unfreezing": zero(3) | UNFREEZE,
}


@dataclass(frozen=True)
class Place:
    """Where the checkpoints of a test are, and its runs."""

    world: SmallWorld
    folder: Path

    def plan(self, changes: dict[str, Any], evaluated: bool = False, **checkpoint: Any) -> RunPlan:
        settings = {"everySteps": 10, **checkpoint}
        plan = self.world.plan(STEPS | {"checkpoint": settings} | changes, evaluated=evaluated)
        assert plan.checkpoint is not None
        where = {"uri": f"file://{self.folder}/checkpoints"}
        return plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update=where)})

    def train(self, plan: RunPlan, name: str) -> Outcome:
        return self.world.train(plan, self.folder / name)

    @property
    def storage(self) -> Storage:
        return open_storage(f"file://{self.folder}/checkpoints")

    def steps(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in listed(self.storage))

    def forget(self, step: int) -> None:
        """As if the run had been killed before it made the checkpoint of this step."""
        for checkpoint, listing in listed(self.storage).items():
            if checkpoint.step == step:
                self.storage.delete(list(listing.sizes))

    def reports(self, name: str) -> list[Progress]:
        lines = (self.folder / name / "progress.jsonl").read_text().splitlines()
        return [Progress.model_validate_json(line) for line in lines]

    def said(self, name: str) -> str:
        return "\n".join(report.message for report in self.reports(name) if report.message)

    def resumed_from(self, name: str) -> int | None:
        return max(
            (report.resumed_from_step for report in self.reports(name) if report.resumed_from_step), default=None
        )

    def artifact(self, name: str) -> dict[str, Tensor]:
        files = (self.folder / name / "artifact").glob("*.safetensors")
        return {key: tensor for file in files for key, tensor in load_file(file).items()}

    def figures(self, name: str, figure: str = "loss") -> dict[int, float]:
        """By step, as they were logged."""
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        logged = [json.loads(line) for line in lines]
        return {one["step"]: one["metrics"][figure] for one in logged if figure in one["metrics"]}


@pytest.fixture
def place(small_world: SmallWorld, tmp_path: Path) -> Place:
    return Place(small_world, tmp_path)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("way", WAYS)
def test_ten_and_ten_steps_are_twenty_to_the_bit(way: str, place: Place) -> None:
    plan = place.plan(WAYS[way])
    assert place.train(plan, "whole").result is Result.SUCCEEDED
    assert place.steps() == [10, 20]
    place.forget(20)
    assert place.train(plan, "rest").result is Result.SUCCEEDED
    assert place.resumed_from("rest") == 10
    losses, whole = place.figures("rest"), place.figures("whole")
    assert losses == {step: whole[step] for step in range(11, 21)}
    assert_same(place.artifact("rest"), place.artifact("whole"))


@pytest.fixture
def engines(place: Place) -> Iterator[Any]:
    """Engines of the plan with these changes, and how their state is read."""
    made: list[Any] = []

    def make(changes: dict[str, Any]) -> EngineState:
        plan, workdir = place.plan(changes), place.folder / f"engine-{len(made)}"
        context = SingleProcessContext(plan, workdir)
        _, engine = load(plan, place.world.prepare(plan, workdir), context)
        made.append(engine)
        return EngineState(engine, 0, 1)

    yield make
    for engine in made:
        engine.close()


def contents(state: EngineState) -> dict[tuple[str, str], bytes]:
    """Every state of every parameter."""
    tensors = state.tensors()
    read = state.data(tensors)
    return {(tensors[piece.tensor].name, piece.state): bytes(read(piece)) for piece in state.slices(tensors)}


def restored(state: EngineState, storage: Storage, manifest: Manifest) -> dict[tuple[str, str], bytes]:
    state.load(state.read(SliceReader(storage, manifest), manifest))
    return contents(state)


@pytest.mark.parametrize(("saved", "others"), [({}, [0, 1, 2, 3]), (zero(3), [2]), (zero(2), [3])], ids=str)
def test_every_engine_holds_the_same_state_after_restoring(
    saved: dict[str, Any], others: list[int], place: Place, engines: Any
) -> None:
    place.train(place.plan(saved | {"training.maxSteps": 10}), "saved")
    manifest = find_newest(place.storage).manifest
    assert manifest is not None
    wanted = restored(engines({}), place.storage, manifest)
    assert {state for _, state in wanted} == {"param", "exp_avg", "exp_avg_sq"}
    for stage in others:
        assert restored(engines(zero(stage)), place.storage, manifest) == wanted


@pytest.mark.parametrize("stage", [2, 3])
def test_a_training_goes_on_under_another_zero_stage(stage: int, place: Place) -> None:
    place.train(place.plan({}), "whole")
    place.forget(20)
    place.train(place.plan(zero(stage)), "rest")
    assert place.resumed_from("rest") == 10
    wanted = place.artifact("whole")
    for name, tensor in place.artifact("rest").items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=0)


@pytest.mark.ray
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_training_goes_on_with_another_number_of_workers(before: int, after: int, place: Place) -> None:
    place.train(place.plan({}), "whole")
    for checkpoint in place.steps():
        place.forget(checkpoint)
    workers = {number: zero(3) | {"cluster.workers.replicas": number} for number in (1, 2)}
    assert run(place.plan(workers[before]), place.folder / "first", place.world.cache).result is Result.SUCCEEDED
    place.forget(20)
    assert run(place.plan(workers[after]), place.folder / "rest", place.world.cache).result is Result.SUCCEEDED
    assert place.resumed_from("rest") == 10
    wanted = place.artifact("whole")
    for name, tensor in place.artifact("rest").items():
        torch.testing.assert_close(tensor, wanted[name], atol=1e-6, rtol=0)


def test_an_adapters_checkpoint_is_what_learns_with_its_two_moments_and_hardly_more(place: Place) -> None:
    """12 bytes a parameter, of which the base has none; all files counted, the digests and the manifest too."""
    wide = {"tuning": {"lora": {"rank": 64, "targetModules": ["q_proj", "v_proj", "up_proj", "down_proj"]}}}
    assert place.train(place.plan(wide), "adapter").result is Result.SUCCEEDED
    manifest = find_newest(place.storage).manifest
    assert manifest is not None
    learning = sum(tensor.numel for tensor in manifest.intent.tensors)
    stored = sum(file.stat().st_size for file in (place.folder / "checkpoints" / "ckpt" / str(manifest.id)).iterdir())
    assert learning > 50_000
    assert 1 < stored / (12 * learning) <= 1.05


def test_replicas_write_one_even_part_each(place: Place, engines: Any) -> None:
    whole = engines({})
    parts = [EngineState(whole._engine, rank, 3) for rank in range(3)]
    tensors = whole.tensors()
    extents = [(piece.tensor, piece.start, piece.end) for part in parts for piece in part.slices(tensors)]
    assert tiling_faults({index: tensor.numel for index, tensor in enumerate(tensors)}, extents) == []


def test_a_damaged_checkpoint_is_named_and_the_older_one_is_used(place: Place) -> None:
    plan = place.plan({})
    place.train(plan, "whole")
    shard = next((place.folder / "checkpoints" / "ckpt").glob("0000000020-*/shard-*"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    place.train(plan, "rest")
    assert "checkpoint 0000000020-e00001 was rejected" in place.said("rest")
    assert shard.name in place.said("rest")
    assert place.resumed_from("rest") == 10
    assert_same(place.artifact("rest"), place.artifact("whole"))


def test_a_checkpoint_of_another_seed_model_or_job_is_not_used(place: Place) -> None:
    place.train(place.plan({"training.maxSteps": 10}), "first")
    seed = place.plan({"training.maxSteps": 2, "training.seed": 8})
    place.train(seed, "seed")
    assert "its data had the order of seed 7, and this one's seed is 8" in place.said("seed")
    tiny_model(place.folder / "other", seed=5)
    model = place.plan({"training.maxSteps": 2, "model.source": f"file://{place.folder / 'other'}"})
    place.train(model, "model")
    assert "it was trained from another model" in place.said("model")
    job = place.plan({"training.maxSteps": 2})
    assert job.checkpoint is not None
    place.train(job.model_copy(update={"checkpoint": job.checkpoint.model_copy(update={"job": "x"})}), "job")
    assert f"it was made by another job (default/{job.name}, and this is x)" in place.said("job")
    assert [place.resumed_from(name) for name in ("seed", "model", "job")] == [None, None, None]


def test_a_job_that_is_made_again_leaves_what_the_one_before_saved_and_tells_of_it(place: Place) -> None:
    first = place.plan({"training.maxSteps": 20}, whenBehind="wait")
    place.train(first, "first")
    again = place.plan({"training.maxSteps": 9}, everySteps=3, keepLast=1, whenBehind="wait")
    assert again.checkpoint is not None
    place.train(again.model_copy(update={"checkpoint": again.checkpoint.model_copy(update={"job": "x"})}), "again")
    assert place.steps() == [9, 20]
    told = [one for one in place.said("again").splitlines() if "of another training" in one]
    assert len(set(told)) == 1
    assert told[0].startswith("2 checkpoints of another training (")
    assert told[0].endswith("/checkpoints --drop-others")
    place.train(first, "third")
    assert place.resumed_from("third") == 20


def test_resume_never_begins_at_step_0(place: Place) -> None:
    place.train(place.plan({"training.maxSteps": 10}), "first")
    place.train(place.plan({"training.maxSteps": 10}, resume="never"), "second")
    assert place.resumed_from("second") is None
    assert sorted(place.figures("second")) == list(range(1, 11))


@pytest.mark.parametrize(
    ("kept", "steps"),
    [
        ({"keepLast": 2}, [16, 20]),
        ({"keepLast": 1, "keepEvery": 8}, [8, 16, 20]),
        ({"keepLast": 1, "keepBest": {"metric": "num_tokens", "mode": "min"}}, [4, 20]),
        ({"keepLast": 5, "quota": "1Mi"}, [20]),
    ],
    ids=["the last", "every so often", "the best", "what there is room for"],
)
def test_the_checkpoints_that_the_job_names_are_kept(kept: dict[str, Any], steps: list[int], place: Place) -> None:
    place.train(place.plan({}, everySteps=4, whenBehind="wait", **kept), "run")
    assert place.steps() == steps


def test_what_was_passed_over_is_in_every_report(place: Place) -> None:
    plan = place.plan({"training.maxSteps": 10})
    place.train(plan, "whole")
    next((place.folder / "checkpoints" / "ckpt").glob("0000000010-*/shard-*")).unlink()
    place.train(plan, "again")
    trained = [report for report in place.reports("again") if report.stage is Stage.TRAINING]
    [rejected] = {one for report in trained for one in report.rejected_checkpoints}
    assert all(report.rejected_checkpoints for report in trained)
    assert rejected.startswith("0000000010-e00001: ")
    assert rejected.endswith("is missing")


def test_a_stop_saves_what_was_done_and_the_next_run_goes_on_there(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = place.plan({"training.maxSteps": 8}, everySteps="auto")
    place.train(plan.model_copy(update={"checkpoint": None}), "whole")
    with monkeypatch.context() as patched:
        log = Loop._log

        def stop_after_the_fifth(self: Loop, figures: dict[str, float]) -> None:
            log(self, figures)
            self._stop_requested = self.result.step == 5

        patched.setattr(Loop, "_log", stop_after_the_fifth)
        assert place.train(plan, "stopped").result is Result.CANCELLED
    assert place.steps() == [5]
    saved = place.reports("stopped")[-2].checkpoint
    assert saved is not None
    assert (saved.step, saved.world_size) == (5, 1)
    assert saved.uri.endswith("/checkpoints/ckpt/0000000005-e00001")
    place.train(plan, "rest")
    assert place.resumed_from("rest") == 5
    assert_same(place.artifact("rest"), place.artifact("whole"))


def test_the_best_parameters_come_along(place: Place) -> None:
    """So much better must an evaluation be that the first one stays the best, long before the checkpoint."""
    early = {"training.evalEverySteps": 5, "training.earlyStopping": {"patience": 50, "minDelta": 3.0}}
    plan = place.plan({"training.learningRate": 0.02} | early, evaluated=True)
    whole = place.train(plan, "whole")
    assert whole.eval is not None
    assert whole.eval.loss_after == place.figures("whole", "eval_loss")[5]
    place.forget(20)
    rest = place.train(plan, "rest")
    assert place.resumed_from("rest") == 10
    assert rest.eval == whole.eval
    assert_same(place.artifact("rest"), place.artifact("whole"))


def test_a_checkpoint_that_cannot_be_written_is_told_and_training_goes_on(place: Place) -> None:
    in_its_place = place.folder / "checkpoints" / "ckpt" / "0000000010-e00001"
    in_its_place.parent.mkdir(parents=True)
    in_its_place.touch()
    assert place.train(place.plan({}), "run").result is Result.SUCCEEDED
    assert "The checkpoint of step 10 could not be saved, and training goes on" in place.said("run")
    assert place.steps() == [20]


def test_a_layout_that_cannot_be_read_is_refused_before_the_first_step(place: Place) -> None:
    odd = {"deepspeed": {"zeroStage": 2, "config": {"zero_optimization": {"round_robin_gradients": True}}}}
    outcome = place.train(place.plan(odd), "run")
    assert outcome.failure is not None
    assert outcome.failure.failure_class is FailureClass.USER_ERROR
    assert "round_robin_gradients, which checkpoints cannot read" in outcome.failure.message
    assert outcome.step == 0


def test_without_a_storage_checkpoints_are_in_the_runs_own_folder(place: Place) -> None:
    plan = place.plan({"training.maxSteps": 10})
    assert isinstance(plan.checkpoint, CheckpointPlan)
    own = plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update={"uri": None})})
    place.train(own, "run")
    assert list((place.folder / "run" / "checkpoints" / "ckpt").glob("0000000010-*/MANIFEST.json"))
