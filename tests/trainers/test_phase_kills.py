"""A training that is killed with SIGKILL in each phase of an iteration: what goes on from its newest checkpoint ends as
if nobody had, to the bit. Every figure of every step, and all of the last checkpoint: model, critic, moments.

The kill comes from inside the phase, in the third of four iterations of PPO.
"""

from __future__ import annotations

import json
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_api.plan import RunPlan
from finetune_api.progress import Progress
from finetune_trainers.checkpoint.find import find_newest
from finetune_trainers.checkpoint.storage.opening import open_storage
from tests.trainers.dying import PLACES, Death, begin
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.judged_world import zero
from tests.trainers.online.online_world import COMMON, LORA, OnlineWorld
from tests.trainers.rollout.vllm_environments import stand_in_python

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

ITERATIONS, KILLED_IN = 4, 2
STEPS = 4
"""Of an iteration, after each of which there is a checkpoint."""
PPO = COMMON | {
    "passes": 2,
    "miniBatches": 2,
    "kl": {"coefficient": 0.1, "target": 0.5, "horizon": 100},
    "normalizeRewards": True,
    "critic": {"learningRate": 3e-3},  # groups of its own in the optimizer
}
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": LORA,
    "vllm": {"method": {"ppo": PPO | {"vllm": {"gapLimit": 100}}}},
    "two ranks": zero(2) | {"cluster": {"workers": {"replicas": 2, "cpus": 1}}},
}
CASES = [
    *(("full", place) for place in [*PLACES, "the writer writes"] if "vLLM" not in place),
    ("lora", "the critic's loss is known"),
    ("vllm", "vLLM has some of the weights"),
    ("two ranks", "the critic's loss is known"),
]


@dataclass
class Training:
    """Attempts of one plan, with one place for checkpoints."""

    folder: Path
    online: OnlineWorld
    plan: RunPlan
    num_attempts: int = 0

    @classmethod
    def at(cls, folder: Path, online: OnlineWorld, way: str) -> Training:
        changes = {
            "method": {"ppo": PPO},
            "training.maxSteps": ITERATIONS * STEPS,
            "training.globalBatchSize": 8,
            "training.microBatchSize": 4,
            # waiting: a starved writer would otherwise have none of the step that is asked for
            "checkpoint": {"everySteps": STEPS, "keepLast": 8, "whenBehind": "wait"},
        }
        plan = online.plan("ppo", changes | WAYS[way], evaluated=False)
        assert plan.checkpoint is not None
        checkpoint = plan.checkpoint.model_copy(update={"uri": f"file://{folder}/checkpoints"})
        return cls(folder, online, plan.model_copy(update={"checkpoint": checkpoint}))

    def attempt(self, death: Death | None = None) -> tuple[Path, list[int | None]]:
        """-> its folder, and how its processes ended."""
        self.num_attempts += 1
        workdir = self.folder / f"attempt-{self.num_attempts}"
        if self.plan.workers.world_size > 1:
            self.online.world.prepare(self.plan, workdir)
        processes = begin(self.plan, workdir, self.online.world.cache, self.num_attempts, death)
        for process in processes:
            process.join()
        return workdir, [process.exitcode for process in processes]

    def to_its_end(self) -> Path:
        workdir, ended = self.attempt()
        said = "\n".join(file.read_text() for file in [*workdir.glob("output-*"), *workdir.glob("*.log")])
        assert not any(ended), said
        return workdir

    def last_state(self) -> dict[tuple[str, str, int, int], str]:
        """Digests of what the checkpoint behind the last step holds, slice by slice."""
        found = find_newest(open_storage(f"file://{self.folder}/checkpoints"), deep=True).manifest
        assert found is not None
        assert found.id.step == ITERATIONS * STEPS
        tensors = found.intent.tensors
        return {
            (tensors[extent.tensor].name, extent.state, extent.start, extent.end): extent.digest
            for receipt in found.receipts
            for shard in receipt.shards
            for extent in shard.extents
        }


def curves(workdir: Path) -> dict[int, dict[str, float]]:
    """Figures by step, without those that a clock tells."""
    found = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        one = json.loads(line)
        figures = one["metrics"].items()
        found[one["step"]] = {name: value for name, value in figures if "second" not in name}
    return found


def reports(workdir: Path) -> list[Progress]:
    return [Progress.model_validate_json(line) for line in (workdir / "progress.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> OnlineWorld:
    return OnlineWorld.at(tmp_path_factory.mktemp("killed"))


@pytest.fixture(scope="module")
def undisturbed(online: OnlineWorld, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """By way: a training that nobody killed, once for all of its cases."""
    made: dict[str, Training] = {}

    def one(way: str) -> Training:
        if way not in made:
            made[way] = Training.at(tmp_path_factory.mktemp("undisturbed"), online, way)
            made[way].to_its_end()
        return made[way]

    return one


@pytest.fixture(scope="module", autouse=True)
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from finetune_trainers.rollout.vllm_process import VARIABLE

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, stand_in_python(tmp_path_factory.mktemp("environment")))
        yield


@pytest.mark.parametrize(("way", "place"), CASES)
def test_who_goes_on_ends_as_if_nobody_had_been_killed_while(
    way: str, place: str, online: OnlineWorld, undisturbed: Any, tmp_path: Path
) -> None:
    whole, killed = undisturbed(way), Training.at(tmp_path, online, way)
    victim = killed.plan.workers.world_size - 1
    died_in, ended = killed.attempt(Death(place, KILLED_IN, tmp_path / "mark", rank=victim))
    assert (tmp_path / "mark").read_text() == place
    assert ended[victim] == -signal.SIGKILL
    assert all(ended), "the others have ended too"
    told = [report.phase for report in reports(died_in) if report.phase]
    assert place == "the writer writes" or told[-1] == PLACES[place].told

    went_on = killed.to_its_end()
    resumed_from = (KILLED_IN + (place == "a checkpoint is staged")) * STEPS
    assert {report.resumed_from_step for report in reports(went_on)[-1:]} == {resumed_from}
    wanted = curves(whole.folder / "attempt-1")
    before, after = curves(died_in), curves(went_on)
    assert after == {step: figures for step, figures in wanted.items() if step > resumed_from}
    assert before == {step: wanted[step] for step in before}
    assert len(before) >= KILLED_IN * STEPS
    assert killed.last_state() == whole.last_state()
