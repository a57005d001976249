"""The generated CRDs: structural, described, bounded, and never behind the models.

A real server judges them too, in tests/control_plane; what can be known without one is known here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.base import Contract
from finetune_api.job import FineTuneJob
from finetune_api.problems import InvalidManifest, validate_document
from finetune_api.runtime import FineTuneRuntime
from finetune_api.schema import MAX_BYTES, _model, custom_resource_definitions, main, render
from tests.control_plane.limits import EXAMPLES, Breach, breaches
from tests.control_plane.rules import RULE_ROWS, RuleRow, rules_of_the_contract
from tests.factories import job_document

COMMITTED = Path(__file__).resolve().parents[2] / "manifests" / "crd"
MODELS: dict[str, type[Contract]] = {"FineTuneJob": FineTuneJob, "FineTuneRuntime": FineTuneRuntime}
CRDS = custom_resource_definitions()

each_crd = pytest.mark.parametrize("crd", CRDS.values(), ids=CRDS)


def _schema(crd: dict[str, Any]) -> dict[str, Any]:
    schema: dict[str, Any] = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def _nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below `schema`, itself included, with its dotted path."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from _nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield from _nodes(schema["items"], f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from _nodes(schema["additionalProperties"], f"{path}{{}}")


def test_the_committed_files_are_what_the_models_generate() -> None:
    assert {file.name: file.read_text(encoding="utf-8") for file in COMMITTED.iterdir()} == {
        name: render(crd) for name, crd in CRDS.items()
    }


@each_crd
def test_a_crd_is_small_enough_for_client_side_apply(crd: dict[str, Any]) -> None:
    assert len(render(crd).encode()) < MAX_BYTES


@each_crd
def test_the_yaml_reads_back_as_the_crd_without_anchors(crd: dict[str, Any]) -> None:
    text = render(crd)
    assert yaml.safe_load(text) == crd
    assert not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text))


@each_crd
def test_every_schema_node_is_structural(crd: dict[str, Any]) -> None:
    for path, node in _nodes(_schema(crd)):
        typed = "type" in node
        free = node.get("x-kubernetes-int-or-string") or node.get("x-kubernetes-preserve-unknown-fields")
        assert typed or free, f"{path} has no type"
        assert not {"$ref", "$defs", "anyOf", "oneOf", "allOf", "not", "title", "const", "nullable"} & node.keys(), path
        assert not {"properties", "additionalProperties"} <= node.keys(), path
        assert node.get("type") != "array" or "items" in node, path


@each_crd
def test_every_field_below_spec_and_status_is_described_in_a_sentence(crd: dict[str, Any]) -> None:
    for path, node in _nodes(_schema(crd)):
        if path.startswith((".spec", ".status")) and not path.endswith(("[]", "{}")):
            assert node.get("description", "").endswith((".", ")")), f"{path}: {node.get('description')!r}"
            assert "\n" not in node["description"], path


@each_crd
def test_every_list_is_bounded_so_that_rules_have_a_price(crd: dict[str, Any]) -> None:
    for path, node in _nodes(_schema(crd)):
        if node.get("type") == "array":
            assert node["maxItems"] <= 64, path


@each_crd
def test_a_rule_points_at_a_field_that_its_object_has(crd: dict[str, Any]) -> None:
    for path, node in _nodes(_schema(crd)):
        for rule in node.get("x-kubernetes-validations", ()):
            here = node
            for step in rule.get("fieldPath", "").split(".")[1:]:
                here = here["properties"].get(step)
                assert here is not None, f"{path}: {rule['fieldPath']}"


def test_the_server_and_the_models_hold_the_same_rules_in_the_same_words() -> None:
    generated = {
        (rule["rule"], rule["message"])
        for crd in CRDS.values()
        for _, node in _nodes(_schema(crd))
        if "properties" in node  # a single value's rule stands in for a type that a schema cannot say
        for rule in node.get("x-kubernetes-validations", ())
    }
    assert generated == {(rule.cel, rule.message) for _, rule in rules_of_the_contract()}


@pytest.mark.parametrize("row", RULE_ROWS, ids=str)
def test_the_models_refuse_a_broken_rule_in_the_words_of_the_schema(row: RuleRow) -> None:
    with pytest.raises(InvalidManifest) as refused:
        validate_document(FineTuneJob, job_document(row.changes))
    assert [(problem.path, problem.message) for problem in refused.value.problems] == [(row.path, row.message)]


@each_crd
def test_names_versions_and_scope_are_what_people_type(crd: dict[str, Any]) -> None:
    spec = crd["spec"]
    assert crd["metadata"]["name"] == f"{spec['names']['plural']}.finetune-operator.io"
    assert [version["name"] for version in spec["versions"]] == ["v1alpha1"]
    expected = {"FineTuneJob": ("Namespaced", ["ftj"]), "FineTuneRuntime": ("Cluster", ["ftr"])}
    assert (spec["scope"], spec["names"]["shortNames"]) == expected[spec["names"]["kind"]]


def test_every_printer_column_reads_a_field_that_there_is() -> None:
    version = CRDS["finetunejobs.finetune-operator.io.yaml"]["spec"]["versions"][0]
    for column in version["additionalPrinterColumns"]:
        here = version["schema"]["openAPIV3Schema"]
        for step in column["jsonPath"].split(".")[1:]:
            here = here.get("properties", {}).get(step) or here.get("additionalProperties")
            if column["jsonPath"].startswith(".metadata"):
                break  # Kubernetes' own
            assert here, column
        else:
            assert here["type"] == column["type"], column


def test_the_status_is_a_subresource() -> None:
    version = CRDS["finetunejobs.finetune-operator.io.yaml"]["spec"]["versions"][0]
    assert version["subresources"] == {"status": {}}


def test_a_default_is_what_the_model_has_and_a_nested_one_is_written_in_full() -> None:
    training = _schema(CRDS["finetunejobs.finetune-operator.io.yaml"])["properties"]["spec"]["properties"]["training"]
    assert training["properties"]["globalBatchSize"]["default"] == 32
    assert training["properties"]["precision"]["default"] == "auto"
    assert training["properties"]["optimizer"]["default"] == {
        "beta1": 0.9,
        "beta2": 0.999,
        "epsilon": 1e-8,
        "weightDecay": 0.0,
    }
    assert "default" not in training["properties"]["epochs"]
    assert "default" not in training["properties"]["earlyStopping"]


@pytest.mark.parametrize("document", EXAMPLES.values(), ids=EXAMPLES)
def test_the_examples_that_set_every_field_are_valid(document: dict[str, Any]) -> None:
    validate_document(MODELS[document["kind"]], document)


@pytest.mark.parametrize("breach", list(breaches()), ids=str)
def test_a_limit_of_the_schema_is_a_limit_of_the_models(breach: Breach) -> None:
    with pytest.raises(InvalidManifest) as refused:
        validate_document(MODELS[breach.document["kind"]], breach.document)
    assert any((problem.path or "").startswith(breach.path) for problem in refused.value.problems)


def test_a_field_without_a_docstring_is_refused() -> None:
    class Silent(Contract):
        speed: int = 1

    with pytest.raises(TypeError, match="no docstring"):
        _model(Silent)


def test_a_union_that_kubernetes_cannot_express_is_refused() -> None:
    class Either(Contract):
        size: int | str = 1
        """Number or text."""

    with pytest.raises(TypeError, match="not structural"):
        _model(Either)


def test_checking_says_which_file_is_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 0
    assert main([str(tmp_path), "--check"]) == 0
    behind = tmp_path / "finetunejobs.finetune-operator.io.yaml"
    behind.write_text(behind.read_text(encoding="utf-8").replace("maximum: 3", "maximum: 4"), encoding="utf-8")
    assert main([str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().err == f"{behind}: differs from the models; run `make generate`\n"


def test_checking_an_empty_folder_finds_every_file_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path), "--check"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == len(CRDS)


def test_no_field_has_a_name_that_yaml_takes_for_a_truth_value() -> None:
    """`on:` as a key is the truth value true to YAML 1.1, which kubectl reads."""

    def names(schema: Any) -> Iterator[str]:
        for name, child in (schema.get("properties") or {}).items():
            yield name
            yield from names(child)
        for key in ("items", "additionalProperties"):
            if isinstance(schema.get(key), dict):
                yield from names(schema[key])

    for crd in custom_resource_definitions().values():
        found = set(names(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]))
        assert found & {"on", "off", "yes", "no", "y", "n", "true", "false"} == set()


def test_a_status_may_hold_words_that_the_crd_does_not_know_and_a_spec_may_not() -> None:
    version = custom_resource_definitions()["finetunejobs.finetune-operator.io.yaml"]["spec"]["versions"][0]
    properties = version["schema"]["openAPIV3Schema"]["properties"]
    assert '"enum"' in json.dumps(properties["spec"])
    assert '"enum"' not in json.dumps(properties["status"])
