"""What a person sees who types kubectl: samples are taken, fields explained, progress shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.spec.training import Training
from tests.cluster.client import Client
from tests.cluster.tools import Tool, ToolFailed
from tests.control_plane.conftest import JOBS, ROOT, Store
from tests.factories import job_document

pytestmark = pytest.mark.control_plane

SAMPLES = sorted(file for file in (ROOT / "manifests" / "samples").rglob("*.yaml") if file.parent.name != "interactive")
"""But a RayCluster, which only KubeRay knows."""
VERSIONS = "jsonpath={..metadata.resourceVersion}"


@pytest.mark.parametrize("file", SAMPLES, ids=lambda file: str(file.relative_to(ROOT / "manifests" / "samples")))
def test_a_sample_is_applied_and_applied_again_without_a_change(kubectl: Tool, namespace: str, file: Path) -> None:
    told = kubectl("apply", "-n", namespace, "-f", file).splitlines()
    assert {line.rpartition(" ")[2] for line in told} == {"created"}
    # It says "configured" the second time: the server has filled defaults into lists, and changes nothing.
    before = kubectl("get", "-n", namespace, "-f", file, "-o", VERSIONS)
    kubectl("apply", "-n", namespace, "-f", file)
    assert kubectl("get", "-n", namespace, "-f", file, "-o", VERSIONS) == before != ""
    kubectl("delete", "-n", namespace, "-f", file, "--wait=false")  # a runtime belongs to no namespace


def test_a_misspelt_field_is_refused_by_name(kubectl: Tool, namespace: str) -> None:
    document = job_document({"training": {"epocs": 2}})
    with pytest.raises(ToolFailed, match=r'unknown field "spec.training.epocs"'):
        kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(document))


def test_explain_gives_the_docstrings_of_the_models(kubectl: Tool) -> None:
    told = " ".join(kubectl("explain", "finetunejob.spec.training").split())
    for name, field in Training.model_fields.items():
        assert field.description is not None, name
        assert " ".join(field.description.split()) in told


def test_get_shows_the_columns(kubectl: Tool, stored_job: Store, api: Client) -> None:
    stored = stored_job(job_document(name="shown"))
    status: dict[str, Any] = {"method": "sft", "tuning": "lora", "phase": "Running"}
    figures = {"loss": "0.125", "reward": "0.75"}
    status["progress"] = {"step": 3, "totalSteps": 9, "metrics": figures}
    status["checkpoint"] = {
        "uri": "file:///c",
        "step": 2,
        "savedAt": "2026-01-01T12:00:00Z",
        "worldSize": 1,
        "bytes": 1,
    }
    api.replace(f"{JOBS}/shown/status", stored | {"status": status})
    head, row = kubectl("get", "ftj", "shown").splitlines()
    of_training = ["STEP", "STEPS", "CKPT", "RESTARTS", "AGE"]
    assert head.split() == ["NAME", "METHOD", "TUNING", "GPUS", "PHASE", "REASON", *of_training]
    assert row.split()[:-1] == ["shown", "sft", "lora", "Running", "3", "9", "2", "0"]  # what is unknown stays empty
    wide, row = kubectl("get", "ftj", "shown", "-o", "wide").splitlines()
    assert wide.split() == [*head.split(), "QUEUE", "LOSS", "REWARD", "ETA", "RAYJOB", "MESSAGE"]
    assert row.split()[-2:] == ["0.125", "0.75"]


def test_get_shows_why_a_job_waits_in_a_word_and_wide_in_a_sentence(
    kubectl: Tool, stored_job: Store, api: Client
) -> None:
    stored = stored_job(job_document(name="waits"))
    message = "pod waits-1-head waits: ImagePullBackOff (no such image)"
    status = {"phase": "Starting", "reason": "ImagePullBackOff", "message": message}
    api.replace(f"{JOBS}/waits/status", stored | {"status": status})
    _, row = kubectl("get", "ftj", "waits").splitlines()
    assert row.split()[:-1] == ["waits", "Starting", "ImagePullBackOff", "0"]
    _, row = kubectl("get", "ftj", "waits", "-o", "wide").splitlines()
    assert row.endswith(message)


def test_runtimes_have_a_short_name(kubectl: Tool) -> None:
    assert "ftr" in kubectl("api-resources", "--api-group=finetune-operator.io", "--no-headers")
