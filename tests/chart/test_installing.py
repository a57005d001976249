"""Helm installs, upgrades and uninstalls the chart on a real API server, which judges every object of it.

ServiceMonitor and PrometheusRule are left out: their CRDs belong to the Prometheus operator. No controller runs, so the
pods are only asked for.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.chart.rendering import MATRIX, NAMESPACE, RELEASE, Helm
from tests.cluster.client import ApiError, Client
from tests.cluster.kuberay import define_ray
from tests.cluster.server import Server
from tests.cluster.tools import ToolFailed
from tests.control_plane.conftest import Built
from tests.control_plane.operators import Jobs, operator
from tests.factories import job_document

pytestmark = pytest.mark.control_plane

Document = dict[str, Any]

JOBS = "/apis/finetune-operator.io/v1alpha1/namespaces/default/finetunejobs"
RUNTIMES = "/apis/finetune-operator.io/v1alpha1/finetuneruntimes"
ROLES = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles"
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
NOT_SERVED = {"ServiceMonitor", "PrometheusRule"}


@pytest.fixture(scope="module")
def on_server(helm: Helm, bare_server: Server) -> Helm:
    """Helm, acting on the server."""
    environment = helm.tool.environment | {"KUBECONFIG": str(bare_server.kubeconfig)}
    return Helm(replace(helm.tool, environment=environment))


@pytest.fixture(scope="module")
def installed(on_server: Helm, bare_server: Server) -> Iterator[Client]:
    """The chart as it is installed for the first time, with a runtime, into a namespace of the strictest level."""
    client = bare_server.client
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    client.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE, "labels": labels}})
    for name in ("team-a", "team-b"):
        client.create("/api/v1/namespaces", {"metadata": {"name": name}})
    # Made by a controller in a real cluster; pods that name no account run as it.
    client.create(f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts", {"metadata": {"name": "default"}})
    on_server.release("install", {"defaultRuntime": {"enabled": True}})
    yield client
    on_server.tool("uninstall", RELEASE, "--namespace", NAMESPACE, "--ignore-not-found")


@pytest.fixture(scope="module")
def kubeconfig(installed: Client, bare_server: Server) -> Path:
    """A file with which a program may do what the operator may."""
    return bare_server.kubeconfig_of(NAMESPACE, "finetune-operator")


@pytest.fixture(scope="module")
def as_operator(kubeconfig: Path, bare_server: Server) -> Client:
    """A client with the rights of the operator."""
    token = json.loads(kubeconfig.read_text(encoding="utf-8"))["users"][0]["user"]["token"]
    return replace(bare_server.client, token=token)


def path_of(client: Client, document: Document) -> str:
    """Where the server has an object, as it says itself."""
    version = document["apiVersion"]
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    (kind,) = (
        one for one in client.get(root)["resources"] if one["kind"] == document["kind"] and "/" not in one["name"]
    )
    metadata = document["metadata"]
    inside = f"/namespaces/{metadata['namespace']}" if kind["namespaced"] else ""
    return f"{root}{inside}/{kind['name']}/{metadata['name']}"


def refused(act: Any) -> int:
    """The status with which the server refuses."""
    with pytest.raises(ApiError) as caught:
        act()
    return caught.value.code


def role(name: str, resource: str) -> Document:
    """A Role as the operator makes one for a trainer."""
    rules = [{"apiGroups": [""], "resources": [resource], "resourceNames": ["mine"], "verbs": ["get", "patch"]}]
    return {"metadata": {"name": name}, "rules": rules}


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_the_server_takes_every_object(helm: Helm, installed: Client, values: Document) -> None:
    for document in helm.template(values).documents:
        if document["kind"] not in NOT_SERVED:
            # As Helm, whose fields go when a values file no longer asks for them.
            query = "?dryRun=All&fieldManager=helm&force=true&fieldValidation=Strict"
            installed.request(
                "PATCH", path_of(installed, document) + query, document, content_type="application/apply-patch+yaml"
            )


def test_a_runtime_can_come_with_the_crds(installed: Client) -> None:
    assert installed.get(f"{RUNTIMES}/default")["spec"]["workers"]["gpus"] == 8


def test_the_pods_fit_the_strictest_level_of_pod_security(helm: Helm, installed: Client) -> None:
    template = helm.template().one("Deployment")["spec"]["template"]
    pod = {"metadata": {"name": "judged"}, "spec": template["spec"]}
    assert installed.create(f"/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All", pod)
    pod["spec"]["containers"][0]["securityContext"]["allowPrivilegeEscalation"] = True
    assert refused(lambda: installed.create(f"/api/v1/namespaces/{NAMESPACE}/pods?dryRun=All", pod)) == 403


def test_the_operator_can_write_a_status_and_not_the_job(installed: Client, as_operator: Client) -> None:
    job = installed.create(JOBS, job_document({}, "judged"))
    written = as_operator.replace(f"{JOBS}/judged/status", job | {"status": {"phase": "Running"}})
    assert written["status"]["phase"] == "Running"
    assert refused(lambda: as_operator.merge(f"{JOBS}/judged", {"spec": {"suspend": True}})) == 403
    as_operator.delete(f"{JOBS}/judged")


def test_the_operator_can_let_a_trainer_patch_its_progress_and_nothing_else(as_operator: Client) -> None:
    assert as_operator.create(f"{ROLES}?dryRun=All", role("progress", "configmaps"))
    assert refused(lambda: as_operator.create(f"{ROLES}?dryRun=All", role("secrets", "secrets"))) == 403


def test_the_operator_may_not_look_at_secrets(as_operator: Client) -> None:
    for path in ("/api/v1/secrets", "/api/v1/namespaces/default/secrets/any"):
        assert refused(lambda path=path: as_operator.get(path)) == 403


def test_the_operator_may_update_its_own_lease_only(as_operator: Client) -> None:
    for name in ("finetune-operator", "another"):
        as_operator.create(LEASES, {"metadata": {"name": name}})
    assert as_operator.replace(f"{LEASES}/finetune-operator", as_operator.get(f"{LEASES}/finetune-operator"))
    assert refused(lambda: as_operator.get(f"{LEASES}/another")) == 403


@pytest.mark.parametrize("values", [{}, {"watchNamespaces": ["team-a"]}], ids=["all namespaces", "one namespace"])
def test_the_rights_are_enough_for_a_job_from_its_first_attempt_to_its_deletion(
    on_server: Helm, bare_server: Server, built: Built, kubeconfig: Path, tmp_path: Path, values: Document
) -> None:
    define_ray(bare_server.client, built("kuberay-manifests"))
    on_server.release("upgrade", values)
    jobs, tiny = Jobs(bare_server.client, "team-a"), "tiny" if values else "small"
    with operator(tmp_path, kubeconfig, "team-a", f"--operator-namespace={NAMESPACE}") as one:
        backoff = {"failurePolicy.backoff": {"initialSeconds": 1, "maxSeconds": 1}}
        jobs.submit(tiny, backoff | {"lifecycle": {"ttlSecondsAfterFinished": 1}})
        one.wait(lambda: f"{tiny}-1" in jobs.ray_jobs(), "the first attempt")
        jobs.fail(tiny)
        one.wait(lambda: f"{tiny}-2" in jobs.ray_jobs(), "the second attempt")
        jobs.run(tiny, 2)
        jobs.succeed(tiny, 2)
        one.wait(lambda: not jobs.status(tiny), "the job to be deleted")
        assert {"AttemptStarted", "AttemptFailed"} <= {*jobs.events(tiny)}
        assert [line for line in one.log() if line["level"] != "info"] == []


def test_who_may_edit_a_namespace_has_a_role_for_jobs(installed: Client) -> None:
    named = {one["metadata"]["name"] for one in installed.items("/apis/rbac.authorization.k8s.io/v1/clusterroles")}
    assert {f"{NAMESPACE}:finetune-operator:{who}" for who in ("editor", "viewer")} <= named


def with_runtime(name: str = "default", **spec: Any) -> Document:
    """Values that ask for a runtime."""
    return {"defaultRuntime": {"enabled": True, "name": name, "spec": spec}}


@pytest.fixture
def runtime(on_server: Helm, installed: Client) -> Document:
    """The release's runtime, of four GPUs."""
    on_server.release("upgrade", with_runtime(workers={"gpus": 4}), options=("--force-conflicts",))
    found: Document = installed.get(f"{RUNTIMES}/default")
    assert found["spec"]["workers"]["gpus"] == 4
    return found


def revision(on_server: Helm) -> int:
    """The newest one of the release."""
    listed = on_server.tool("history", RELEASE, "--namespace", NAMESPACE, "--output", "json")
    return int(json.loads(listed)[-1]["revision"])


def test_a_rollback_brings_back_the_runtime_of_any_revision(
    on_server: Helm, installed: Client, runtime: Document
) -> None:
    """Also of the first one, when the kind was unknown, and the one after: they make it in another way."""
    for to, gpus in (("1", 8), (str(revision(on_server)), 4)):
        on_server.tool("rollback", RELEASE, to, "--namespace", NAMESPACE)
        found = installed.get(f"{RUNTIMES}/default")
        assert found["spec"]["workers"]["gpus"] == gpus
        assert found["metadata"]["uid"] == runtime["metadata"]["uid"]


def test_a_misspelled_runtime_is_refused_before_anything_is_touched(
    on_server: Helm, installed: Client, runtime: Document
) -> None:
    before = revision(on_server)
    with pytest.raises(ToolFailed, match=r"(?s)defaultRuntime/spec.*storrage"):
        on_server.release("upgrade", with_runtime(storrage="pvc://shared/runs"))
    assert revision(on_server) == before
    assert installed.get(f"{RUNTIMES}/default") == runtime


def test_a_runtime_that_the_server_refuses_leaves_the_one_that_jobs_name(
    on_server: Helm, installed: Client, runtime: Document
) -> None:
    before = revision(on_server)
    with pytest.raises(ToolFailed, match="operator Exists compares no value"):
        on_server.release(
            "upgrade", with_runtime(pods={"tolerations": [{"key": "gpu", "operator": "Exists", "value": "1"}]})
        )
    assert installed.get(f"{RUNTIMES}/default") == runtime
    on_server.tool("rollback", RELEASE, str(before), "--namespace", NAMESPACE)
    assert installed.get(f"{RUNTIMES}/default")["spec"] == runtime["spec"]


def test_what_an_administrator_changed_is_named_and_not_overwritten(
    on_server: Helm, installed: Client, runtime: Document
) -> None:
    installed.merge(f"{RUNTIMES}/default?fieldManager=kubectl-edit", {"spec": {"workers": {"gpus": 2}}})
    with pytest.raises(ToolFailed, match=r"conflict with \"kubectl-edit\".*\.spec\.workers\.gpus"):
        on_server.release("upgrade", with_runtime(workers={"gpus": 1}))
    assert installed.get(f"{RUNTIMES}/default")["spec"]["workers"]["gpus"] == 2


def test_a_runtime_that_somebody_else_made_stays_theirs(on_server: Helm, installed: Client, runtime: Document) -> None:
    theirs = installed.create(
        RUNTIMES,
        {
            "apiVersion": "finetune-operator.io/v1alpha1",
            "kind": "FineTuneRuntime",
            "metadata": {"name": "theirs"},
            "spec": {"workers": {"gpus": 1}},
        },
    )
    with pytest.raises(ToolFailed, match=r'"theirs".* exists and cannot be imported into the current release'):
        on_server.release("upgrade", with_runtime("theirs"))
    assert installed.get(f"{RUNTIMES}/theirs") == theirs


def test_an_upgrade_changes_what_was_asked_for_and_uninstalling_keeps_the_jobs(
    on_server: Helm, installed: Client
) -> None:
    kept = installed.create(JOBS, job_document({}, "kept"))
    on_server.release("upgrade", with_runtime(workers={"gpus": 3}) | {"replicas": 3}, options=("--force-conflicts",))
    deployment = f"/apis/apps/v1/namespaces/{NAMESPACE}/deployments/finetune-operator"
    assert installed.get(deployment)["spec"]["replicas"] == 3
    assert installed.get(f"{RUNTIMES}/default")["spec"]["workers"]["gpus"] == 3
    on_server.tool("uninstall", RELEASE, "--namespace", NAMESPACE)
    assert installed.find(deployment) is None
    assert installed.get(f"{RUNTIMES}/default")["spec"]["workers"]["gpus"] == 3
    assert installed.get(f"{JOBS}/kept")["metadata"]["uid"] == kept["metadata"]["uid"]
    on_server.release("install", {"defaultRuntime": {"enabled": True}})
    assert installed.get(f"{JOBS}/kept")["metadata"]["uid"] == kept["metadata"]["uid"]
