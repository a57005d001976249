"""The RayJob of an attempt: what KubeRay, the kubelet and the trainers are told."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from finetune_operator import names
from finetune_operator.names import SCRATCH
from finetune_operator.planning import plan_run
from finetune_operator.resources.metadata import Document, Owner
from finetune_operator.resources.pods import DRAIN_SECONDS
from finetune_operator.resources.rayjob import build_rayjob
from finetune_operator.settings import Settings
from tests.factories import job, runtime

SETTINGS = Settings(trainer_image="trainer:1", ray_version="2.60.0", pod_name="operator-0")
OWNER = Owner("example", "default", "uid-1")


def built(
    job_changes: dict[str, Any] | None = None,
    runtime_changes: dict[str, Any] | None = None,
    attempt: int = 1,
) -> Document:
    asked, pool = job(job_changes or {}), runtime(runtime_changes or {})
    return build_rayjob(OWNER, asked, plan_run(asked, pool), pool.spec, attempt, SETTINGS)


def head(ray_job: Document) -> Any:
    return ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]


def workers(ray_job: Document) -> Any:
    [group] = ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return group


def templates(ray_job: Document) -> list[Any]:
    return [group["template"] for group in (head(ray_job), workers(ray_job))]


def container(template: Any) -> Any:
    [only] = template["spec"]["containers"]
    return only


def env(template: Any) -> dict[str, Any]:
    listed = container(template)["env"]
    values = {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in listed}
    assert len(values) == len(listed), "a variable is set twice"
    return values


def test_all_workers_are_asked_for_and_the_least_is_said() -> None:
    elastic = {"cluster.workers": {"replicas": 4, "minReplicas": 2}, "checkpoint": {}, "training.globalBatchSize": 8}
    fixed = elastic | {"cluster.workers": {"replicas": 4}}
    for changes, numbers in ((elastic, (4, 2, 4)), (fixed, (4, 4, 4))):
        group = workers(built(changes))
        assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == numbers


def test_it_is_the_jobs_own_child_named_by_its_attempt() -> None:
    metadata = built(attempt=3)["metadata"]
    assert (metadata["name"], metadata["namespace"]) == ("example-3", "default")
    assert metadata["ownerReferences"] == [
        {
            "apiVersion": "finetune-operator.io/v1alpha1",
            "kind": "FineTuneJob",
            "name": "example",
            "uid": "uid-1",
            "controller": True,
            "blockOwnerDeletion": True,
        }
    ]
    assert metadata["labels"] == names.attempt_labels("example", 3)


def test_kuberay_submits_once_and_neither_retries_nor_sets_deadlines() -> None:
    spec = built({"lifecycle.keepFailedClusterSeconds": 600})["spec"]
    assert spec["submissionMode"] == "HTTPMode"
    assert spec["backoffLimit"] == 0
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] == 600
    assert not {"activeDeadlineSeconds", "preRunningDeadlineSeconds", "suspend", "jobId"} & spec.keys()


def test_a_head_that_is_lost_is_not_replaced_behind_the_operators_back() -> None:
    assert built()["metadata"]["annotations"] == {"ray.io/disable-provisioned-head-restart": "true"}


def test_the_entrypoint_trains_by_the_mounted_plan_in_the_attempts_folder() -> None:
    ray_job = built(runtime_changes={"storage": "pvc://runs"}, attempt=2)
    assert ray_job["spec"]["entrypoint"] == (
        'exec python -m finetune_trainers run --plan /etc/finetune/plan.json --workdir "$FINETUNE_WORKDIR"'
    )
    for template in templates(ray_job):
        assert env(template)["FINETUNE_WORKDIR"] == "/mnt/pvc/runs/default/example/attempt-2"
        [plan] = [volume for volume in template["spec"]["volumes"] if volume["name"] == "plan"]
        assert plan["configMap"]["name"] == "example-2-plan"
        assert {"name": "plan", "mountPath": "/etc/finetune", "readOnly": True} in container(template)["volumeMounts"]


def test_nothing_trains_on_the_head() -> None:
    params = head(built(runtime_changes={"workers.gpus": 8}))["rayStartParams"]
    assert (params["num-cpus"], params["num-gpus"]) == ("0", "0")


def test_the_workers_are_as_many_as_planned_and_stay_so() -> None:
    group = workers(built({"cluster.workers": {"replicas": 4}}))
    assert [group[key] for key in ("replicas", "minReplicas", "maxReplicas")] == [4, 4, 4]


def test_gpus_are_asked_for_under_the_pools_name_and_told_to_ray() -> None:
    group = workers(built(runtime_changes={"workers.gpus": 2, "gpuResource": "example.com/accelerator"}))
    assert container(group["template"])["resources"]["limits"]["example.com/accelerator"] == "2"
    assert group["rayStartParams"]["num-gpus"] == "2"


def test_workers_without_gpus_say_nothing_of_gpus() -> None:
    assert "num-gpus" not in workers(built())["rayStartParams"]


@pytest.mark.parametrize(
    ("job_changes", "runtime_changes", "image", "version"),
    [
        ({}, {}, "trainer:1", "2.60.0"),
        ({}, {"image": "pool:2", "rayVersion": "2.55.0"}, "pool:2", "2.55.0"),
        ({"cluster": {"image": "mine:3", "rayVersion": "2.54.1"}}, {"image": "pool:2"}, "mine:3", "2.54.1"),
    ],
    ids=["the operator's", "the pool's", "the job's own"],
)
def test_the_image_and_its_ray_are_the_jobs_or_its_pools_or_the_operators(
    job_changes: dict[str, Any], runtime_changes: dict[str, Any], image: str, version: str
) -> None:
    ray_job = built(job_changes, runtime_changes)
    assert {container(template)["image"] for template in templates(ray_job)} == {image}
    assert ray_job["spec"]["rayClusterSpec"]["rayVersion"] == version


@pytest.mark.parametrize(
    ("asked", "version", "options", "mode"),
    [
        (True, "2.60.0", {"mode": "token"}, None),
        (True, "2.52.0", {"mode": "token"}, None),
        (True, "2.51.9", None, None),
        (False, "2.60.0", None, "disabled"),
        (False, "2.9.0", None, None),
    ],
    ids=["asked for", "the first that can", "too old to ask", "not wanted, and said so", "too old to be told"],
)
def test_ray_asks_for_a_token_where_it_can_and_should(
    asked: bool, version: str, options: dict[str, str] | None, mode: str | None
) -> None:
    ray_job = built(runtime_changes={"rayTokenAuth": asked, "rayVersion": version})
    assert ray_job["spec"]["rayClusterSpec"].get("authOptions") == options
    assert env(head(ray_job)["template"]).get("RAY_AUTH_MODE") == mode


def test_every_pod_keeps_to_the_restricted_level() -> None:
    for template in templates(built()):
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container(template)["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert {"/tmp", SCRATCH} <= {mount["mountPath"] for mount in container(template)["volumeMounts"]}
        kinds = {key for volume in template["spec"]["volumes"] for key in volume if key != "name"}
        assert kinds <= {"configMap", "emptyDir", "persistentVolumeClaim", "projected", "secret"}


@pytest.mark.parametrize("level", ["job", "runtime"])
def test_an_image_that_writes_into_itself_may_where_job_or_runtime_say_so(level: str) -> None:
    said = {"pods": {"writableRoot": True}}
    ray_job = built({"cluster": said}) if level == "job" else built(runtime_changes=said)
    for template in templates(ray_job):
        assert container(template)["securityContext"]["readOnlyRootFilesystem"] is False


def test_no_container_gets_a_token_but_the_one_that_reports() -> None:
    for template in templates(built()):
        assert template["spec"]["automountServiceAccountToken"] is False
        assert template["spec"]["serviceAccountName"] == "example-trainer"
        assert "token" in {mount["name"] for mount in container(template)["volumeMounts"]}


def test_a_pod_has_longer_to_end_than_the_trainers_have_to_drain() -> None:
    for template in templates(built()):
        assert template["spec"]["terminationGracePeriodSeconds"] > DRAIN_SECONDS
        assert env(template)["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] == str(DRAIN_SECONDS)
        assert env(template)["RAY_JOB_STOP_WAIT_TIME_S"] == str(DRAIN_SECONDS)


def test_a_container_is_not_started_again_in_a_group_that_has_failed() -> None:
    assert {template["spec"]["restartPolicy"] for template in templates(built())} == {"Never"}


def test_the_trainers_know_who_they_are() -> None:
    told = env(workers(built(attempt=5))["template"])
    ours = {name: value for name, value in told.items() if name.startswith("FINETUNE_")}
    assert ours == {
        "FINETUNE_JOB": "example",
        "FINETUNE_NAMESPACE": "default",
        "FINETUNE_ATTEMPT": "5",
        "FINETUNE_PROGRESS_CONFIGMAP": "example-progress",
        "FINETUNE_PVC_ROOT": "/mnt/pvc",
        "FINETUNE_WORKDIR": "/var/finetune/run",
        "FINETUNE_CACHE": "/var/finetune/.cache",
        "FINETUNE_RAY_VERSION": "2.60.0",
    }


def test_threads_are_the_cores_shared_by_the_processes_of_a_pod() -> None:
    group = workers(built(runtime_changes={"workers": {"gpus": 8, "cpus": 96}}))
    assert env(group["template"])["OMP_NUM_THREADS"] == "12"


def test_nccl_speaks_up_where_there_is_nccl() -> None:
    assert env(workers(built(runtime_changes={"workers.gpus": 8}))["template"])["NCCL_DEBUG"] == "WARN"
    assert "NCCL_DEBUG" not in env(workers(built())["template"])


def test_the_jobs_variables_come_over_its_pools_and_those_over_our_defaults() -> None:
    ray_job = built(
        {"cluster.pods.env": [{"name": "A", "value": "job"}, {"name": "S", "secret": {"name": "s", "key": "k"}}]},
        {
            "workers.gpus": 8,
            "pods.env": [
                {"name": "A", "value": "pool"},
                {"name": "NCCL_DEBUG", "value": "INFO"},
                {"name": "M", "configMap": {"name": "m", "key": "k"}},
            ],
        },
    )
    for template in templates(ray_job):
        told = env(template)
        assert (told["A"], told["NCCL_DEBUG"]) == ("job", "INFO")
        assert told["S"] == {"secretKeyRef": {"name": "s", "key": "k"}}
        assert told["M"] == {"configMapKeyRef": {"name": "m", "key": "k"}}


def test_the_secret_of_the_storage_is_named_to_every_pod_and_not_read() -> None:
    made = built({}, {"storage": "s3://bucket/jobs", "storageSecret": "bucket-keys"})
    for template in templates(made):
        assert container(template)["envFrom"] == [{"secretRef": {"name": "bucket-keys"}}]
        assert not [volume for volume in template["spec"]["volumes"] if "persistentVolumeClaim" in volume]
    assert all("envFrom" not in container(template) for template in templates(built()))


def test_labels_of_job_and_pool_are_merged_and_ours_win() -> None:
    ray_job = built(
        {"cluster.pods.labels": {"a": "job", names.JOB_LABEL: "other"}, "cluster.pods.annotations": {"x": "job"}},
        {"pods.labels": {"a": "pool", "b": "pool"}, "pods.annotations": {"x": "pool", "y": "pool"}},
    )
    metadata = workers(ray_job)["template"]["metadata"]
    assert metadata["labels"] == {"a": "job", "b": "pool"} | names.pod_labels("example", 1, names.WORKER)
    assert metadata["annotations"] == {"x": "job", "y": "pool"}
    assert head(ray_job)["template"]["metadata"]["labels"][names.ROLE_LABEL] == names.HEAD


def test_selectors_are_merged_and_lists_appended_without_doubles() -> None:
    tolerated = {"key": "gpu", "operator": "Exists"}
    ray_job = built(
        {
            "cluster.pods": {
                "nodeSelector": {"disk": "ssd"},
                "tolerations": [tolerated, {"key": "spot", "value": "yes"}],
                "imagePullSecrets": ["mine"],
            }
        },
        {"pods": {"nodeSelector": {"gpu": "a100"}, "tolerations": [tolerated], "imagePullSecrets": ["pool"]}},
    )
    for template in templates(ray_job):
        spec = template["spec"]
        assert spec["nodeSelector"] == {"gpu": "a100", "disk": "ssd"}
        assert spec["tolerations"] == [tolerated, {"key": "spot", "operator": "Equal", "value": "yes"}]
        assert spec["imagePullSecrets"] == [{"name": "pool"}, {"name": "mine"}]


def test_under_kueue_it_is_created_suspended_with_the_queue_on_it() -> None:
    ray_job = built({"scheduling": {"queue": "research", "priorityClass": "low"}})
    assert ray_job["spec"]["suspend"] is True
    assert ray_job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "research"
    assert "priorityClassName" not in head(ray_job)["template"]["spec"]


def test_only_workers_have_a_place_in_the_topology() -> None:
    ray_job = built({"scheduling.topology": {"mode": "spread"}})
    assert "topologySpreadConstraints" in workers(ray_job)["template"]["spec"]
    assert "topologySpreadConstraints" not in head(ray_job)["template"]["spec"]


def test_the_same_job_gives_the_same_rayjob_and_no_part_of_it_is_shared() -> None:
    changes = {"cluster.pods.tolerations": [{"key": "a", "operator": "Exists"}], "model": {"source": "pvc://m/x"}}
    first, second = built(changes), built(changes)
    assert first == second
    untouched = copy.deepcopy(workers(first))
    head(first)["template"]["spec"]["tolerations"].clear()
    container(head(first)["template"])["env"].clear()
    assert workers(first) == untouched


def test_the_longest_name_is_one_that_kuberay_takes() -> None:
    long_named = job(name="a" * 40)
    owner = Owner("a" * 40, "default", "u")
    ray_job = build_rayjob(owner, long_named, plan_run(long_named), runtime().spec, 999_999, SETTINGS)
    assert len(ray_job["metadata"]["name"]) == names.RAY_JOB_NAME_LENGTH
