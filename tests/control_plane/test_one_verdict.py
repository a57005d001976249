"""The API server and the models say the same of the same object: what a laptop accepts, a cluster accepts.

Each object goes to both judges: server-side dry-run with strict fields, and the models as they read files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from finetune_api.base import Contract
from finetune_api.failures import Problem
from finetune_api.job import FineTuneJob
from finetune_api.problems import InvalidManifest, validate_document
from finetune_api.runtime import FineTuneRuntime
from tests.cluster.client import ApiError, Client
from tests.control_plane.conftest import JOBS, RUNTIMES, Store
from tests.control_plane.limits import EXAMPLES, Breach, breaches, fields_of, fields_set, spec_schema
from tests.control_plane.rules import RULE_ROWS, UPDATE_ROWS, RuleRow, rules_of_the_contract
from tests.factories import job_document, with_changes

pytestmark = pytest.mark.control_plane

PATHS = {"FineTuneJob": JOBS, "FineTuneRuntime": RUNTIMES}
MODELS: dict[str, type[Contract]] = {"FineTuneJob": FineTuneJob, "FineTuneRuntime": FineTuneRuntime}


def servers_verdict(api: Client, document: dict[str, Any]) -> ApiError | None:
    """Why the server refuses `document`, None when it would store it."""
    try:
        api.create(f"{PATHS[document['kind']]}?dryRun=All&fieldValidation=Strict", document)
    except ApiError as error:
        if error.code not in (400, 422):
            raise
        return error
    return None


def models_verdict(document: dict[str, Any]) -> list[Problem]:
    """What the models find wrong with `document`."""
    try:
        validate_document(MODELS[document["kind"]], document)
    except InvalidManifest as invalid:
        return invalid.problems
    return []


def test_every_rule_has_a_row() -> None:
    stated = {(owner, rule.message) for owner, rule in rules_of_the_contract() if rule.holds is not None}
    assert {(row.owner, row.message) for row in RULE_ROWS} == stated


def test_every_rule_about_updates_has_a_row() -> None:
    stated = {(owner, rule.message) for owner, rule in rules_of_the_contract() if rule.holds is None}
    assert {(row.owner, row.message) for row in UPDATE_ROWS} == stated


@pytest.mark.parametrize("row", RULE_ROWS, ids=str)
def test_a_broken_rule_is_refused_by_both_at_the_same_field_with_the_same_message(api: Client, row: RuleRow) -> None:
    document = job_document(row.changes)
    refused = servers_verdict(api, document)
    assert refused is not None
    assert [(field, row.message in text) for field, text in refused.causes] == [(row.path, True)]
    assert [(problem.path, problem.message) for problem in models_verdict(document)] == [(row.path, row.message)]


def test_every_field_is_set_in_an_example() -> None:
    for kind in MODELS:
        documents = [document for document in EXAMPLES.values() if document["kind"] == kind]
        schema = spec_schema(kind)
        reached = {path for d in documents for path, _, _ in fields_set(schema, d["spec"], "spec")}
        assert set(fields_of(schema, "spec")) == reached


@pytest.mark.parametrize("document", EXAMPLES.values(), ids=EXAMPLES)
def test_a_document_with_every_field_is_accepted_by_both(api: Client, document: dict[str, Any]) -> None:
    assert servers_verdict(api, document) is None
    assert models_verdict(document) == []


@pytest.mark.parametrize("breach", list(breaches()), ids=str)
def test_a_broken_limit_is_refused_by_both(api: Client, breach: Breach) -> None:
    refused = servers_verdict(api, breach.document)
    assert refused is not None
    assert breach.path in refused.message, refused.message
    assert breach.path in {(problem.path or "")[: len(breach.path)] for problem in models_verdict(breach.document)}


OTHER_FAULTS: dict[str, Mapping[str, Any]] = {
    "microBatchSize 0": {"training.microBatchSize": 0},
    "microBatchSize above 65536": {"training": {"epochs": 1, "globalBatchSize": 131_072, "microBatchSize": 131_072}},
    "microBatchSize as another word": {"training.microBatchSize": "many"},
    "a number in quotes": {"tuning.lora.rank": "16"},
    "half a worker": {"cluster.workers.replicas": 1.5},
    "true as a number": {"training.seed": True},
    "a list for a mapping": {"training.optimizer": []},
    "a scheme that is not for outputs": {"outputs": [{"to": "hf://org/name"}]},
    "a path for a URI": {"model.source": "/models/m"},
    "a list in a list": {"tuning.lora.targetModules": [["q_proj"]]},
    "a checkpoint every no steps": {"checkpoint": {"everySteps": 0}},
    "no checkpoint is kept": {"checkpoint": {"keepLast": 0}},
    "a checkpoint in words": {"checkpoint": {"everySteps": "often"}},
    "a checkpoint every half step": {"checkpoint": {"everySteps": 0.5}},
    "another way to be behind": {"checkpoint": {"whenBehind": "stop"}},
    "kept every no steps": {"checkpoint": {"keepEvery": 0}},
    "the best of no figure": {"checkpoint": {"keepBest": {}}},
    "a figure that cannot be one": {"checkpoint": {"keepBest": {"metric": "Eval Loss"}}},
    "none of the best": {"checkpoint": {"keepBest": {"metric": "loss", "count": 0}}},
    "a quota in decimal units": {"checkpoint": {"quota": "500GB"}},
    "a quota of nothing": {"checkpoint": {"quota": "0Gi"}},
    "going on in another way": {"checkpoint": {"resume": "always"}},
    "a number among names": {"tuning.lora.targetModules": [1]},
}


@pytest.mark.parametrize("changes", OTHER_FAULTS.values(), ids=OTHER_FAULTS)
def test_another_fault_is_refused_by_both(api: Client, changes: Mapping[str, Any]) -> None:
    document = job_document(changes)
    assert servers_verdict(api, document) is not None
    assert models_verdict(document)


@pytest.mark.parametrize("name", ["a" * 41, "Upper", "1-digit-first", "under_score", "ends-"])
def test_a_name_that_cannot_be_a_resource_name_is_refused_by_both(api: Client, name: str) -> None:
    document = job_document(name=name)
    assert servers_verdict(api, document) is not None
    assert models_verdict(document)


@dataclass(frozen=True)
class Difference:
    """The judges differ on the default job with `changes` (dotted paths from its root); why that is right."""

    changes: Mapping[str, Any]
    accepted_by: Literal["server", "models"]
    reason: str


_NO_UNION = "OpenAPI as Kubernetes has it knows no 'number or text': the operator judges the rate with the models"
_SHAPES = "the CRD checks a URI's scheme; its shape is parsed by the models, whose message says what would be right"
_NULL = "the server takes null for 'use the default'; in a file, a key without a value is a line left unfinished"
_ONE_NUMBER = "to the server 16.0 is 16, and it is stored as 16; in a file it is more likely a mistake"
_METADATA = "the models read name, namespace and labels; the rest of metadata is Kubernetes' to judge"

DIFFERENCES = {
    "learningRate as another word": Difference({"spec.training.learningRate": "fast"}, "server", _NO_UNION),
    "learningRate above 1": Difference({"spec.training.learningRate": 2.0}, "server", _NO_UNION),
    "learningRate as a mapping": Difference({"spec.training.learningRate": {"peak": 1}}, "server", _NO_UNION),
    "hf:// with a space": Difference({"spec.model.source": "hf://org/my model"}, "server", _SHAPES),
    "pvc:// with ..": Difference({"spec.outputs": [{"to": "pvc://claim/../other"}]}, "server", _SHAPES),
    "null for a number": Difference({"spec.tuning.lora.rank": None}, "server", _NULL),
    "null for a block": Difference({"spec.training.optimizer": None}, "server", _NULL),
    "a whole number with a point": Difference({"spec.tuning.lora.rank": 16.0}, "server", _ONE_NUMBER),
    "an unknown key of metadata": Difference({"metadata.nmae": "x"}, "models", _METADATA),
    "a label with a space": Difference({"metadata.labels": {"my team": "a"}}, "models", _METADATA),
}


@pytest.mark.parametrize("difference", DIFFERENCES.values(), ids=DIFFERENCES)
def test_where_the_judges_differ_is_known(api: Client, difference: Difference) -> None:
    document = with_changes(job_document(), difference.changes)
    verdicts = {"server": servers_verdict(api, document) is None, "models": not models_verdict(document)}
    assert [judge for judge, accepts in verdicts.items() if accepts] == [difference.accepted_by]


def test_a_whole_number_with_a_point_is_stored_without_it(api: Client, stored_job: Store) -> None:
    stored_job(job_document({"tuning.lora.rank": 16.0}, "pointed"))
    rank = api.get(f"{JOBS}/pointed")["spec"]["tuning"]["lora"]["rank"]
    assert (rank, type(rank)) == (16, int)
