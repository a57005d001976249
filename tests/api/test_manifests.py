"""Files are read strictly: what kubectl would refuse or misread is refused with its file, line and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.failures import Problem
from finetune_api.manifests import collect_manifests, load_manifests, read_documents
from finetune_api.problems import InvalidManifest
from tests.factories import job_document, runtime_document

SMALL_JOB = """\
apiVersion: finetune-operator.io/v1alpha1
kind: FineTuneJob
metadata: {name: small}
spec:
  model: {source: hf://org/model}
  data:
    train: [{source: "file:///data/train.jsonl"}]
  method: {sft: {}}
  tuning: {lora: {}}
  training: {epochs: 1, learningRate: 2e-4}
"""


def refused(read: Callable[..., object], *arguments: object) -> list[Problem]:
    """The problems of a manifest that must not be accepted."""
    with pytest.raises(InvalidManifest) as caught:
        read(*arguments)
    return caught.value.problems


def written(folder: Path, text: str, name: str = "job.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_a_manifest_is_read_with_its_file(tmp_path: Path) -> None:
    found = load_manifests(written(tmp_path, SMALL_JOB))
    assert [(loaded.file, loaded.job.metadata.name) for loaded in found.jobs] == [(str(tmp_path / "job.yaml"), "small")]
    assert found.jobs[0].job.spec.training.learning_rate == 2e-4


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-4", 2e-4),
        ("2E-4", 2e-4),
        ("1e3", 1000.0),
        ("-5e+2", -500.0),
        ("2.e-4", 2e-4),
        ("2.0e-4", 2e-4),
        ("0.0002", 2e-4),
        ("'2e-4'", "2e-4"),
        ("e4", "e4"),
        ("2e", "2e"),
        ("0x1e4", 0x1E4),
    ],
)
def test_numbers_are_those_that_kubernetes_reads(text: str, value: object) -> None:
    assert read_documents(f"a: {text}", "f") == [{"a": value}]
    assert type(read_documents(f"a: {text}", "f")[0]["a"]) is type(value)


@pytest.mark.parametrize("text", ["2025-06-01", "2025-06-01T12:00:00Z", "2025-06-01 12:00:00"])
def test_dates_stay_text(text: str) -> None:
    assert read_documents(f"revision: {text}", "f") == [{"revision": text}]


def test_a_date_as_a_revision_is_taken_as_it_is_written(tmp_path: Path) -> None:
    text = SMALL_JOB.replace("hf://org/model}", "hf://org/model, revision: 2025-06-01}")
    assert load_manifests(written(tmp_path, text)).jobs[0].job.spec.model.revision == "2025-06-01"


def test_a_key_that_stands_twice_is_refused_with_the_line_of_the_second(tmp_path: Path) -> None:
    text = SMALL_JOB + "  tuning: {full: {}}\n"
    (problem,) = refused(load_manifests, written(tmp_path, text))
    assert problem.file == f"{tmp_path / 'job.yaml'}:11"
    assert problem.message == "is not valid YAML: the key 'tuning' stands twice; remove one"


def test_a_key_that_stands_twice_in_a_nested_mapping_is_refused(tmp_path: Path) -> None:
    (problem,) = refused(read_documents, "a:\n  b: {c: 1,\n      c: 2}\n", "f.yaml")
    assert str(problem) == "f.yaml:3: is not valid YAML: the key 'c' stands twice; remove one"


@pytest.mark.parametrize(("key", "shown"), [("1", "1"), ("yes", "True"), ("null", "None"), ("1.5", "1.5")])
def test_a_key_that_is_not_text_is_refused(key: str, shown: str) -> None:
    (problem,) = refused(read_documents, f"a:\n  {key}: x\n", "f.yaml")
    assert str(problem) == f"f.yaml:2: is not valid YAML: the key {shown} is not text; put it in quotes"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1, 2\n", 2),
        ("a: 1\n b: 2\n", 2),
        ("a: 1\n\tb: 2\n", 2),
        ("a: 'open\n", 2),
        ("a: *nowhere\n", 1),
        ("a: 1\n---\nb: }\n", 3),
        ("a: !!python/object:os.system {}\n", 1),
        ("? [a, b]\n: 1\n", 1),
    ],
)
def test_broken_yaml_is_refused_with_its_line(text: str, line: int) -> None:
    (problem,) = refused(read_documents, text, "f.yaml")
    assert problem.file == f"f.yaml:{line}"
    assert problem.message.startswith("is not valid YAML: ")


def test_a_character_that_yaml_does_not_know_is_refused() -> None:
    (problem,) = refused(read_documents, "a: \x07\n", "f.yaml")
    assert problem.message.startswith("is not valid YAML: ")


def test_a_merge_key_repeats_a_block_and_yields_to_the_keys_beside_it() -> None:
    text = "base: &b {x: 1, y: 2}\nmore: {<<: *b, y: 3}\n"
    assert read_documents(text, "f")[0]["more"] == {"x": 1, "y": 3}


def test_several_documents_stand_in_one_file_and_empty_ones_do_not_count(tmp_path: Path) -> None:
    other = SMALL_JOB.replace("small", "other")
    pool = yaml.dump(runtime_document())
    found = load_manifests(written(tmp_path, f"---\n{SMALL_JOB}---\n---\n{other}---\n{pool}"))
    assert [loaded.job.metadata.name for loaded in found.jobs] == ["small", "other"]
    assert list(found.runtimes) == ["pool"]


def test_a_folder_stands_for_its_manifests(tmp_path: Path) -> None:
    written(tmp_path, SMALL_JOB.replace("small", "first"), "1.yaml")
    written(tmp_path, SMALL_JOB.replace("small", "second"), "2.yml")
    written(tmp_path, "not a manifest", "notes.txt")
    assert [loaded.job.metadata.name for loaded in load_manifests(tmp_path).jobs] == ["first", "second"]


def test_json_is_yaml(tmp_path: Path) -> None:
    found = load_manifests(written(tmp_path, json.dumps(job_document()), "job.json"))
    assert found.jobs[0].job.metadata.name == "example"


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    (problem,) = refused(load_manifests, tmp_path / "no.yaml")
    assert str(problem) == f"{tmp_path / 'no.yaml'}: does not exist; name a file or a folder of manifests"


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    assert refused(load_manifests, tmp_path)[0].message == "is a folder without .yaml, .yml or .json files"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n---\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str) -> None:
    assert refused(load_manifests, written(tmp_path, text))[0].message == "is empty; write a FineTuneJob into it"


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\x00kind")
    (problem,) = refused(load_manifests, tmp_path / "job.yaml")
    assert problem.message.startswith("cannot be read as UTF-8 text: ")


def test_a_runtime_alone_is_a_manifest(tmp_path: Path) -> None:
    assert list(load_manifests(written(tmp_path, yaml.dump(runtime_document()))).runtimes) == ["pool"]


@pytest.mark.parametrize(
    ("document", "path", "message"),
    [
        ("just text", None, "must be a mapping with apiVersion, kind, metadata and spec"),
        (["a"], None, "must be a mapping with apiVersion, kind, metadata and spec"),
        ({"kind": "FineTuneJob"}, "apiVersion", "must be finetune-operator.io/v1alpha1"),
        (job_document() | {"apiVersion": "v1"}, "apiVersion", "must be finetune-operator.io/v1alpha1"),
        (job_document() | {"kind": "Job"}, "kind", "must be one of FineTuneJob, FineTuneRuntime"),
        (job_document() | {"kind": ["FineTuneJob"]}, "kind", "must be one of FineTuneJob, FineTuneRuntime"),
        (job_document() | {"metadata": {}}, "metadata.name", "is required"),
        (job_document() | {"spce": {}}, "spce", "is not a known field; did you mean spec? known here: "),
    ],
)
def test_a_document_of_another_shape_is_refused_at_its_field(
    tmp_path: Path, document: object, path: str | None, message: str
) -> None:
    (problem,) = refused(load_manifests, written(tmp_path, yaml.dump(document)))
    assert problem.path == path
    assert problem.message.startswith(message)


def test_the_faults_of_all_files_come_together(tmp_path: Path) -> None:
    written(tmp_path, SMALL_JOB.replace("epochs: 1", "epochs: 0"), "1.yaml")
    written(tmp_path, SMALL_JOB.replace("lora", "lroa") + "---\n" + SMALL_JOB.replace("sft", "stf"), "2.yaml")
    written(tmp_path, SMALL_JOB, "3.yaml")
    problems = refused(load_manifests, tmp_path)
    # An unknown branch is two faults: the field is not known, and none of the known ones is set.
    assert {(Path(problem.file or "").name, problem.path) for problem in problems} >= {
        ("1.yaml", "spec.training.epochs"),
        ("2.yaml", "spec.tuning.lroa"),
        ("2.yaml", "spec.method.stf"),
    }


def test_what_is_right_is_collected_beside_what_is_wrong(tmp_path: Path) -> None:
    found = collect_manifests(
        written(
            tmp_path,
            SMALL_JOB + "---\n" + SMALL_JOB.replace("epochs: 1", "epochs: 0").replace("small", "wrong"),
        )
    )
    assert [loaded.job.metadata.name for loaded in found.jobs] == ["small"]
    assert [problem.path for problem in found.problems] == ["spec.training.epochs"]


def test_a_problem_says_where_what_and_what_would_be_right(tmp_path: Path) -> None:
    file = written(tmp_path, SMALL_JOB.replace("learningRate: 2e-4", "learningRate: 20"))
    (problem,) = refused(load_manifests, file)
    assert str(problem) == (
        f"{file}: spec.training.learningRate: must be a number above 0 and at most 1, or auto (found 20)"
    )


def test_an_edit_sees_each_document_before_it_is_judged(tmp_path: Path) -> None:
    def more_epochs(document: Any) -> Any:
        document["spec"]["training"]["epochs"] = 7
        return document

    found = collect_manifests(written(tmp_path, SMALL_JOB.replace("epochs: 1", "epochs: 0")), edit=more_epochs)
    assert [loaded.job.spec.training.epochs for loaded in found.jobs] == [7]


RELATIVE = {
    "file://./train.jsonl": "file://{folder}/train.jsonl",
    "file://./rows/*.jsonl": "file://{folder}/rows/*.jsonl",
    "file:///data/train.jsonl": "file:///data/train.jsonl",
    "hf://org/rows": "hf://org/rows",
}


@pytest.mark.parametrize(("uri", "absolute"), RELATIVE.items())
def test_a_relative_path_starts_at_the_manifests_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, absolute: str
) -> None:
    (tmp_path / "jobs").mkdir()
    text = SMALL_JOB.replace('"file:///data/train.jsonl"', f'"{uri}"')
    written(tmp_path / "jobs", text)
    monkeypatch.chdir(tmp_path)
    (loaded,) = load_manifests(Path("jobs/job.yaml")).jobs
    assert loaded.job.spec.data.train[0].source == absolute.format(folder=tmp_path / "jobs")


def test_a_path_may_go_up_from_the_manifests_folder(tmp_path: Path) -> None:
    (tmp_path / "jobs").mkdir()
    (tmp_path / "train.jsonl").touch()
    text = SMALL_JOB.replace("file:///data/train.jsonl", "file://../train.jsonl")
    (loaded,) = load_manifests(written(tmp_path / "jobs", text)).jobs
    assert Path(loaded.job.spec.data.train[0].source.removeprefix("file://")).samefile(tmp_path / "train.jsonl")


def test_every_uri_of_a_job_may_be_relative(tmp_path: Path) -> None:
    text = SMALL_JOB.replace("hf://org/model", "file://./model") + "  outputs: [{to: file://./out}]\n"
    spec = load_manifests(written(tmp_path, text)).jobs[0].job.spec
    assert spec.model.source == f"file://{tmp_path}/model"
    assert spec.outputs[0].to == f"file://{tmp_path}/out"
