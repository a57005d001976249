"""A data scientist applies a job, and pods on two nodes train it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.cluster_e2e.conftest import Submit
from tests.cluster_e2e.world import CLAIM, SMALL, World
from tests.trainers.factories import write_pairs

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


def test_every_parameter_with_zero_3_on_two_nodes_ends_with_a_model(
    team: World, tiny: dict[str, Any], submit: Submit
) -> None:
    zero3 = {"tuning": {"full": {}}, "deepspeed": {"zeroStage": 3}, "checkpoint": {"everySteps": 20}}
    job = submit("whole", {**tiny, **TWO_WORKERS, **zero3})
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed", seconds=600)
    status = team.status(job)
    assert (status["checkpoint"]["step"], status["checkpoint"]["worldSize"]) == (40, 2)
    (artifact,) = status["artifacts"]
    assert (team.folder / artifact["uri"].removeprefix("pvc://shared/") / "model.safetensors").stat().st_size > 0


def test_a_reward_model_and_the_policy_that_waits_for_it_are_applied_together(
    team: World, tiny: dict[str, Any], submit: Submit
) -> None:
    write_pairs(team.folder / "pairs.jsonl", 32)
    pairs = {"train": [{"source": f"pvc://{CLAIM}/pairs.jsonl"}]}
    judge = submit("judge", {**tiny, "data": pairs, "method": {"reward": {"maxSeqLength": 128}}})
    ppo = {
        "maxSeqLength": 128,
        "sampling": {"maxNewTokens": 8},
        "rewards": [{"model": {"source": f"job://{judge}"}}],
    }
    training = {**tiny["training"], "maxSteps": 4}
    policy = submit("policy", {**tiny, **TWO_WORKERS, "method": {"ppo": ppo}, "training": training})
    team.wait(policy, lambda: judge in json.dumps(team.status(policy)), "the policy to wait for its judge")
    assert not team.pods(policy)
    team.wait(judge, lambda: team.phase(judge) == "Succeeded", "the judge to be ready", seconds=600)
    team.wait(policy, lambda: team.phase(policy) == "Succeeded", "the policy to be ready", seconds=600)
    assert team.status(policy)["progress"]["step"] == 4


def test_a_job_is_laid_aside_and_goes_on_with_another_number_of_workers(
    team: World, tiny: dict[str, Any], submit: Submit
) -> None:
    training = {**tiny["training"], "maxSteps": 3000}
    job = submit("aside", {**tiny, **TWO_WORKERS, "training": training, "checkpoint": {"everySteps": 100}})
    team.wait(job, lambda: team.saved(job) > 0, "a first checkpoint")
    assert team.finetune("suspend", job).returncode == 0
    team.wait(job, lambda: team.phase(job) == "Suspended", "the job to be laid aside")
    left = team.saved(job)
    assert 100 <= left < 3000
    team.wait(job, lambda: not team.pods(job), "its machines to be given back")
    change = {"spec": {"cluster": {"workers": {"replicas": 1}}}}
    team.kubectl("patch", "finetunejob", job, "--type=merge", "--patch", json.dumps(change))
    assert team.finetune("resume", job).returncode == 0
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed", seconds=600)
    status = team.status(job)
    assert [attempt["resumedFromStep"] for attempt in status["attempts"]] == [0, left]
    assert (status["checkpoint"]["step"], status["checkpoint"]["worldSize"]) == (3000, 1)


def test_the_log_of_a_running_job_is_followed_from_outside(team: World, tiny: dict[str, Any], submit: Submit) -> None:
    job = submit("talking", {**tiny, **TWO_WORKERS, "checkpoint": {"everySteps": 10}})
    told = team.finetune("logs", job, "--follow", seconds=600)
    assert told.returncode == 0, told.stderr
    assert "checkpoint of step 40" in told.stdout


def test_one_worker_trains_without_a_runtime(team: World, tiny: dict[str, Any], submit: Submit) -> None:
    spec = {key: value for key, value in tiny.items() if key != "runtimeRef"}
    job = submit("alone", {**spec, "cluster": SMALL})
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed", seconds=600)
