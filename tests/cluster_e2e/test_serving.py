"""The sample that serves a job's adapter, applied with this cluster's names in it: it answers."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from tests.cluster_e2e.conftest import Submit
from tests.cluster_e2e.world import CLAIM, ROOT, World

pytestmark = pytest.mark.cluster

SAMPLE = ROOT / "manifests" / "samples" / "serving" / "adapter.yaml"


@pytest.fixture
def adapter(team: World, tiny: dict[str, Any], submit: Submit) -> str:
    """Of a job that has succeeded: where it is on the claim."""
    job = submit("served", tiny)
    team.wait(job, lambda: team.phase(job) == "Succeeded", "the job to succeed", seconds=600)
    (artifact,) = team.status(job)["artifacts"]
    return str(artifact["uri"])


@pytest.fixture
def server(team: World, adapter: str) -> Iterator[str]:
    """Applies the sample; the address of its pod when that is ready, which its Service has then too."""
    deployment, service = yaml.safe_load_all(SAMPLE.read_text(encoding="utf-8"))
    pod = deployment["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container["command"][-1] = adapter
    container["args"] += ["--base", f"pvc://{CLAIM}/tiny"]
    container["resources"] = {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "3Gi"}}
    pod["volumes"][0]["persistentVolumeClaim"]["claimName"] = CLAIM
    container["volumeMounts"][0]["mountPath"] = f"/mnt/pvc/{CLAIM}"
    team.apply(deployment, service)
    try:
        team.kubectl("rollout", "status", "deployment/support-bot", "--timeout=110s")
        endpoints = json.loads(team.kubectl("get", "endpoints", "support-bot", "--output=json"))
        yield str(endpoints["subsets"][0]["addresses"][0]["ip"])
    finally:
        team.kubectl("delete", "deployment,service", "support-bot", "--wait=true", "--timeout=100s")


def test_a_chat_completion_comes_from_the_adapter_that_a_job_wrote(server: str) -> None:
    asked = {"model": "support-bot", "messages": [{"role": "user", "content": "red blue"}], "max_tokens": 4}
    request = urllib.request.Request(
        f"http://{server}:8000/v1/chat/completions",
        data=json.dumps(asked).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=120) as answered:
        answer = json.load(answered)
    assert answer["model"] == "support-bot"
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert 0 < answer["usage"]["completion_tokens"] <= 4
