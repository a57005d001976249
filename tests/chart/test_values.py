"""Values, README and schema say the same, because two of them are generated from the first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

from finetune_operator.settings import Settings
from helm.generator.__main__ import CHART, chart_files, main
from helm.generator.values import Value, ValuesError, read_values

TEXT = (CHART / "values.yaml").read_text(encoding="utf-8")
VALUES = yaml.safe_load(TEXT)
SCHEMA = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
ALL = [value for section in read_values(TEXT) for value in section.values()]


def faults(values: dict[str, Any]) -> list[str]:
    """What the schema has against values, as `path: message`."""
    found = jsonschema.Draft7Validator(SCHEMA).iter_errors(values)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def with_value(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    values: dict[str, Any] = deepcopy(VALUES)
    inner = values
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return values


def test_readme_schema_and_crds_are_what_generation_would_write() -> None:
    differing = [file.name for file, text in chart_files().items() if file.read_text(encoding="utf-8") != text]
    assert differing == []
    assert main(["--check"]) == 0


def test_a_difference_is_a_failure_that_names_the_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = next(iter(chart_files()))
    monkeypatch.setattr("helm.generator.__main__.chart_files", lambda: {file: "something else"})
    monkeypatch.setattr("helm.generator.__main__._CRDS", Path("none"))
    assert main(["--check"]) == 1
    assert f"{file}: differs" in capsys.readouterr().err


def test_every_value_is_in_the_readme_with_its_sentence() -> None:
    rows = [line for line in (CHART / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == [".".join(value.path) for value in ALL]
    assert all(value.says.replace("|", "\\|") in row for value, row in zip(ALL, rows, strict=True))


def test_the_defaults_fit_their_own_schema() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    assert faults(VALUES) == []
    assert faults({}) == []


def mappings(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all mappings in values whose keys the chart decides."""
    yield path
    for key, value in values.items():
        if isinstance(value, dict) and value and (*path, key) not in GIVEN_ON:
            yield from mappings(value, (*path, key))


# What stands below is another chart's, another object's, or a label, and is not ours to list.
GIVEN_ON = {
    ("kuberay", "kuberay-operator"),
    ("kueue", "kueue"),
    ("dashboard", "labels"),
    ("resources", "requests"),
    ("resources", "limits"),
}


@pytest.mark.parametrize("path", [*mappings(VALUES)], ids=lambda path: ".".join(path) or "top")
def test_an_unknown_key_is_refused_at_every_level_and_named(path: tuple[str, ...]) -> None:
    (fault,) = faults(with_value((*path, "unheardOf"), 1))
    assert "unheardOf" in fault
    assert fault.startswith(".".join(path))


BAD = [
    ("no replica", "replicas", 0),
    ("replicas as text", "replicas", "2"),
    ("a level of log that is none", "logLevel", "verbose"),
    ("a digest that is too short", "image.digest", "sha256:abc"),
    ("a namespace with capitals", "watchNamespaces", ["Team-A"]),
    ("a namespace twice", "watchNamespaces", ["a", "a"]),
    ("a number as a label", "commonLabels", {"team": 1}),
    ("a label that the chart sets itself", "commonLabels", {"app.kubernetes.io/name": "mine"}),
    ("a misspelled field of a toleration", "tolerations", [{"keys": "gpu"}]),
    ("a misspelled field of a security context", "securityContext", {"readonlyRootFilesystem": True}),
    ("a misspelled field of resources", "resources", {"limit": {}}),
    ("a variable without a name", "extraEnv", [{"value": "1"}]),
    ("a port that is none", "networkPolicy.apiServerPorts", [0]),
    ("no port", "networkPolicy.apiServerPorts", []),
    ("an interval without a unit", "serviceMonitor.interval", "30"),
    ("a switch as text", "crds.enabled", "true"),
    ("a misspelled field of a runtime", "defaultRuntime.spec", {"storrage": "pvc://shared/runs"}),
    ("a misspelled field deep in a runtime", "defaultRuntime.spec", {"pods": {"env": [{"name": "A", "valeu": "1"}]}}),
    ("a core too few", "defaultRuntime.spec.workers", {"cpus": 0}),
    ("memory without a unit", "defaultRuntime.spec.workers", {"memory": "64"}),
]


@pytest.mark.parametrize(("path", "value"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_a_wrong_value_is_refused(path: str, value: Any) -> None:
    found = faults(with_value(tuple(path.split(".")), value))
    assert found
    assert all(fault.startswith(path.partition(".")[0]) for fault in found)


GOOD = [
    ("a toleration", "tolerations", [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}]),
    ("a secret in the environment", "extraEnv", [{"name": "A", "valueFrom": {"secretKeyRef": {}}}]),
    ("a share of a request", "apiServer.qps", 0.5),
    ("a runtime", "defaultRuntime.spec", {"workers": {"cpus": 0.5, "memory": "64Gi"}, "storage": "s3://runs"}),
    ("a label of a runtime's pods", "defaultRuntime.spec.pods", {"labels": {"cost-centre": "42"}}),
    ("values for all charts", "global", {"registry": "here"}),
    ("values for all of KubeRay's charts", "kuberay.global", {}),
]


@pytest.mark.parametrize(("path", "value"), [row[1:] for row in GOOD], ids=[row[0] for row in GOOD])
def test_a_right_value_is_taken(path: str, value: Any) -> None:
    assert faults(with_value(tuple(path.split(".")), value)) == []


def test_a_value_without_a_sentence_is_refused() -> None:
    with pytest.raises(ValuesError, match=r"^a has no sentence above it\nb\.c has no sentence"):
        read_values("a: 1\nb:\n  c: 2\n")


def test_a_list_that_does_not_say_of_what_is_refused() -> None:
    with pytest.raises(ValuesError, match=r"^a is a list or a mapping: an @schema line must say of what$"):
        read_values("# Some things.\na: []\n")


def test_comments_defaults_and_limits_are_read_together() -> None:
    (section,) = read_values("## Size\n\na:\n  # How many.\n  # At least one.\n  # @schema {minimum: 1}\n  b: 3\n")
    (value,) = section.values()
    schema = {"type": "integer", "minimum": 1}
    assert (section.title, value) == ("Size", Value(("a", "b"), 3, "How many. At least one.", schema))


@pytest.mark.parametrize(
    ("path", "setting"),
    [
        ("workers", "workers"),
        ("logLevel", "log_level"),
        ("leaderElection.enabled", "leader_elect"),
        ("leaderElection.leaseSeconds", "lease_seconds"),
        ("apiServer.qps", "qps"),
        ("apiServer.burst", "burst"),
        ("trainer.rayVersion", "ray_version"),
    ],
)
def test_a_default_of_the_chart_is_the_operators_own(path: str, setting: str) -> None:
    (value,) = (one for one in ALL if ".".join(one.path) == path)
    assert value.default == getattr(Settings(), setting)
