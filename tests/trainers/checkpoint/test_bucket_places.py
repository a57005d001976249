"""What a job says of buckets meets a real S3 server: places that cannot be written to, uploads, and what is fetched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FailureClass
from finetune_api.plan import RunPlan
from finetune_api.progress import Artifact
from finetune_trainers.artifact_folder import DIGESTS, new_folder, seal
from finetune_trainers.buckets import fetch_artifact
from finetune_trainers.checkpoint.exports.destination import UNFINISHED, Destination
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.errors import StorageError, TrainerError, UserError
from finetune_trainers.outputs import check_buckets, check_outputs, publish
from finetune_trainers.prepared import PreparedModel
from tests.cluster.s3 import S3, s3_server
from tests.trainers.factories import tiny_plan

pytestmark = pytest.mark.control_plane

MODEL = PreparedModel(
    folder="/nowhere",
    tokenizer_folder="/nowhere",
    chat_template=None,
    num_parameters=1,
    vocabulary_size=1,
    max_positions=None,
    digest="d",
)


@pytest.fixture
def read_only(versitygw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """A server that takes nothing."""
    with monkeypatch.context() as patched:
        patched.setenv("VGW_READ_ONLY", "true")
        (tmp_path / "server").mkdir()
        with s3_server(versitygw, tmp_path / "server") as started:
            for name, value in started.environment().items():
                monkeypatch.setenv(name, value)
            yield started


def planned(storage: str | None = None, name: str = "example", outputs: tuple[str, ...] = ()) -> RunPlan:
    plan = tiny_plan(Path("/model"), Path("/rows"), {"outputs": [{"to": to} for to in outputs]})
    return plan.model_copy(update={"storage": storage, "name": name})


@pytest.fixture
def written(tmp_path: Path) -> Artifact:
    """An artifact in a run's folder; one of its files is in a folder of its own."""
    folder = tmp_path / "run" / "artifact"
    with new_folder(folder) as unfinished:
        (unfinished / "model.safetensors").write_bytes(bytes(range(256)) * 500)
        (unfinished / "more").mkdir()
        (unfinished / "more" / "config.json").write_text("{}")
        return seal(unfinished, folder, "model", {"source": "hf://org/name"})


def refused(plan: RunPlan) -> TrainerError:
    with pytest.raises(TrainerError) as caught:
        check_buckets(plan)
    return caught.value


def test_a_bucket_that_is_not_there_is_named_with_its_field(server: S3) -> None:
    error = refused(planned("s3://no-such-bucket/runs"))
    [problem] = error.problems
    assert error.failure_class is FailureClass.USER_ERROR
    assert (problem.path, problem.value) == ("FineTuneRuntime.spec.storage", "s3://no-such-bucket/runs")
    assert "there is no such bucket; make it, or correct the name" in problem.message


@pytest.mark.parametrize(
    "wrong", [{"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, {"AWS_ACCESS_KEY_ID": "nobody"}], ids=["secret", "user"]
)
def test_wrong_keys_are_told_without_being_shown(
    wrong: dict[str, str], server: S3, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    error = refused(planned(outputs=(f"s3://{server.bucket()}/model",)))
    [problem] = error.problems
    assert problem.path == "spec.outputs[0].to"
    assert "cannot be written to with the keys at hand" in problem.message
    assert "the runtime's storageSecret" in problem.message
    assert not any(secret in str(error) for secret in ("not-the-secret", server.secret_key))


def test_no_keys_at_all_are_told_as_that(server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")  # of a cloud, where there is one
    error = refused(planned(f"s3://{server.bucket()}/runs"))
    assert error.failure_class is FailureClass.USER_ERROR
    assert "there are no keys to it; in a cluster name a Secret by the runtime's storageSecret" in str(error)


def test_a_store_that_takes_nothing_is_found_before_training(read_only: S3) -> None:
    error = refused(planned(f"s3://{read_only.bucket()}/runs"))
    assert error.failure_class is FailureClass.USER_ERROR
    assert "cannot be written to with the keys at hand" in str(error)


def test_a_store_that_does_not_answer_is_worth_another_attempt(server: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    error = refused(planned("s3://bucket/runs"))
    assert error.failure_class is FailureClass.STORAGE_ERROR
    assert "FineTuneRuntime.spec.storage: s3://bucket/runs cannot be written to now" in error.message


def test_trying_a_bucket_leaves_nothing_there(server: S3) -> None:
    bucket = server.bucket()
    check_buckets(planned(f"s3://{bucket}/runs", outputs=(f"s3://{bucket}/model",)))
    assert list(open_storage(f"s3://{bucket}", exclusive=True).list("")) == []


def test_one_place_for_two_outputs_is_refused() -> None:
    with pytest.raises(UserError, match="is named twice"):
        check_outputs(planned(outputs=("s3://bucket/model", "s3://bucket/model/")))


def test_an_output_in_a_bucket_is_the_artifact_file_by_file(server: S3, written: Artifact, tmp_path: Path) -> None:
    to, told = f"s3://{server.bucket()}/models/mine", list[str]()
    artifacts = publish(planned(outputs=(to,)), MODEL, written, told.append)
    assert artifacts == [written, written.model_copy(update={"uri": to})]
    assert told == [to]
    fetched = fetch_artifact(to, "spec.model.source")
    assert fetched.is_relative_to(tmp_path / "cache")
    files = {str(path.relative_to(fetched)): path.read_bytes() for path in fetched.rglob("*") if path.is_file()}
    source = tmp_path / "run" / "artifact"
    assert files == {name: (source / name).read_bytes() for name in files}
    assert set(files) == {"model.safetensors", "more/config.json", DIGESTS}
    assert fetch_artifact(to, "spec.model.source") == fetched


def test_what_another_job_has_written_is_not_written_over(server: S3, written: Artifact) -> None:
    to = f"s3://{server.bucket()}/models/mine"
    publish(planned(outputs=(to,)), MODEL, written)
    error = refused(planned(outputs=(to,)))
    assert error.problems[0].path == "spec.outputs[0].to"
    assert "holds something already; name a place that is empty" in str(error)
    with pytest.raises(UserError, match="holds something already"):
        publish(planned(outputs=(to,)), MODEL, written)


def test_what_a_dead_attempt_left_is_no_artifact_and_gives_way_to_its_own_job_alone(
    server: S3, written: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    to = f"s3://{server.bucket()}/models/mine"

    def dies(self: Destination, *_: Any) -> Artifact:
        raise StorageError("the pod is gone")

    with monkeypatch.context() as patched:
        patched.setattr(Destination, "seal", dies)
        with pytest.raises(StorageError, match="the pod is gone"):
            publish(planned(outputs=(to,)), MODEL, written)
    with pytest.raises(UserError, match=f"has no {DIGESTS}, so nothing tells whether it is whole"):
        fetch_artifact(to, "spec.model.source")
    assert "holds something already" in str(refused(planned(outputs=(to,), name="another")))
    check_buckets(planned(outputs=(to,)))
    assert publish(planned(outputs=(to,)), MODEL, written)[1].digest == written.digest
    assert UNFINISHED not in {stored.name for stored in open_storage(to, exclusive=True).list("")}


def test_where_the_storage_is_a_bucket_the_artifact_goes_there_beside_what_was_there(
    server: S3, written: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_ATTEMPT", "3")
    storage = f"s3://{server.bucket()}/runs/default/example"
    places = [f"{storage}/attempt-3/artifact", f"{storage}/attempt-3/artifact-2"]
    for place in places:
        assert [one.uri for one in publish(planned(storage), MODEL, written)] == [place]
    assert [fetch_artifact(place, "f").name for place in places] == [written.digest] * 2


def test_an_output_that_takes_the_artifact_as_it_is_spares_the_storage_a_copy(
    server: S3, written: Artifact, tmp_path: Path
) -> None:
    storage = f"s3://{server.bucket()}/runs/default/example"
    published = publish(planned(storage, outputs=(f"file://{tmp_path}/copy",)), MODEL, written)
    assert [one.uri for one in published] == [f"file://{tmp_path}/copy"]
    assert list(open_storage(storage, exclusive=True).list("")) == []


def test_a_file_that_has_changed_in_the_bucket_is_not_taken(server: S3, written: Artifact) -> None:
    bucket = server.bucket()
    to = f"s3://{bucket}/mine"
    publish(planned(outputs=(to,)), MODEL, written)
    (server.folder / bucket / "mine" / "more" / "config.json").write_text("[]")
    with pytest.raises(StorageError, match=r"more/config\.json is not what digests\.json says"):
        fetch_artifact(to, "spec.model.source")


def test_a_list_that_names_files_elsewhere_is_refused(server: S3) -> None:
    to = f"s3://{server.bucket()}/mine"
    listed = '{"kind": "model", "base": {}, "files": {"../../escaped": {"blake3": "00", "bytes": 1}}}'
    open_storage(to, exclusive=True).create(DIGESTS, listed.encode())
    with pytest.raises(UserError, match=r"names '\.\./\.\./escaped'"):
        fetch_artifact(to, "spec.model.source")


def test_an_empty_place_is_no_model(server: S3) -> None:
    with pytest.raises(UserError, match="nothing is there; correct the place") as caught:
        fetch_artifact(f"s3://{server.bucket()}/mine", "spec.model.source")
    assert caught.value.problems[0].path == "spec.model.source"
