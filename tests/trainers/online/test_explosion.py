"""A model that strays from its reference beyond all measure, or is no number any more: what is left of the run."""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finetune_api.failures import FailureClass
from finetune_api.spec import Grpo, Ppo
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.data.batches import IGNORED, Batch
from finetune_trainers.launch import check
from finetune_trainers.online.models import Models
from finetune_trainers.rollout.in_process import InProcessEngine
from finetune_trainers.saving import Checkpoints
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.online.online_world import METHODS, REWARDS, OnlineWorld

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

PRICED = {"grpo": {"klCoefficient": 0.02}, "ppo": {"passes": 1, "miniBatches": 1}}
NO_CLIPPING = {"training.maxGradNorm": 0}


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> OnlineWorld:
    return OnlineWorld.at(tmp_path_factory.mktemp("online"))


def explode_in_step(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step `step`, from 1, is made with a learning rate that ruins the model; all others hardly move it."""
    monkeypatch.setattr("finetune_trainers.loop.lr_at", lambda number, *_: 1.0 if number + 1 == step else 1e-5)


def ended(checkpoints: Checkpoints) -> None:
    """As `close` does, and whatever was given to the writer is there."""
    assert checkpoints._flushes is not None
    checkpoints._flushes.close(math.inf)


def changed(method: str, **changes: Any) -> dict[str, Any]:
    return {"method": {method: METHODS[method][method] | PRICED[method] | changes}}


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_the_only_checkpoint_is_of_the_last_model_that_was_near_its_reference(
    method: str, online: OnlineWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = {"uri": f"file://{tmp_path}/checkpoints"}
    plan = online.plan(
        method,
        changed(method)
        | NO_CLIPPING
        | {"training.maxSteps": 6, "checkpoint": {"everySteps": 1, "keepLast": 1, "whenBehind": "wait"}},
        evaluated=False,
    )
    assert plan.checkpoint is not None
    plan = plan.model_copy(update={"checkpoint": plan.checkpoint.model_copy(update=where)})
    with monkeypatch.context() as patch:
        explode_in_step(4, patch)
        patch.setattr(Checkpoints, "close", ended)
        outcome = online.world.train(plan, tmp_path / "1")
    assert outcome.failure is not None
    assert (outcome.failure.failure_class, outcome.failure.step) == (FailureClass.KL_DIVERGED, 4)
    assert [one.step for one in listed(open_storage(where["uri"]))] == [3]
    explode_in_step(0, monkeypatch)
    assert online.train(plan, tmp_path / "2").step == 6, "whoever mends the rate goes on from it"


@pytest.mark.parametrize("method", ["grpo", "ppo"])
def test_a_model_that_explodes_in_its_last_step_is_no_result(
    method: str, online: OnlineWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    explode_in_step(3, monkeypatch)
    plan = online.plan(method, changed(method) | NO_CLIPPING | {"training.maxSteps": 3}, evaluated=False)
    outcome = online.world.train(plan, tmp_path / "run")
    assert outcome.failure is not None
    assert (outcome.failure.failure_class, outcome.failure.step) == (FailureClass.KL_DIVERGED, 3)
    assert "maxKl allows 3;" in outcome.failure.message, "a limit that nobody asked for"
    assert not (tmp_path / "run/artifact").exists()


@pytest.mark.parametrize("method", ["grpo", "ppo"])
@pytest.mark.parametrize("limit", [{}, {"maxKl": 0}], ids=["usual limit", "no limit"])
def test_a_policy_that_is_no_number_ends_the_run_as_a_loss_that_is_none(
    limit: dict[str, Any], method: str, online: OnlineWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ruin(self: InProcessEngine) -> None:
        if next(iteration) == 1:
            with torch.no_grad():
                next(p for p in self._module.parameters() if p.dim() > 1).fill_(torch.nan)

    iteration = count()
    monkeypatch.setattr(InProcessEngine, "update_weights", ruin)
    changes = changed(method, passes=2, **limit) | {"training.maxSteps": 6}
    outcome = online.world.train(online.plan(method, changes, evaluated=False), tmp_path / "run")
    assert outcome.failure is not None
    assert (outcome.failure.failure_class, outcome.failure.step) == (FailureClass.NON_FINITE_LOSS, 2)
    assert "what the policy says of rollouts is no finite number after 2 steps" in outcome.failure.message


def test_without_a_price_ppo_asks_no_reference(
    online: OnlineWorld, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("nobody asked for it")

    monkeypatch.setattr(Models, "reference_stats", refuse)
    changes = changed("ppo", kl={"coefficient": 0}) | {"training.maxSteps": 2}
    outcome = online.train(online.plan("ppo", changes, evaluated=False), tmp_path / "run")
    assert "kl" not in outcome.metrics


def test_a_critic_that_warms_up_for_the_whole_run_is_refused(online: OnlineWorld, tmp_path: Path) -> None:
    for warmup, is_refused in ((3, True), (2, False)):
        changes = changed("ppo", critic={"warmupIterations": warmup}, miniBatches=2) | {"training.maxSteps": 6}
        outcome = check(online.plan("ppo", changes, evaluated=False), tmp_path / str(warmup), online.world.cache)
        assert (outcome.failure is not None) is is_refused
        if outcome.failure is not None:
            assert outcome.failure.failure_class is FailureClass.USER_ERROR
            assert "warmupIterations: leaves the model itself none of 3 iterations" in outcome.failure.message


def test_distance_has_a_limit_where_it_has_a_price() -> None:
    free = Grpo.model_validate({"rewards": REWARDS})
    assert (free.kl_limit, free.needs_reference) == (0.0, False)
    priced = Grpo.model_validate({"rewards": REWARDS, "klCoefficient": 0.1})
    assert (priced.kl_limit, priced.needs_reference) == (3.0, True)
    assert Ppo.model_validate({"rewards": REWARDS}).kl_limit == 3.0
    assert Ppo.model_validate({"rewards": REWARDS, "maxKl": 0}).kl_limit == 0.0
    limited = Ppo.model_validate({"rewards": REWARDS, "maxKl": 1, "kl": {"coefficient": 0}})
    assert (limited.kl_limit, limited.needs_reference) == (1.0, True)


def test_the_distance_at_a_token_is_over_all_words_and_at_the_temperature() -> None:
    class Says(nn.Module):
        def __init__(self, logits: torch.Tensor) -> None:
            super().__init__()
            self._logits = logits

        def forward(self, **_: object) -> Any:
            return type("Output", (), {"logits": self._logits[None]})

    ours, theirs = torch.randn(2, 3, 11, generator=torch.Generator().manual_seed(0)).unbind()  # [K, V]
    labels = torch.tensor([[1, IGNORED, 2, 3]])
    bounds = torch.tensor([0, 4], dtype=torch.int32)
    batch = Batch(labels, labels, torch.arange(4)[None], bounds, max_seqlen=4, num_trained_tokens=3)
    found = Models(Says(ours), Says(theirs), temperature=2.0).distances(batch)
    policy, reference = F.log_softmax(ours / 2, -1), F.log_softmax(theirs / 2, -1)
    torch.testing.assert_close(found, F.kl_div(reference, policy, log_target=True, reduction="none").sum(-1))
