"""What the chart renders, by the real Helm, for a matrix of values."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import FineTuneJob
from finetune_api.runtime import FineTuneRuntime
from finetune_operator.settings import read_settings
from helm.generator.__main__ import CHART
from tests.chart.rendering import MATRIX, NAMESPACE, RELEASE, Helm, Rendered
from tests.cluster.tools import ToolFailed

pytestmark = pytest.mark.control_plane

CLUSTER_WIDE = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition", "FineTuneRuntime"}
CRDS = CHART.parents[1] / "manifests" / "crd"


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_every_object_says_whose_it_is_and_where_it_belongs(helm: Helm, values: dict[str, Any]) -> None:
    for document in helm.template(values).documents:
        metadata = document["metadata"]
        assert metadata["labels"]["app.kubernetes.io/name"] == "finetune-operator"
        assert metadata["labels"].items() >= values.get("commonLabels", {}).items()
        namespaces = {NAMESPACE, *values.get("watchNamespaces", [])}
        assert ("namespace" in metadata) == (document["kind"] not in CLUSTER_WIDE)
        assert metadata.get("namespace", NAMESPACE) in namespaces


@pytest.mark.parametrize("values", MATRIX.values(), ids=MATRIX.keys())
def test_the_operator_understands_the_environment_that_it_is_given(helm: Helm, values: dict[str, Any]) -> None:
    rendered = helm.template(values)
    ours = {name: value for name, value in rendered.environment.items() if name.startswith("FINETUNE_")}
    settings = read_settings(environment=ours)
    assert {name.removeprefix("FINETUNE_").lower() for name in ours} <= type(settings).model_fields.keys()
    assert settings.watch_namespaces == tuple(values.get("watchNamespaces", ()))
    assert settings.leader_elect == values.get("leaderElection", {}).get("enabled", True)
    assert settings.lease_name == rendered.one("Deployment")["metadata"]["name"]
    assert settings.trainer_image == "ghcr.io/finetune-operator/trainer:0.1.0"


def test_the_defaults_render_these_objects(helm: Helm) -> None:
    assert helm.template().names == {
        ("ClusterRole", "finetune-system:finetune-operator"),
        ("ClusterRole", "finetune-system:finetune-operator:editor"),
        ("ClusterRole", "finetune-system:finetune-operator:viewer"),
        ("ClusterRoleBinding", "finetune-system:finetune-operator"),
        ("CustomResourceDefinition", "finetunejobs.finetune-operator.io"),
        ("CustomResourceDefinition", "finetuneruntimes.finetune-operator.io"),
        ("Deployment", "finetune-operator"),
        ("NetworkPolicy", "finetune-operator"),
        ("Pod", "finetune-operator-test-ready"),
        ("PodDisruptionBudget", "finetune-operator"),
        ("Role", "finetune-operator-leases"),
        ("RoleBinding", "finetune-operator-leases"),
        ("Service", "finetune-operator-metrics"),
        ("ServiceAccount", "finetune-operator"),
    }


def test_everything_off_leaves_the_deployment_its_service_and_the_test(helm: Helm) -> None:
    rendered = helm.template(MATRIX["everything off"])
    assert {kind for kind, _ in rendered.names} == {"Deployment", "Service", "Pod"}
    assert rendered.pod["serviceAccountName"] == "default"
    assert rendered.one("Deployment")["spec"]["strategy"] == {"type": "Recreate"}


def test_everything_on_adds_what_watches_and_shows(helm: Helm) -> None:
    rendered = helm.template(MATRIX["everything on"])
    assert {kind for kind, _ in rendered.names} >= {"ServiceMonitor", "PrometheusRule", "ConfigMap", "FineTuneRuntime"}
    (endpoint,) = rendered.one("ServiceMonitor")["spec"]["endpoints"]
    service = rendered.one("Service")
    assert endpoint["port"] in [port["name"] for port in service["spec"]["ports"]]
    selected = rendered.one("ServiceMonitor")["spec"]["selector"]["matchLabels"]
    assert service["metadata"]["labels"].items() >= selected.items()
    assert json.loads(rendered.one("ConfigMap")["data"]["finetune-operator.json"])["uid"] == "finetune-operator"
    assert rendered.container["image"] == f"ghcr.io/finetune-operator/operator:0.1.0@sha256:{'a' * 64}"


def test_alerts_are_about_this_release_and_say_what_to_do(helm: Helm) -> None:
    rendered = helm.template({"prometheusRule": {"enabled": True, "queueSeconds": 2.5, "forMinutes": 3}})
    rules = [rule for group in rendered.one("PrometheusRule")["spec"]["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules) >= 8
    for rule in rules:
        assert 'namespace="finetune-system",job="finetune-operator-metrics"' in rule["expr"]
        assert rule["annotations"].keys() == {"summary", "description"}
    slow = next(rule for rule in rules if rule["alert"] == "FineTuneOperatorQueueSlow")
    assert slow["expr"].endswith("> 2.5")
    assert slow["for"] == "3m"


def test_a_crd_in_the_chart_is_the_one_in_manifests(helm: Helm) -> None:
    rendered = helm.template()
    for file in sorted(CRDS.glob("*.yaml")):
        manifest = yaml.safe_load(file.read_text(encoding="utf-8"))
        crd = rendered.one("CustomResourceDefinition", manifest["metadata"]["name"])
        assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
        crd["metadata"].pop("labels")
        assert crd == manifest


def test_crds_can_be_left_out_and_need_not_be_kept(helm: Helm) -> None:
    assert not helm.template({"crds": {"enabled": False}}).of("CustomResourceDefinition")
    for crd in helm.template({"crds": {"keep": False}}).of("CustomResourceDefinition"):
        assert "annotations" not in crd["metadata"]


def test_replicas_stand_apart_and_one_stays_while_nodes_are_drained(helm: Helm) -> None:
    rendered = helm.template()
    assert rendered.one("Deployment")["spec"]["replicas"] == 2
    labels = rendered.one("Deployment")["spec"]["template"]["metadata"]["labels"].items()
    (term,) = rendered.pod["affinity"]["podAntiAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    (spread,) = rendered.pod["topologySpreadConstraints"]
    budget = rendered.one("PodDisruptionBudget")["spec"]
    for selector in (term["podAffinityTerm"]["labelSelector"], spread["labelSelector"], budget["selector"]):
        assert labels >= selector["matchLabels"].items()
    assert budget["minAvailable"] == 1


def test_a_single_replica_can_be_moved(helm: Helm) -> None:
    rendered = helm.template({"replicas": 1})
    assert not rendered.of("PodDisruptionBudget")
    assert not {"affinity", "topologySpreadConstraints"} & rendered.pod.keys()


def test_the_test_pod_is_not_one_of_the_operators(helm: Helm) -> None:
    rendered = helm.template()
    selector = rendered.one("Service")["spec"]["selector"].items()
    assert not rendered.one("Pod")["metadata"]["labels"].items() >= selector
    assert rendered.one("Deployment")["spec"]["template"]["metadata"]["labels"].items() >= selector


def test_the_test_pod_is_let_in_beside_those_who_may_ask_for_metrics(helm: Helm) -> None:
    prometheus = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    rendered = helm.template({"networkPolicy": {"metricsFrom": [prometheus]}})
    (allowed,) = rendered.one("NetworkPolicy")["spec"]["ingress"]
    first, second = allowed["from"]
    assert first == prometheus
    selected = second["podSelector"]["matchLabels"].items()
    assert rendered.one("Pod")["metadata"]["labels"].items() >= selected
    assert not rendered.one("Deployment")["spec"]["template"]["metadata"]["labels"].items() >= selected


def test_without_a_list_everybody_may_ask_for_metrics(helm: Helm) -> None:
    assert helm.template().one("NetworkPolicy")["spec"]["ingress"] == [{"ports": [{"port": "metrics"}]}]


def test_the_container_may_write_to_tmp_alone(helm: Helm) -> None:
    rendered = helm.template()
    assert rendered.container["securityContext"]["readOnlyRootFilesystem"] is True
    assert [mount["mountPath"] for mount in rendered.container["volumeMounts"]] == ["/tmp"]


def test_probes_ask_the_port_that_is_served(helm: Helm) -> None:
    container = helm.template().container
    (port,) = container["ports"]
    assert port == {"name": "metrics", "containerPort": 8080}
    asked = {name: container[name]["httpGet"] for name in ("livenessProbe", "readinessProbe")}
    assert asked == {
        "livenessProbe": {"path": "/healthz", "port": "metrics"},
        "readinessProbe": {"path": "/readyz", "port": "metrics"},
    }


def test_several_replicas_without_an_election_are_refused(helm: Helm) -> None:
    with pytest.raises(ToolFailed, match=r"replicas: 2 would all act at once .* set replicas to 1"):
        helm.template({"leaderElection": {"enabled": False}})


def test_helm_refuses_an_unknown_key_and_names_it(helm: Helm) -> None:
    with pytest.raises(ToolFailed, match="replica"):
        helm.template({"podDisruptionBudget": {"replica": 3}})


def test_the_default_runtime_is_one_that_the_operator_takes(helm: Helm) -> None:
    rendered = helm.template({"defaultRuntime": {"enabled": True, "name": "a100"}})
    document = rendered.one("FineTuneRuntime")
    document["metadata"] = {"name": document["metadata"]["name"]}
    assert FineTuneRuntime.model_validate(document).metadata.name == "a100"


@pytest.mark.parametrize("served", [False, True], ids=["kind unknown", "kind served"])
def test_nothing_deletes_a_runtime_and_every_way_of_making_it_says_whose_it_is(helm: Helm, served: bool) -> None:
    options = ("--api-versions", "finetune-operator.io/v1alpha1/FineTuneRuntime") if served else ()
    printed = helm.release("template", {"defaultRuntime": {"enabled": True}}, options=options)
    annotations = Rendered(tuple(yaml.safe_load_all(printed))).one("FineTuneRuntime")["metadata"]["annotations"]
    if served:
        assert annotations == {"helm.sh/resource-policy": "keep"}
    else:
        assert annotations["helm.sh/hook-delete-policy"] == "hook-failed"
        assert annotations["meta.helm.sh/release-name"] == RELEASE
        assert annotations["meta.helm.sh/release-namespace"] == NAMESPACE


@pytest.mark.parametrize(
    "values", [{}, {"defaultRuntime": {"enabled": True}}, {"watchNamespaces": ["team-a"]}], ids=str
)
def test_the_notes_end_with_a_job_that_is_valid(helm: Helm, values: dict[str, Any]) -> None:
    printed = helm.release("install", values, options=("--dry-run=client",))
    job = FineTuneJob.model_validate(yaml.safe_load(printed.split("<<JOB\n")[1].split("\nJOB\n")[0]))
    assert job.metadata.namespace == values.get("watchNamespaces", ["default"])[0]
    assert (job.spec.runtime_ref is not None) == ("defaultRuntime" in values)


@pytest.mark.parametrize("name", ["kuberay", "kueue"])
def test_a_dependency_that_was_not_fetched_is_asked_for(helm: Helm, name: str) -> None:
    with pytest.raises(ToolFailed, match=f"helm dependency build helm/finetune-operator/charts/{name}"):
        helm.template({name: {"enabled": True}})


@pytest.mark.parametrize(("name", "chart"), [("kuberay", "kuberay-operator"), ("kueue", "kueue")])
def test_a_dependency_that_was_fetched_gets_our_settings_and_theirs(
    helm: Helm, tmp_path: Path, name: str, chart: str
) -> None:
    copy = shutil.copytree(CHART, tmp_path / "finetune-operator")
    dependency = yaml.safe_load((copy / "charts" / name / "Chart.yaml").read_text())["dependencies"][0]
    fetched = copy / "charts" / name / "charts" / chart
    (fetched / "templates").mkdir(parents=True)
    (fetched / "Chart.yaml").write_text(f"{{apiVersion: v2, name: {chart}, version: {dependency['version']}}}")
    (fetched / "templates" / "values.yaml").write_text(
        "{apiVersion: v1, kind: ConfigMap, metadata: {name: got}, data: {values: {{ toJson .Values | quote }}}}"
    )
    assert "got" not in {name for _, name in helm.template(chart=copy).names}
    values = {name: {"enabled": True, chart: {"nodeSelector": {"pool": "system"}}}}
    got = json.loads(helm.template(values, chart=copy).one("ConfigMap", "got")["data"]["values"])
    assert got["nodeSelector"] == {"pool": "system"}
    if name == "kuberay":
        assert got["reconcileConcurrency"] >= 10
        (variable,) = got["env"]
        assert variable["name"] == "RAYJOB_STATUS_CHECK_TIMEOUT_SECONDS"
        assert int(variable["value"]) > 300
    else:
        configuration = yaml.safe_load(got["managerConfig"]["controllerManagerConfigYaml"])
        assert "ray.io/rayjob" in configuration["integrations"]["frameworks"]


def test_helm_finds_nothing_to_complain_about(helm: Helm) -> None:
    helm.tool("lint", CHART, "--strict", "--quiet")
