"""What the client makes of an API server's refusals, and of the files that say where the server is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.job import FineTuneJob
from finetune_api.problems import InvalidManifest
from finetune_client.backends.kubeconfig import place_of
from finetune_client.backends.refusals import error_for
from finetune_client.documents import document_of, handed_over
from finetune_client.errors import ClientError, NoSuchJob, NotAllowed, NotInstalled, Refused, Unreachable
from finetune_operator.errors import ClusterError, api_error
from finetune_operator.errors import Unreachable as NoAnswer
from finetune_operator.kinds import Key
from tests.factories import job_document

KEY = Key("team-a", "tiny")


def explained(error: ClusterError) -> Exception:
    return error_for(error, "https://host", KEY, "create FineTuneJobs")


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (NoAnswer("refused"), Unreachable, "https://host does not answer: refused"),
        (api_error(401, "Unauthorized", "who are you"), NotAllowed, "does not know who you are"),
        (api_error(403, "Forbidden", "no"), NotAllowed, "you may not create FineTuneJobs in namespace team-a"),
        (api_error(403, "Forbidden", "namespace is being terminated"), Refused, "being terminated"),
        (api_error(404, "NotFound", 'finetunejobs "tiny" not found'), NoSuchJob, "no job tiny in namespace team-a"),
        (api_error(404, "NotFound", 'namespaces "team-a" not found'), Refused, "there is no namespace team-a"),
        (api_error(404, "NotFound", "the server could not find it"), NotInstalled, "helm install finetune-operator"),
        (api_error(500, "InternalError", "etcd is sad"), Refused, "would not create FineTuneJobs: etcd is sad"),
    ],
)
def test_a_refusal_says_what_it_means_for_the_job(error: ClusterError, kind: type[ClientError], said: str) -> None:
    found = explained(error)
    assert type(found) is kind
    assert said in str(found)


def problems(error: ClusterError) -> list[tuple[str | None, str | None, str]]:
    found = explained(error)
    assert isinstance(found, InvalidManifest)
    return [(one.path, one.value, one.message) for one in found.problems]


def test_each_cause_of_a_refused_object_is_a_problem_with_its_field_and_value() -> None:
    error = api_error(422, "Invalid", "the object is invalid")
    error.causes = [
        ("spec.training.seed", "Invalid value: -1: spec.training.seed in body should be greater than or equal to 0"),
        ("spec.method", 'Invalid value: "object": set exactly one of: sft, dpo'),
        ("spec.model", "Required value"),
    ]
    assert problems(error) == [
        ("spec.training.seed", "-1", "should be greater than or equal to 0"),
        ("spec.method", None, "set exactly one of: sft, dpo"),
        ("spec.model", None, "Required value"),
    ]


def test_fields_that_the_server_does_not_know_are_a_matter_of_its_age() -> None:
    message = 'strict decoding error: unknown field "spec.a", unknown field "spec.b", unknown field "spec.a"'
    found = problems(api_error(400, "BadRequest", message))
    assert [path for path, _, _ in found] == ["spec.a", "spec.b"]
    assert all("older than yours" in said for _, _, said in found)


def kubeconfig(file: Path, current: str | None, **namespaces: str) -> Path:
    contexts = [{"name": name, "context": {"namespace": namespace}} for name, namespace in namespaces.items()]
    document: dict[str, Any] = {"contexts": contexts} | ({"current-context": current} if current else {})
    file.write_text(yaml.safe_dump(document))
    return file


def test_the_namespace_is_the_contexts(tmp_path: Path) -> None:
    file = kubeconfig(tmp_path / "config", "one", one="team-a", two="team-b")
    assert place_of(file, None) == ("one", "team-a")
    assert place_of(file, "two") == ("two", "team-b")
    with pytest.raises(Unreachable, match="has no context called three; choose one with --context: one, two"):
        place_of(file, "three")


def test_of_several_files_the_first_that_says_something_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kubeconfig(tmp_path / "first", None, one="team-a")
    second = kubeconfig(tmp_path / "second", "one", one="team-b", two="team-c")
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'absent'}:{first}:{second}")
    assert place_of(None, None) == ("one", "team-a")
    assert place_of(None, "two") == ("two", "team-c")


def test_a_job_that_came_from_a_cluster_can_be_submitted_again() -> None:
    document = job_document(name="tiny")
    document["metadata"] |= {"uid": "1", "resourceVersion": "2", "generation": 3, "labels": {"team": "a"}}
    [job] = handed_over({**document, "status": {"phase": "Failed"}}).jobs
    assert document_of(job)["metadata"] == {"name": "tiny", "labels": {"team": "a"}}
    assert "status" not in document_of(job)


def test_a_file_beside_a_job_without_a_manifest_is_looked_for_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = job_document({"data": {"train": [{"source": "file://./rows.jsonl"}]}})
    for given in (document, FineTuneJob.model_validate(document)):
        [job] = handed_over(given).jobs
        assert job.spec.data.train[0].source == f"file://{tmp_path}/rows.jsonl"


def test_jobs_handed_over_together_are_refused_where_ones_model_will_not_do_for_another(tmp_path: Path) -> None:
    judge = {"ppo": {"rewards": [{"model": {"source": "job://first"}}]}}
    documents = [job_document(name="first"), job_document({"method": judge}, name="second")]
    file = tmp_path / "jobs.yaml"
    file.write_text(yaml.safe_dump_all(documents))
    with pytest.raises(InvalidManifest) as refused:
        handed_over(file)
    [problem] = refused.value.problems
    assert (problem.file, problem.path) == (str(file), "spec.method.ppo.rewards[0].model.source")
    assert "whose model gives no scores" in problem.message
