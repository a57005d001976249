"""The sample of a Ray cluster that stays: what an upgrade of this product changes is right in it. The cluster lane
applies it and hands jobs to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.settings import Settings

FILE = Path(__file__).parent.parent / "manifests" / "samples" / "interactive" / "workbench.yaml"


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    return dict(yaml.safe_load(FILE.read_text(encoding="utf-8"))["spec"])


def test_it_has_the_ray_and_the_image_that_jobs_of_the_operator_have(spec: dict[str, Any]) -> None:
    operators = Settings()
    assert spec["rayVersion"] == operators.ray_version
    assert {pod["containers"][0]["image"] for pod in pods(spec)} == {operators.trainer_image}


def test_all_pods_keep_the_files_of_jobs_on_one_claim_where_jobs_look_for_it(spec: dict[str, Any]) -> None:
    for pod in pods(spec):
        (container,) = pod["containers"]
        claims = {one["name"]: one["persistentVolumeClaim"] for one in pod["volumes"] if "persistentVolumeClaim" in one}
        (mount,) = (one for one in container["volumeMounts"] if one["name"] in claims)
        assert mount["mountPath"] == f"/mnt/pvc/{claims[mount['name']]['claimName']}"
        assert {one["name"]: one["value"] for one in container["env"]}["HOME"] == mount["mountPath"]


def pods(spec: dict[str, Any]) -> list[dict[str, Any]]:
    templates = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    return [template["spec"] for template in templates]
