"""What the chart's files say agrees with the rest of the project, seen without Helm."""

from __future__ import annotations

import json
import re
import tomllib
from typing import Any

import pytest
import yaml

from finetune_operator.metrics import Metrics
from helm.generator.__main__ import CHART
from helm.generator.crds import crd_template

ROOT = CHART.parents[1]
CHART_YAML = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
DASHBOARD = json.loads((CHART / "files" / "dashboard.json").read_text(encoding="utf-8"))
ALERTS = (CHART / "templates" / "monitoring" / "prometheusrule.yaml").read_text(encoding="utf-8")
OTHERS = {"up"}
"""Series that Prometheus makes by itself."""
SUFFIXES = {"counter": ["_total"], "histogram": ["_bucket", "_count", "_sum"], "gauge": [""]}


def exported() -> set[str]:
    """The names of all series that the operator can show."""
    metrics = Metrics()
    metrics.count_jobs_with(dict)
    return {family.name + suffix for family in metrics.registry.collect() for suffix in SUFFIXES[family.type]}


def asked_for(expression: str) -> set[str]:
    """The series that a PromQL expression (or a template of one) selects."""
    return set(re.findall(r"\b([a-z_]+)\{", expression))


def panels() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = DASHBOARD["panels"]
    return found


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_shows_series_of_the_operator(panel: dict[str, Any]) -> None:
    series = {name for target in panel["targets"] for name in asked_for(target["expr"])}
    assert series
    assert series <= exported()


def test_panels_do_not_overlap_and_are_numbered() -> None:
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels())
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken))
    assert max(x for x, _ in taken) < 24
    assert len({panel["id"] for panel in panels()}) == len(panels())


def test_alerts_are_about_series_of_the_operator() -> None:
    series = {name for line in ALERTS.splitlines() if "expr:" in line for name in asked_for(line)}
    assert len(series) >= 7
    assert series - OTHERS <= exported()


def test_the_chart_has_the_version_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert CHART_YAML["version"] == CHART_YAML["appVersion"] == project["version"]


@pytest.mark.parametrize(
    ("name", "module"),
    [("kuberay", "github.com/ray-project/kuberay/ray-operator"), ("kueue", "sigs.k8s.io/kueue")],
)
def test_a_dependency_is_off_by_default_and_at_the_version_that_tests_run_against(name: str, module: str) -> None:
    (entry,) = (one for one in CHART_YAML["dependencies"] if one["name"] == name)
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    assert entry["condition"] == f"{name}.enabled"
    assert values[name]["enabled"] is False
    chart = yaml.safe_load((CHART / "charts" / name / "Chart.yaml").read_text(encoding="utf-8"))
    (dependency,) = chart["dependencies"]
    assert chart["version"] == entry["version"]
    assert chart["appVersion"] == dependency["version"]
    modules = (ROOT / "tests" / "cluster" / "wrappers" / name / "go.mod").read_text(encoding="utf-8")
    assert f"{module} v{dependency['version']}" in modules


def test_the_notes_install_the_kuberay_that_the_chart_would() -> None:
    chart = yaml.safe_load((CHART / "charts" / "kuberay" / "Chart.yaml").read_text(encoding="utf-8"))
    notes = (CHART / "templates" / "NOTES.txt").read_text(encoding="utf-8")
    (dependency,) = chart["dependencies"]
    assert f"--repo {dependency['repository']} --version {dependency['version']}" in notes


def test_braces_in_a_crd_are_no_template() -> None:
    manifest = '# Head.\nmetadata:\n  name: a\nspec:\n  rule: "self == {{1}}"\n'
    assert 'rule: "self == {{ "{{" }}1}}"' in crd_template(manifest)


def test_a_crd_gets_its_labels_below_its_name() -> None:
    lines = crd_template("# Head.\nkind: X\nmetadata:\n  name: a\nspec: {}\n").splitlines()
    assert lines[2:6] == ["kind: X", "metadata:", "  name: a", "  labels:"]
    assert lines[-2:] == ["spec: {}", "{{- end }}"]
