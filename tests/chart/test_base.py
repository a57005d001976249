"""What kustomize installs is what Helm does with its defaults."""

from __future__ import annotations

import subprocess

import pytest
import yaml

from helm.generator.__main__ import BASE, CHART
from helm.generator.base import NAMESPACE, render_base
from tests.chart.rendering import Helm, Rendered
from tests.control_plane.conftest import Built

MANIFESTS = BASE.parent


def test_every_crd_is_in_the_kustomization() -> None:
    listed = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    crds = {f"crd/{file.name}" for file in (MANIFESTS / "crd").glob("*.yaml")}
    assert {*listed} == crds | {"base"}


def test_every_file_of_the_base_is_listed_and_is_one_object() -> None:
    listed = yaml.safe_load((BASE / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
    assert {*listed} == {file.name for file in BASE.glob("*.yaml")} - {"kustomization.yaml"}
    for name in listed:
        (document,) = yaml.safe_load_all((BASE / name).read_text(encoding="utf-8"))
        assert not [label for label in document["metadata"]["labels"] if label.startswith("helm.sh/")]


@pytest.mark.control_plane
def test_the_base_is_what_the_chart_renders(helm: Helm) -> None:
    rendered = render_base(helm.tool.program, CHART)
    assert {file.name: file.read_text(encoding="utf-8") for file in BASE.iterdir()} == rendered


@pytest.mark.control_plane
def test_kustomize_builds_what_helm_installs(helm: Helm, built: Built) -> None:
    command = [str(built("kubectl")), "kustomize", str(MANIFESTS)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    test_pod = ("Pod", "finetune-operator-test-ready")
    ours = Rendered(tuple(yaml.safe_load_all(printed))).names
    assert ours == helm.template().names - {test_pod} | {("Namespace", NAMESPACE)}
