"""Jobs that cannot start: within a minute their status says why, and what is missing has its name there."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster_e2e.conftest import Submit
from tests.cluster_e2e.world import World

pytestmark = pytest.mark.cluster

IMAGE = "ghcr.io/finetune-operator/no-such-image:1"
CAUSES: dict[str, tuple[dict[str, Any], str]] = {
    "imageless": ({"cluster": {"image": IMAGE}}, IMAGE),
    "claimless": ({"data": {"train": [{"source": "pvc://no-such-claim/rows.jsonl"}]}}, "no-such-claim"),
    "gpuless": ({"cluster": {"workers": {"gpus": 8}}, "training": {"maxSteps": 4}}, "nvidia.com/gpu"),
}


@pytest.mark.parametrize("begins", CAUSES)
def test_what_a_job_lacks_is_named_within_a_minute(
    team: World, tiny: dict[str, Any], submit: Submit, begins: str
) -> None:
    changes, named = CAUSES[begins]
    job = submit(begins, {**tiny, **changes})
    team.wait(job, lambda: named in team.waits_for(job), f"{named} to be named", seconds=60)
    assert named in team.finetune("get", job).stdout
    assert named in team.finetune("describe", job).stdout
    assert len(team.status(job)["attempts"]) == 1
