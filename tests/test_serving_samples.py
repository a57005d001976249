"""The samples that serve a trained model: what their containers are told is what the command line and their own
volumes, probes and Service know. That an API server takes them is said in tests/control_plane."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from finetune_api.uris import Scheme, parse_uri
from finetune_client.cli.app import app
from finetune_client.cli.serve.sources import SAMPLE
from tests.cluster.dockerfile import read_dockerfile

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "manifests" / "samples" / "serving"
FILES = sorted(FOLDER.glob("*.yaml"))


def of_kind(file: Path, kind: str) -> dict[str, Any]:
    [found] = [one for one in yaml.safe_load_all(file.read_text(encoding="utf-8")) if one["kind"] == kind]
    return dict(found)


def typed(container: dict[str, Any]) -> dict[str, Any]:
    """The values of the command's parameters, as typer reads what the container is told."""
    words: list[str] = container["command"] + container["args"]
    assert words[:4] == ["python", "-m", "finetune_client", "serve"]  # the image has no script called finetune
    finetune: Any = typer.main.get_command(app)
    return dict(finetune.commands["serve"].make_context("serve", words[4:]).params)


@pytest.fixture(params=FILES, ids=lambda file: file.stem)
def file(request: pytest.FixtureRequest) -> Path:
    assert isinstance(request.param, Path)
    return request.param


@pytest.fixture
def pod(file: Path) -> dict[str, Any]:
    return dict(of_kind(file, "Deployment")["spec"]["template"]["spec"])


def test_the_sample_that_a_refusal_names_is_there() -> None:
    assert ROOT / SAMPLE in FILES


def test_the_container_serves_from_a_claim_that_it_mounts(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    source = parse_uri(typed(container)["source"])
    assert source.scheme is Scheme.PVC
    claims = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in pod["volumes"]
        if "persistentVolumeClaim" in volume
    }
    mounts = {mount["mountPath"]: mount for mount in container["volumeMounts"]}
    mount = mounts[f"/mnt/pvc/{source.authority}"]
    assert claims[mount["name"]] == source.authority
    assert mount["readOnly"]


def test_it_listens_where_probes_and_the_service_look(file: Path, pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    options = typed(container)
    assert options["host"] == "0.0.0.0"
    [port] = container["ports"]
    assert port["containerPort"] == options["port"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": port["name"]}
    service, deployment = of_kind(file, "Service"), of_kind(file, "Deployment")
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert service["spec"]["selector"].items() <= deployment["spec"]["template"]["metadata"]["labels"].items()
    assert service["spec"]["selector"] == deployment["spec"]["selector"]["matchLabels"]


def test_what_it_writes_to_is_a_volume_of_the_pod(pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    scratch = {volume["name"] for volume in pod["volumes"] if "emptyDir" in volume}
    assert [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in scratch] == ["/tmp"]


def test_the_trainers_image_has_what_serves() -> None:
    assert "serve" in read_dockerfile(ROOT / "trainers" / "Dockerfile").words("EXTRAS")
