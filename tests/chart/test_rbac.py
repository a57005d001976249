"""The operator may do exactly what this table says. A right more, or one less, is a change of this file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.chart.rendering import MATRIX, NAMESPACE, Helm, Rendered

pytestmark = pytest.mark.control_plane

RUNTIMES = {("finetune-operator.io", "finetuneruntimes"): "list watch"}
JOBS = {
    ("finetune-operator.io", "finetunejobs"): "get list watch delete",
    ("finetune-operator.io", "finetunejobs/status"): "update",
    ("finetune-operator.io", "finetunejobs/finalizers"): "update",
    ("ray.io", "rayjobs"): "get list watch create delete",
    ("", "configmaps"): "get list watch create patch delete",
    ("", "pods"): "list watch",
    ("", "events"): "create patch",
    ("", "serviceaccounts"): "get create",
    ("rbac.authorization.k8s.io", "roles"): "get create",
    ("rbac.authorization.k8s.io", "rolebindings"): "get create",
    ("networking.k8s.io", "networkpolicies"): "get create",
    ("policy", "poddisruptionbudgets"): "get create",
}


def granted(role: dict[str, Any]) -> dict[tuple[str, str], str]:
    """The verbs of a role by group and resource, in the order written."""
    return {
        (group, resource): " ".join(rule["verbs"])
        for rule in role["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def rules(rendered: Rendered) -> Iterator[dict[str, Any]]:
    for role in (*rendered.of("ClusterRole"), *rendered.of("Role")):
        yield from role["rules"]


def subjects(rendered: Rendered) -> list[tuple[str, str]]:
    bindings = (*rendered.of("ClusterRoleBinding"), *rendered.of("RoleBinding"))
    return [(one["name"], one["namespace"]) for binding in bindings for one in binding["subjects"]]


def test_the_operator_has_the_rights_in_the_table(helm: Helm) -> None:
    rendered = helm.template()
    assert granted(rendered.one("ClusterRole", f"{NAMESPACE}:finetune-operator")) == RUNTIMES | JOBS
    binding = rendered.one("ClusterRoleBinding")
    assert binding["roleRef"]["name"] == f"{NAMESPACE}:finetune-operator"


def test_with_namespaces_only_runtimes_are_read_in_the_whole_cluster(helm: Helm) -> None:
    rendered = helm.template({"watchNamespaces": ["team-a", "team-b"]})
    assert granted(rendered.one("ClusterRole", f"{NAMESPACE}:finetune-operator")) == RUNTIMES
    roles = {role["metadata"]["namespace"]: role for role in rendered.of("Role")}
    assert roles.keys() == {"team-a", "team-b", NAMESPACE}
    assert granted(roles["team-a"]) == granted(roles["team-b"]) == JOBS
    bound = {binding["metadata"]["namespace"] for binding in rendered.of("RoleBinding")}
    assert bound == {"team-a", "team-b", NAMESPACE}


def test_one_lease_can_be_updated_its_own(helm: Helm) -> None:
    update, create = helm.template().one("Role")["rules"]
    assert update["resourceNames"] == [helm.template().environment["FINETUNE_LEASE_NAME"]]
    assert update["verbs"] == ["get", "update"]
    assert create["verbs"] == ["create"]
    assert update["resources"] == create["resources"] == ["leases"]


def test_without_an_election_there_is_no_right_to_leases(helm: Helm) -> None:
    assert not helm.template({"leaderElection": {"enabled": False}, "replicas": 1}).of("Role")


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_nobody_gets_secrets_or_a_wildcard(helm: Helm, values: dict[str, Any]) -> None:
    for rule in rules(helm.template(values)):
        assert "*" not in {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
        assert "secrets" not in rule["resources"]
        assert not {"bind", "escalate", "impersonate"} & {*rule["verbs"]}


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_rights_go_to_the_account_that_the_pods_run_as(helm: Helm, values: dict[str, Any]) -> None:
    rendered = helm.template(values)
    assert {*subjects(rendered)} <= {(rendered.pod["serviceAccountName"], NAMESPACE)}


def test_editors_and_viewers_of_a_namespace_get_jobs(helm: Helm) -> None:
    rendered = helm.template()
    editor = rendered.one("ClusterRole", f"{NAMESPACE}:finetune-operator:editor")
    viewer = rendered.one("ClusterRole", f"{NAMESPACE}:finetune-operator:viewer")
    assert {"create", "update", "delete"} <= {*granted(editor)["finetune-operator.io", "finetunejobs"].split()}
    assert {verb for verbs in granted(viewer).values() for verb in verbs.split()} == {"get", "list", "watch"}
    prefix = "rbac.authorization.k8s.io/aggregate-to-"
    assert {f"{prefix}admin", f"{prefix}edit"} <= editor["metadata"]["labels"].keys()
    assert f"{prefix}view" in viewer["metadata"]["labels"]


def test_roles_need_not_be_aggregated(helm: Helm) -> None:
    for role in helm.template({"rbac": {"aggregate": False}}).of("ClusterRole"):
        assert not [label for label in role["metadata"]["labels"] if "aggregate" in label]
