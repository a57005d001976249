"""Which volumes a job's pods mount, and where the run keeps its files."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.problems import InvalidManifest
from finetune_operator.planning import plan_run
from finetune_operator.resources.metadata import Owner
from finetune_operator.resources.storage import Mounts, Places, check_shared_files, mounts, places
from tests.factories import job, runtime

OWNER = Owner("example", "default", "uid-1")


def mounted(job_changes: dict[str, Any], runtime_changes: dict[str, Any] | None = None) -> Mounts:
    asked, pool = job(job_changes), runtime(runtime_changes or {})
    added = [asked.spec.cluster.pods, pool.spec.pods]
    return mounts(OWNER, plan_run(asked, pool), pool.spec, added, 1, "4096Mi")


def where(runtime_changes: dict[str, Any]) -> Places:
    pool = runtime(runtime_changes)
    return places(plan_run(job(), pool), pool.spec, 2)


def claims(found: Mounts) -> dict[str, str]:
    """Claims by where they are mounted."""
    by_name = {volume["name"]: volume for volume in found.volumes}
    return {
        mount["mountPath"]: by_name[mount["name"]]["persistentVolumeClaim"]["claimName"]
        for mount in found.volume_mounts
        if "persistentVolumeClaim" in by_name[mount["name"]]
    }


def paths(found: Mounts) -> list[str]:
    return [mount["mountPath"] for mount in found.volume_mounts]


@pytest.mark.parametrize(
    ("storage", "expected"),
    [
        pytest.param(
            "pvc://runs/jobs",
            Places("/mnt/pvc/runs/jobs/default/example/attempt-2", "/mnt/pvc/runs/jobs/.cache"),
            id="a claim",
        ),
        pytest.param("file:///nfs/", Places("/nfs/default/example/attempt-2", "/nfs/.cache"), id="a path of the image"),
        pytest.param(
            "s3://bucket/runs", Places("/var/finetune/run", "/var/finetune/.cache"), id="a bucket is no folder"
        ),
        pytest.param(None, Places("/var/finetune/run", "/var/finetune/.cache"), id="nothing that pods share"),
    ],
)
def test_a_run_keeps_its_files_below_the_runtimes_storage(storage: str | None, expected: Places) -> None:
    assert where({"storage": storage} if storage else {}) == expected


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"checkpoint": {}}, "spec.checkpoint"),
        ({"cluster.workers.replicas": 2}, "spec.cluster.workers.replicas"),
    ],
    ids=["checkpoints would go with the pods", "workers share files"],
)
def test_a_job_whose_pods_would_miss_each_others_files_is_refused(changes: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidManifest, match="every pod can mount, such as pvc://claim/path") as refused:
        check_shared_files(plan_run(job(changes), runtime()))
    assert [one.path for one in refused.value.problems] == [path]


@pytest.mark.parametrize(
    ("changes", "storage"),
    [
        ({"checkpoint": {}, "cluster.workers.replicas": 2}, "pvc://runs/jobs"),
        ({"checkpoint": {}, "cluster.workers.replicas": 2}, "gs://bucket/jobs"),
        ({"cluster.workers.gpus": 8}, None),
    ],
    ids=["a claim serves all", "a bucket keeps what must stay", "one worker without checkpoints"],
)
def test_a_job_whose_pods_have_what_they_need_is_not(changes: dict[str, Any], storage: str | None) -> None:
    check_shared_files(plan_run(job(changes), runtime({"storage": storage} if storage else {})))


def test_answers_that_ranks_write_together_need_a_disk_that_they_share() -> None:
    teacher = {"teacher": {"source": "hf://org/big"}, "teacherAnswers": {}, "packing": False}
    changes = {"method": {"distill": teacher}, "cluster.workers.replicas": 2}
    bucket = runtime({"storage": "s3://bucket/jobs"})
    with pytest.raises(InvalidManifest, match="the runtime's storage is a bucket; ask for one worker") as refused:
        check_shared_files(plan_run(job(changes), bucket))
    assert [one.path for one in refused.value.problems] == ["spec.method.distill.teacherAnswers"]
    check_shared_files(plan_run(job(changes | {"cluster.workers.replicas": 1}), bucket))
    check_shared_files(plan_run(job(changes), runtime({"storage": "pvc://runs"})))


def test_every_claim_that_the_plan_names_is_mounted_once() -> None:
    found = mounted(
        {
            "model": {"source": "pvc://models/base", "tokenizer": "pvc://models/tokenizer"},
            "data.train": [{"source": "pvc://data/a"}, {"source": "pvc://data/b"}],
            "data.eval": [{"source": "pvc://held-out/x.jsonl"}],
            "outputs": [{"to": "pvc://results/y"}],
        },
        {"storage": "pvc://runs"},
    )
    assert claims(found) == {f"/mnt/pvc/{name}": name for name in ("models", "data", "held-out", "results", "runs")}


def test_a_claim_that_only_a_planning_note_speaks_of_is_not_mounted() -> None:
    asked = job()
    plan = plan_run(asked)
    note = plan.decisions[0].model_copy(update={"value": "pvc://old/model"})
    found = mounts(OWNER, plan.model_copy(update={"decisions": [note]}), runtime().spec, [], 1, "1Gi")
    assert claims(found) == {}


def test_volumes_of_job_and_runtime_are_both_there_and_the_jobs_wins_at_one_path() -> None:
    found = mounted(
        {"cluster.pods.volumes": [{"mountPath": "/a", "claim": "mine"}, {"mountPath": "/c", "secret": "s"}]},
        {"pods.volumes": [{"mountPath": "/a/", "claim": "theirs"}, {"mountPath": "/b", "configMap": "m"}]},
    )
    assert claims(found) == {"/a": "mine"}
    assert {"/b", "/c"} <= set(paths(found))


def test_a_claim_mounted_twice_is_one_volume() -> None:
    found = mounted(
        {"model": {"source": "pvc://models/base"}, "cluster.pods.volumes": [{"mountPath": "/m", "claim": "models"}]}
    )
    assert claims(found) == {"/m": "models", "/mnt/pvc/models": "models"}
    assert sum("persistentVolumeClaim" in volume for volume in found.volumes) == 1


def test_a_persons_own_mount_of_a_claim_keeps_its_being_read_only() -> None:
    volume = {"mountPath": "/mnt/pvc/models", "claim": "models", "readOnly": True}
    found = mounted({"model": {"source": "pvc://models/base"}, "cluster.pods.volumes": [volume]})
    [mount] = [mount for mount in found.volume_mounts if mount["mountPath"] == "/mnt/pvc/models"]
    assert mount["readOnly"] is True


@pytest.mark.parametrize("path", ["/etc/finetune", "/var/finetune/", "/var/run/secrets/kubernetes.io/serviceaccount"])
def test_nothing_takes_the_place_of_plan_scratch_and_token(path: str) -> None:
    found = mounted({"cluster.pods.volumes": [{"mountPath": path, "claim": "mine"}]})
    assert "mine" not in claims(found).values()


def test_no_two_mounts_have_one_path_and_no_two_volumes_one_name() -> None:
    found = mounted(
        {
            "model": {"source": "pvc://models/base"},
            "cluster.pods.volumes": [{"mountPath": "/dev/shm", "claim": "c"}, {"mountPath": "/x", "secret": "s"}],
        },
        {"storage": "pvc://models/x", "pods.volumes": [{"mountPath": "/x", "configMap": "m"}]},
    )
    assert len(set(paths(found))) == len(paths(found))
    names = [volume["name"] for volume in found.volumes]
    assert len(set(names)) == len(names)
    assert {mount["name"] for mount in found.volume_mounts} == set(names)


def test_shared_memory_is_memory_of_a_bounded_size() -> None:
    [shared] = [volume for volume in mounted({}).volumes if volume["name"] == "shared-memory"]
    assert shared["emptyDir"] == {"medium": "Memory", "sizeLimit": "4096Mi"}


def test_what_is_temporary_lies_apart_from_what_the_run_keeps_unless_a_person_mounts_something_there() -> None:
    plain = {mount["mountPath"]: mount["name"] for mount in mounted({}).volume_mounts}
    assert plain["/tmp"] != plain["/var/finetune"]
    assert claims(mounted({"cluster.pods.volumes": [{"mountPath": "/tmp", "claim": "large"}]}))["/tmp"] == "large"


def test_the_token_is_renewed_and_comes_with_the_authority_to_know_the_server_by() -> None:
    [token] = [volume for volume in mounted({}).volumes if volume["name"] == "token"]
    given, authority = token["projected"]["sources"]
    assert given["serviceAccountToken"] == {"path": "token", "expirationSeconds": 3600}
    assert authority["configMap"]["name"] == "kube-root-ca.crt"
