"""Whole objects, as they would reach the API server, beside the ones that were looked at and found right.

After a change that is meant: GOLDEN=write python -m pytest tests/operator/resources/test_golden.py, then read the diff.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import FineTuneJob
from finetune_api.manifests import load_manifests
from finetune_api.runtime import FineTuneRuntime
from finetune_operator.planning import plan_run
from finetune_operator.resources import disruption, network, rbac
from finetune_operator.resources.config_map import progress_config_map
from finetune_operator.resources.metadata import Document, Owner
from finetune_operator.resources.rayjob import build_rayjob
from finetune_operator.settings import Settings
from tests.factories import job, runtime

GOLDEN = Path(__file__).parent / "golden"
SAMPLES = Path(__file__).resolve().parents[3] / "manifests" / "samples"
SETTINGS = Settings(trainer_image="registry.example/trainer:1.0.0", ray_version="2.60.0", pod_name="operator-0")
UID = "0a1b2c3d-0000-4000-8000-000000000000"

TWO_NODES = {"cluster.workers": {"replicas": 2, "gpus": 8}, "training.globalBatchSize": 64}
ADDITIONS = {
    "cluster.pods": {
        "labels": {"team": "support"},
        "annotations": {"example.com/cost": "support"},
        "tolerations": [{"key": "spot", "operator": "Exists", "effect": "NoSchedule"}],
        "env": [{"name": "WANDB_API_KEY", "secret": {"name": "wandb", "key": "token"}}],
        "volumes": [{"mountPath": "/secrets", "secret": "extra"}],
        "imagePullSecrets": ["registry"],
    },
    "lifecycle.keepFailedClusterSeconds": 900,
}
POOL = {
    "workers": {"gpus": 8, "cpus": 96, "memory": "900Gi"},
    "storage": "pvc://runs/jobs",
    "pods": {"nodeSelector": {"pool": "a100"}, "env": [{"name": "NCCL_IB_HCA", "value": "mlx5"}]},
}
MADE_HERE = {
    "volcano": (job(TWO_NODES | {"scheduling": {"scheduler": "volcano", "queue": "research"}}), runtime()),
    "yunikorn": (job(TWO_NODES | {"scheduling": {"scheduler": "yunikorn", "queue": "research"}}), runtime()),
    "kueue": (
        job(
            TWO_NODES
            | ADDITIONS
            | {
                "scheduling": {
                    "queue": "research",
                    "priorityClass": "low",
                    "topology": {"mode": "pack", "required": True},
                }
            }
        ),
        runtime(POOL),
    ),
}
FROM_SAMPLES = ("minimal", "runtime", "full-zero3", "offload")


def given(name: str) -> tuple[FineTuneJob, FineTuneRuntime]:
    if name in MADE_HERE:
        return MADE_HERE[name]
    manifests = load_manifests(SAMPLES / f"{name}.yaml")
    asked = manifests.jobs[0].job
    reference = asked.spec.runtime_ref
    return asked, manifests.runtimes[reference.name] if reference else runtime()


def ray_job(name: str) -> Document:
    asked, pool = given(name)
    owner = Owner(asked.metadata.name, "default", UID)
    return build_rayjob(owner, asked, plan_run(asked, pool), pool.spec, 1, SETTINGS)


def expect(file: str, documents: list[Document]) -> None:
    path = GOLDEN / file
    if os.environ.get("GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.dump_all(documents, sort_keys=False, width=120, Dumper=Plain), encoding="utf-8")
    assert list(yaml.safe_load_all(path.read_text(encoding="utf-8"))) == documents


class Plain(yaml.SafeDumper):
    """Writes a value out again wherever it occurs, as kubectl does; no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


@pytest.mark.parametrize("name", [*FROM_SAMPLES, *MADE_HERE])
def test_a_rayjob_is_the_one_that_was_found_right(name: str) -> None:
    expect(f"rayjob-{name}.yaml", [ray_job(name)])


def test_the_objects_around_a_job_are_those_that_were_found_right() -> None:
    owner = Owner("example", "default", UID)
    expect(
        "around-a-job.yaml",
        [
            progress_config_map(owner),
            rbac.service_account(owner),
            rbac.role(owner),
            rbac.role_binding(owner),
            network.network_policy(owner),
            disruption.pod_disruption_budget(owner),
        ],
    )


def test_nothing_golden_is_left_over() -> None:
    expected = {f"rayjob-{name}.yaml" for name in (*FROM_SAMPLES, *MADE_HERE)} | {"around-a-job.yaml"}
    assert {file.name for file in GOLDEN.iterdir()} == expected
