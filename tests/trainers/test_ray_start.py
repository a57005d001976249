"""Ray that does not get up the first time, as on a busy machine: it is ended, and another one is started."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_trainers.ray_workers import RayWorkers
from tests.trainers.factories import tiny_plan
from tests.trainers.foreign_warnings import WHEN_TRAINING

pytestmark = [pytest.mark.ray, *WHEN_TRAINING]


def test_a_ray_that_does_not_get_up_is_ended_and_another_one_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._private import services

    seen: list[set[int]] = []
    get_node: Any = services.get_node

    def late_at_first(*arguments: Any, **named: Any) -> Any:
        """Asked when the daemons are started, whether they have got up."""
        seen.append({process.pid for process in psutil.Process().children(recursive=True)})
        if len(seen) == 1:
            raise TimeoutError("the current node timed out during startup")
        return get_node(*arguments, **named)

    monkeypatch.setattr(services, "get_node", late_at_first)
    plan = tiny_plan(tmp_path / "model", tmp_path / "rows.jsonl")
    with RayWorkers(plan) as ray:
        assert ray._started is not None
        ray._started.result()
        first, second = seen[:2]
        assert first
        assert not first & second
    gc.collect()  # a handle on a process that nobody has waited for is a warning, and so an error
