"""Every sample is what the API server takes, and it fills in the defaults that the models have."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.base import Contract
from finetune_api.job import FineTuneJob
from finetune_api.manifests import read_documents
from finetune_api.runtime import FineTuneRuntime
from tests.cluster.client import Client
from tests.control_plane.conftest import JOBS, ROOT, RUNTIMES
from tests.factories import job_document, runtime_document

pytestmark = pytest.mark.control_plane

SAMPLES = ROOT / "manifests" / "samples"
SERVING, INTERACTIVE = SAMPLES / "serving", SAMPLES / "interactive"
PATH_OF = {
    "Deployment": "/apis/apps/v1/namespaces/{}/deployments",
    "Service": "/api/v1/namespaces/{}/services",
    "Pod": "/api/v1/namespaces/{}/pods",
}
OF_KIND: dict[str, tuple[str, type[Contract]]] = {
    "FineTuneJob": (JOBS, FineTuneJob),
    "FineTuneRuntime": (RUNTIMES, FineTuneRuntime),
}


def _documents() -> Iterator[Any]:
    for file in sorted(file for file in SAMPLES.rglob("*.yaml") if file.parent not in (SERVING, INTERACTIVE)):
        for number, document in enumerate(read_documents(file.read_text(encoding="utf-8"), file.name)):
            yield pytest.param(document, id=f"{file.relative_to(SAMPLES)}:{number}")


def test_there_are_samples() -> None:
    assert list(_documents()), f"no YAML below {SAMPLES}"


@pytest.mark.parametrize("document", list(_documents()))
def test_a_sample_is_accepted_with_the_defaults_that_the_models_have(api: Client, document: dict[str, Any]) -> None:
    _expect_the_same_defaults(api, document)


@pytest.mark.parametrize("file", sorted(SERVING.glob("*.yaml")), ids=lambda file: file.stem)
def test_what_serves_a_model_is_accepted_and_its_pods_are_allowed_in_a_restricted_namespace(
    api: Client, namespace: str, file: Path
) -> None:
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    api.merge(f"/api/v1/namespaces/{namespace}", {"metadata": {"labels": labels}})
    for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
        _expect_accepted(api, namespace, document)
        if document["kind"] == "Deployment":
            template = document["spec"]["template"]
            _expect_accepted(api, namespace, {"kind": "Pod", "metadata": {"name": "one"}, "spec": template["spec"]})


def _expect_accepted(api: Client, namespace: str, document: dict[str, Any]) -> None:
    path = PATH_OF[document["kind"]].format(namespace)
    assert api.create(f"{path}?dryRun=All&fieldValidation=Strict", document)["metadata"]["namespace"] == namespace


@pytest.mark.parametrize(
    "document",
    [
        job_document(),
        job_document({"tuning": {"freeze": {"train": ["lm_head.*"]}}, "tracking.wandb": {"project": "p"}}),
        job_document({"tuning": {"full": {}}, "training.earlyStopping": {}, "training.generation": {}}),
        job_document({"training.optimizer": {"beta1": 0.8}, "deepspeed.offload": {}, "cluster": {}}),
        runtime_document(),
        runtime_document({"workers.gpus": 8}),
    ],
    ids=[
        "small job",
        "freeze and wandb",
        "full and early stopping",
        "half-filled blocks",
        "runtime",
        "gpu runtime",
    ],
)
def test_the_server_fills_in_the_defaults_that_the_models_have(api: Client, document: dict[str, Any]) -> None:
    _expect_the_same_defaults(api, document)


def _expect_the_same_defaults(api: Client, document: dict[str, Any]) -> None:
    path, model = OF_KIND[document["kind"]]
    filled_in = api.create(f"{path}?dryRun=All&fieldValidation=Strict", document)["spec"]
    assert filled_in == model.model_validate(document).to_document()["spec"]
