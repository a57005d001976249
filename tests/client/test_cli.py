"""The command line: help, exit codes, plan, validate for people, version, and what it never imports."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from finetune_api.failures import EXIT_CODES, INTERRUPTED
from finetune_api.plan import RunPlan
from finetune_client import runner
from finetune_client.cli.app import app
from finetune_client.cli.exits import JOBS_MEANINGS, MEANINGS, OK, SUSPENDED
from tests.client.conftest import FAKE_TRAINER
from tests.factories import runtime_document

COMMANDS = ["validate", "plan", "run", "export", "chat", "version"]
JOBS_COMMANDS = [
    *("submit", "get", "list", "watch", "logs", "suspend", "resume", "cancel", "artifacts", "describe"),
]
HEAVY = {"torch", "ray", "transformers", "deepspeed", "peft", "finetune_trainers"}
NETWORK = {"kubernetes", "aiohttp"}


def imported_by(*arguments: str, before: str = "") -> set[str]:
    """The modules that one command of `finetune` imports, in a process of its own."""
    program = f"""
import atexit, json, sys
sys.argv = ["finetune", *{list(arguments)!r}]
{before}
atexit.register(lambda: print("MODULES" + json.dumps(sorted(sys.modules))))
from finetune_client.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    return set(json.loads(done.stdout.rpartition("MODULES")[2]))


def test_no_command_imports_what_trains(write_job: Any) -> None:
    for arguments in (["validate", str(write_job())], ["plan", str(write_job())], ["run", "absent.yaml"], ["version"]):
        assert imported_by(*arguments) & (HEAVY | NETWORK) == set()


def test_a_whole_run_imports_neither_what_trains_nor_what_talks_to_a_cluster(write_job: Any, tmp_path: Path) -> None:
    before = f"""
from finetune_client import runner
runner.TRAINERS = [sys.executable, {str(FAKE_TRAINER)!r}]
runner.NEEDED_PACKAGES = ()
"""
    imported = imported_by("run", str(write_job()), "--workdir", str(tmp_path / "run"), "-q", before=before)
    assert (tmp_path / "run" / "outcome.json").exists()
    assert imported & (HEAVY | NETWORK) == set()


def test_help_is_quick_because_it_imports_neither_the_contract_nor_yaml() -> None:
    assert imported_by("--help") & {"pydantic", "yaml", "psutil", *HEAVY} == set()


def test_the_documented_exit_codes_are_those_of_the_contract() -> None:
    assert set(MEANINGS) == {OK, *EXIT_CODES.values(), SUSPENDED, INTERRUPTED}


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_two_examples_and_the_exit_codes(finetune: Any, command: str) -> None:
    text = finetune(command, "--help").stdout
    assert text.count(f"  finetune {command}") >= 2
    flat = " ".join(text.split())
    assert all(f"{code} {meaning}" in flat for code, meaning in MEANINGS.items())


@pytest.mark.parametrize("command", JOBS_COMMANDS)
def test_the_help_of_every_command_for_jobs_elsewhere_has_two_examples_and_the_exit_codes(
    finetune: Any, command: str
) -> None:
    text = finetune(command, "--help").stdout
    assert text.count(f"  finetune {command}") >= 2
    flat = " ".join(text.split())
    assert all(f"{code} {meaning}" in flat for code, meaning in JOBS_MEANINGS.items())


def leaves(command: Any, *words: str) -> Iterator[tuple[str, ...]]:
    """Every command below this one, by the words that are typed."""
    for word, below in getattr(command, "commands", {}).items():
        yield from leaves(below, *words, word)
    if not hasattr(command, "commands"):
        yield words


@pytest.mark.parametrize("words", list(leaves(typer.main.get_command(app))), ids=" ".join)
def test_every_command_speaks_json(finetune: Any, words: tuple[str, ...]) -> None:
    assert re.search(r"--output +-o +<[a-z|]*\bjson\b", finetune(*words, "--help").stdout)


def test_the_help_lists_the_commands_and_the_exit_codes(finetune: Any) -> None:
    text = " ".join(finetune("--help").stdout.split())
    here, elsewhere = text.split("Jobs in a cluster, or in the background of this machine")
    assert all(f"│ {command} " in here for command in COMMANDS)
    assert all(f"│ {command} " in elsewhere for command in JOBS_COMMANDS)
    assert all(f"{code} {meaning}" in text for code, meaning in MEANINGS.items())


def test_the_plan_as_json_is_the_run_plan(finetune: Any, write_job: Any) -> None:
    done = finetune("plan", write_job(), "-o", "json")
    assert RunPlan.model_validate_json(done.stdout).batch.global_batch_size == 8


def test_the_plan_as_yaml_says_the_same(finetune: Any, write_job: Any) -> None:
    done = finetune("plan", write_job(), "-o", "yaml")
    assert yaml.safe_load(done.stdout) == finetune("plan", write_job(), "-o", "json").document


def test_the_summary_shows_the_arithmetic_and_the_decisions_with_reasons(finetune: Any, write_job: Any) -> None:
    job = write_job({"spec.cluster.workers.replicas": 2, "spec.training.microBatchSize": 2})
    text = finetune("plan", job).stdout
    assert "2 micro x 2 accumulation x 2 processes = 8 sequences per step" in text
    assert "world size 2" in text
    assert "ZeRO stage 2" in text
    assert "spec.training.precision" in text
    assert "training runs on cpu" in text
    assert "artifact/ in the run's folder; in a cluster that is lost with the pods: name spec.outputs" in text
    with_output = finetune("plan", write_job({"spec.outputs": [{"to": "s3://bucket/model"}]})).stdout
    assert "artifact/ in the run's folder, s3://bucket/model" in with_output


def test_a_plan_of_an_invalid_job_exits_2_with_sentences(finetune: Any, write_job: Any) -> None:
    job = write_job({"spec.training.precision": "fp16"})
    done = finetune("plan", job)
    assert done.code == 2
    assert f"{job}: spec.training.precision: needs a GPU; set bf16, fp32 or auto" in done.stderr
    assert done.stdout == ""


def test_a_runtime_may_come_from_another_file(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    pool = tmp_path / "pool.yaml"
    pool.write_text(yaml.safe_dump(runtime_document({"workers.gpus": 2, "workers.cpus": 6})))
    job = write_job({"spec.runtimeRef": {"name": "pool"}})
    assert finetune("plan", job).code == 2
    plan = finetune("plan", job, "--runtime", pool, "-o", "json").document
    assert plan["workers"]["worldSize"] == 2


def test_people_read_one_sentence_per_problem_on_stderr(finetune: Any, write_job: Any) -> None:
    job = write_job({"spec.training.seed": -1, "spec.tuning.lora.rank": 0})
    done = finetune("validate", job)
    assert done.code == 2
    assert done.stdout == ""
    assert f"{job}: spec.training.seed: must be at least 0 (found -1)\n" in done.stderr
    assert "2 problems found" in done.stderr


def test_people_are_told_what_is_valid(finetune: Any, write_job: Any) -> None:
    job = write_job()
    assert finetune("validate", job).stdout == f"{job}: job tiny is valid\n"


def test_all_faults_of_all_files_are_told_at_once(finetune: Any, write_job: Any, tmp_path: Path) -> None:
    shape = write_job({"spec.training.seed": -1, "spec.tuning.lora.rank": 0, "spec.typo": 1}, name="shape.yaml")
    batch = write_job({"spec.cluster.workers.replicas": 3, "spec.training.precision": "fp16"}, name="batch.yaml")
    syntax = tmp_path / "syntax.yaml"
    syntax.write_text("a: [")
    write_job(name="good.yaml")
    found = finetune("validate", tmp_path, tmp_path / "absent.yaml", "-o", "json").document["errors"]
    assert {(error["file"], error["path"]) for error in found} == {
        (str(batch), "spec.training.globalBatchSize"),
        (str(batch), "spec.training.precision"),
        (str(shape), "spec.training.seed"),
        (str(shape), "spec.tuning.lora.rank"),
        (str(shape), "spec.typo"),
        (f"{syntax}:1", None),
        (str(tmp_path / "absent.yaml"), None),
    }


def test_validate_with_data_lets_the_trainers_check_every_row(finetune: Any, write_job: Any) -> None:
    job = write_job()
    assert finetune("validate", job, "--data", "-o", "json").document == {"valid": True, "errors": []}
    done = finetune("validate", job, "--data", "-o", "json", fake="data-error")
    assert done.code == 3
    assert done.document["errors"] == [
        {"file": "rows.jsonl:17", "path": "messages", "value": "[]", "message": "must hold a message"}
    ]


def test_validate_with_data_needs_the_trainers(finetune: Any, write_job: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "NEEDED_PACKAGES", ("no_such_package",))
    done = finetune("validate", write_job(), "--data", "-o", "json")
    assert done.code == 2
    assert "finetune-operator[trainers]" in done.document["errors"][0]["message"]


def test_the_module_is_the_command_where_there_is_no_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "finetune_client", "--help"], capture_output=True, text=True, check=True
    )
    assert all(f" {command} " in done.stdout for command in COMMANDS)


def test_version_names_the_packages_that_train(finetune: Any) -> None:
    versions = finetune("version", "-o", "json").document
    assert list(versions) == ["finetune-operator", "python", "ray", "torch", "deepspeed", "transformers", "peft"]
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert all(name in finetune("version").stdout for name in versions)


def test_a_shell_completes_the_commands() -> None:
    asked = {"_FINETUNE_COMPLETE": "complete_bash", "COMP_WORDS": "finetune su", "COMP_CWORD": "1"}
    program = Path(sys.executable).with_name("finetune")
    done = subprocess.run([program], env=os.environ | asked, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["submit", "suspend"]


@pytest.mark.parametrize(
    ("typed", "names"),
    [
        ("finetune get --local su", ["support-bot"]),
        ("finetune logs --local ", ["other", "support-bot"]),
        ("finetune cancel -n team-a --local ", ["elsewhere"]),
        ("finetune get su", []),
    ],
)
def test_a_shell_completes_the_names_of_the_jobs_on_this_machine(
    typed: str, names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for job in ("default/support-bot", "default/other", "team-a/elsewhere"):
        folder = tmp_path / ".finetune" / "jobs" / job
        folder.mkdir(parents=True)
        (folder / "20260101-000000-000000.pid").touch()
    num_before = typed.count(" ")
    monkeypatch.setenv("_FINETUNE_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(num_before))
    done = subprocess.run([Path(sys.executable).with_name("finetune")], capture_output=True, text=True, check=False)
    assert done.stdout.split() == names


def commands(app: typer.Typer) -> Iterator[typer.models.CommandInfo]:
    yield from app.registered_commands
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from commands(group.typer_instance)


def test_no_paragraph_of_help_is_broken_where_its_docstring_is() -> None:
    paragraphs = [part for command in commands(app) for part in (command.help or "").split("\n\n")]
    assert len(paragraphs) > 50
    assert [part for part in paragraphs if "\n" in part and not part.startswith("\b")] == []


def test_an_unknown_option_exits_2(finetune: Any, write_job: Any) -> None:
    assert finetune("run", write_job(), "--no-such-option").code == 2
