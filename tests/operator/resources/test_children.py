"""The smaller objects around a job: ConfigMaps, account and rights, network policy, disruption budget."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.plan import RunPlan
from finetune_operator import names
from finetune_operator.planning import plan_run
from finetune_operator.resources import config_map, disruption, network, rbac
from finetune_operator.resources.metadata import Document, Owner
from finetune_operator.states import Report, read_report
from tests.factories import job, runtime

OWNER = Owner("bot", "team", "uid-1")
PLAN = plan_run(job())
POOL = runtime({"workers.gpus": 8, "storage": "pvc://runs"})

JOB_WIDE = {
    "runtime": config_map.runtime_config_map(OWNER, POOL),
    "progress": config_map.progress_config_map(OWNER),
    "account": rbac.service_account(OWNER),
    "role": rbac.role(OWNER),
    "binding": rbac.role_binding(OWNER),
    "network policy": network.network_policy(OWNER),
    "disruption budget": disruption.pod_disruption_budget(OWNER),
}


def test_an_owner_is_read_off_the_job_as_the_server_has_it() -> None:
    stored = {"metadata": {"name": "bot", "namespace": "team", "uid": "uid-1", "generation": 3}}
    assert Owner.of(stored) == OWNER


@pytest.mark.parametrize("document", JOB_WIDE.values(), ids=JOB_WIDE)
def test_a_child_is_labelled_and_goes_with_its_job(document: Document) -> None:
    metadata = document["metadata"]
    assert metadata["namespace"] == "team"
    assert metadata["labels"] == names.job_labels("bot")
    assert metadata["ownerReferences"] == [OWNER.reference()]


def test_the_plan_is_kept_as_it_is_and_cannot_be_changed() -> None:
    document = config_map.plan_config_map(OWNER, PLAN, 2)
    assert document["metadata"]["name"] == "bot-2-plan"
    assert names.attempt_of(document["metadata"]["labels"]) == 2
    assert document["immutable"] is True
    assert RunPlan.model_validate_json(document["data"]["plan.json"]) == PLAN


def test_the_runtime_is_kept_as_it_was_and_reads_back_the_same() -> None:
    document = JOB_WIDE["runtime"]
    assert document["immutable"] is True
    kept = config_map.read_runtime_config_map(document)
    assert kept is not None
    assert kept.spec == POOL.spec
    assert config_map.runtime_hash(kept) == config_map.runtime_hash(POOL)


@pytest.mark.parametrize("data", [None, {}, {"runtime.json": "{"}, {"runtime.json": "{}"}, {"runtime.json": 1}, []])
def test_a_snapshot_that_was_spoilt_is_none(data: Any) -> None:
    assert config_map.read_runtime_config_map({"data": data}) is None


def test_the_hash_is_about_what_the_runtime_says_and_not_its_name() -> None:
    renamed = POOL.model_copy(update={"metadata": POOL.metadata.model_copy(update={"name": "other"})})
    assert config_map.runtime_hash(renamed) == config_map.runtime_hash(POOL)
    assert config_map.runtime_hash(runtime({"workers.gpus": 4})) != config_map.runtime_hash(POOL)


def test_progress_begins_empty_and_can_be_written() -> None:
    assert "immutable" not in JOB_WIDE["progress"]
    assert read_report(JOB_WIDE["progress"]) == Report()


def test_the_trainers_may_patch_their_own_progress_and_nothing_else() -> None:
    assert JOB_WIDE["role"]["rules"] == [
        {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["bot-progress"], "verbs": ["get", "patch"]}
    ]


def test_the_binding_joins_the_account_to_the_role() -> None:
    binding = JOB_WIDE["binding"]
    assert binding["roleRef"]["name"] == JOB_WIDE["role"]["metadata"]["name"]
    assert [subject["name"] for subject in binding["subjects"]] == [JOB_WIDE["account"]["metadata"]["name"]]
    assert binding["subjects"][0]["namespace"] == "team"


def test_an_account_gives_its_token_to_nobody_unasked() -> None:
    assert JOB_WIDE["account"]["automountServiceAccountToken"] is False


def test_only_the_jobs_own_pods_and_kuberay_come_in() -> None:
    spec = JOB_WIDE["network policy"]["spec"]
    pods = {"matchLabels": {names.JOB_LABEL: "bot"}}
    assert spec["podSelector"] == pods
    assert spec["policyTypes"] == ["Ingress"]  # what goes out is left alone
    own, kuberay = spec["ingress"]
    assert own == {"from": [{"podSelector": pods}]}
    assert kuberay["ports"] == [{"protocol": "TCP", "port": 8265}]
    [peer] = kuberay["from"]
    # both in one peer: an entry each would let in every pod of every namespace
    assert peer == {
        "namespaceSelector": {},
        "podSelector": {"matchLabels": {"app.kubernetes.io/component": "kuberay-operator"}},
    }


def test_no_healthy_pod_is_evicted_whatever_the_job_is_resized_to() -> None:
    spec = JOB_WIDE["disruption budget"]["spec"]
    most_workers = 1024
    assert spec["minAvailable"] > most_workers + 1
    assert "maxUnavailable" not in spec
    assert spec["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


def test_the_policies_select_the_pods_of_every_attempt() -> None:
    labels = names.pod_labels("bot", 7, names.WORKER)
    for kind, key in (("network policy", "podSelector"), ("disruption budget", "selector")):
        wanted = JOB_WIDE[kind]["spec"][key]["matchLabels"]
        assert wanted.items() <= labels.items()
        assert not wanted.items() <= names.pod_labels("bot-7", 1, names.WORKER).items()
