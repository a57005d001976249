"""A data scientist applies a job, and pods on two nodes train it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.cluster_e2e.conftest import Submit
from tests.cluster_e2e.world import World

pytestmark = pytest.mark.cluster

SPREAD = {"scheduling": {"topology": {"mode": "spread", "key": "kubernetes.io/hostname", "required": True}}}
TWO_WORKERS = {"cluster": {"workers": {"replicas": 2}}, "deepspeed": {"zeroStage": 2}, **SPREAD}
IN_ORDER = ["", "Pending", "Queued", "Starting", "Running", "Succeeded"]


def test_lora_with_zero_2_on_two_nodes_ends_with_an_adapter(team: World, tiny: dict[str, Any], submit: Submit) -> None:
    job = submit("first", {**tiny, **TWO_WORKERS, "checkpoint": {"everySteps": 10}})
    phases, nodes = [""], set[str]()

    def over() -> bool:
        phase = team.phase(job)
        if phase != phases[-1]:
            phases.append(phase)
        nodes.update(pod["spec"].get("nodeName", "") for pod in team.pods(job, "worker"))
        return phase == "Succeeded"

    team.wait(job, over, "the job to succeed", seconds=600)

    assert phases == [phase for phase in IN_ORDER if phase in phases]
    assert "Running" in phases
    assert nodes - {""} == {"node-1", "node-2"}
    status = team.status(job)
    assert status["progress"]["step"] == 40
    assert len(status["attempts"]) == 1
    assert status["checkpoint"]["step"] == 40
    (artifact,) = status["artifacts"]
    folder = team.folder / artifact["uri"].removeprefix("pvc://shared/")
    assert (folder / "adapter_model.safetensors").stat().st_size > 0
    assert job in team.finetune("get", job).stdout


def test_the_log_of_a_running_job_is_followed_from_outside(team: World, tiny: dict[str, Any], submit: Submit) -> None:
    job = submit("talking", {**tiny, **TWO_WORKERS, "checkpoint": {"everySteps": 10}})
    told = team.finetune("logs", job, "--follow", seconds=600)
    assert told.returncode == 0, told.stderr
    assert "checkpoint of step 40" in told.stdout


def test_one_worker_trains_without_a_runtime(team: World, tiny: dict[str, Any], submit: Submit) -> None:
    small = {"cpus": 0.5, "memory": "3Gi"}
    spec = {key: value for key, value in tiny.items() if key != "runtimeRef"}
    job = submit("alone", {**spec, "cluster": {"workers": {"cpus": 1, "memory": "3Gi"}, "head": small}})
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed", seconds=600)
