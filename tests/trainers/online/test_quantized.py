"""PPO and GRPO beside a base of 8 or 4 bits, which writes the rollouts too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.needs import NEEDS_BITSANDBYTES
from tests.trainers.online.online_world import OnlineWorld

pytestmark = [
    pytest.mark.training,
    *WHEN_TRAINING,
    NEEDS_BITSANDBYTES,
]


@pytest.fixture(scope="module")
def online(tmp_path_factory: pytest.TempPathFactory) -> OnlineWorld:
    return OnlineWorld.at(tmp_path_factory.mktemp("online"), intermediate_size=128)  # whole blocks of 4 bits


@pytest.mark.parametrize(("method", "bits"), [("ppo", "int8"), ("grpo", "nf4")])
def test_the_policy_that_writes_is_the_one_that_learns(
    method: str, bits: str, online: OnlineWorld, tmp_path: Path
) -> None:
    """Before anything is learned the probabilities of the rollouts are those of the model that is about to learn: up to
    what LLM.int8 makes of a last digit, since it rounds activations to 8 bits."""
    tuning: dict[str, Any] = {"lora": {"quantization": bits, "rank": 4, "targetModules": ["all-linear"]}}
    online.train(online.plan(method, {"tuning": tuning, "training.maxSteps": 2}, evaluated=False), tmp_path / "run")
    assert abs(online.curve(tmp_path / "run", "approx_kl")[0]) < {"int8": 1e-3, "nf4": 1e-6}[bits]
    assert any(bool(tensor.any()) for name, tensor in online.artifact(tmp_path / "run").items() if "lora_B" in name)
