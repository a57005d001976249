"""`finetune data` as people and programs meet it: the command line, the process behind it, files on a disk."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from finetune_api import preference_data as api
from finetune_client.cli import asking
from finetune_client.cli.exits import DATA_MEANINGS, DENIED, UNREACHABLE
from tests.client.conftest import Finetune
from tests.client.test_cli import HEAVY, imported_by
from tests.trainers.checkpoint.command import Here
from tests.trainers.preference_data.judge_service import JudgeService, Reply

RANKED = '{"prompt": "q", "answers": ["best", "fair", "worst"]}\n'


@pytest.fixture
def real_data(finetune: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finetune:
    """`finetune data` with its two processes, in a folder with rankings."""
    monkeypatch.chdir(tmp_path)
    Path("ranked.jsonl").write_text(RANKED)
    return lambda *arguments: finetune("data", *arguments)


@pytest.fixture
def data(real_data: Finetune, monkeypatch: pytest.MonkeyPatch) -> Finetune:
    """The same in one process."""
    monkeypatch.setattr(asking, "start", Here)
    return real_data


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeService]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    service = JudgeService()
    yield service
    service.close()


def test_rankings_are_brought_in_and_what_was_done_is_told(real_data: Finetune) -> None:
    done = real_data("import", "ranked.jsonl", "--to", "prefs.jsonl")
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines() == [
        "3 rows in prefs.jsonl; what they were made of is in prefs.jsonl.provenance",
        "From 1 rows of rankings about 1 prompt.",
    ]
    assert len(Path("prefs.jsonl").read_text().splitlines()) == 3


def test_the_report_as_json_is_that_of_the_contract(data: Finetune) -> None:
    done = data("import", "ranked.jsonl", "--to", "prefs.jsonl", "--pairs", "best-worst", "-o", "json")
    report = api.ImportReport.model_validate(done.document)
    assert (report.data.rows, report.layout) == (1, "rankings")


def test_an_ai_judge_is_asked_and_told_of(real_data: Finetune, service: JudgeService) -> None:
    done = real_data("judge", "ranked.jsonl", "--url", service.url, "--model", "big", "--to", "prefs.jsonl")
    assert done.code == 0, done.stderr
    assert "3 pairs: 2 preferred, 1 tied, 0 changed with the order of the answers, 0 without a verdict." in done.stdout
    assert "The judge disagrees with itself in 0.0% of the pairs." in done.stdout
    assert "verdicts: 6 of 6" in done.stderr
    rows = [json.loads(line) for line in Path("prefs.jsonl").read_text().splitlines()]
    assert [(row["chosen"], row["rejected"]) for row in rows] == [("worst", "best"), ("worst", "fair")]


@pytest.mark.parametrize(("status", "code"), [(401, DENIED), (404, UNREACHABLE)])
def test_a_judge_that_cannot_be_asked_has_an_exit_code_of_its_own(
    data: Finetune, service: JudgeService, status: int, code: int
) -> None:
    service.replies = [Reply(status)] * 9
    done = data("judge", "ranked.jsonl", "--url", service.url, "--model", "m", "--to", "p.jsonl", "-o", "json")
    assert done.code == code
    assert done.document["error"]["exitCode"] == code
    assert f"the service answers {status}" in done.stderr


def test_every_bad_row_is_told_with_its_line(data: Finetune) -> None:
    Path("bad.jsonl").write_text(RANKED + '{"prompt": "q", "answers": ["a"]}\n{"prompt": 3, "answers": ["a", "b"]}\n')
    done = data("import", "bad.jsonl", "--to", "prefs.jsonl", "-o", "json")
    assert done.code == 3
    told = done.stderr.splitlines()
    assert [line.partition(": ")[0].rpartition("/")[2] for line in told] == ["bad.jsonl:2", "bad.jsonl:3"]
    assert [problem["file"].rpartition(":")[2] for problem in done.document["error"]["problems"]] == ["2", "3"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["import", "absent.jsonl", "--to", "p.jsonl"], "does not exist: there is no file or folder at"),
        (["import", "ranked.jsonl", "--to", "p.csv"], "--to: p.csv does not end in .jsonl"),
        (["import", "ranked.jsonl", "--to", "p.jsonl", "--column", "prompt"], "is not of the form NAME=COLUMN"),
        (["import", "s3://bucket/x.jsonl", "--to", "p.jsonl"], "SOURCE: "),
        (["judge", "ranked.jsonl", "--url", "here", "--model", "m", "--to", "p.jsonl"], "--url: "),
        (
            [
                "judge",
                "ranked.jsonl",
                "--url",
                "http://h",
                "--model",
                "m",
                "--to",
                "p.jsonl",
                "--instructions",
                "absent",
            ],
            "--instructions: absent cannot be read",
        ),
        (["candidates", "ranked.jsonl", "--model", "absent", "--to", "p.jsonl"], "absent does not exist"),
    ],
)
def test_a_mistake_is_one_sentence_that_names_the_option(data: Finetune, arguments: list[str], said: str) -> None:
    done = data(*arguments)
    assert done.code in (2, 3)
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_no_command_imports_what_trains_and_help_not_even_the_contract(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ranked.jsonl").write_text(RANKED)
    assert imported_by("data", "import", "ranked.jsonl", "--to", "p.jsonl") & HEAVY == set()
    assert Path("p.jsonl").exists()
    assert imported_by("data", "--help") & {"finetune_api", "yaml", "psutil", *HEAVY} == set()


def test_neither_importing_nor_judging_imports_torch() -> None:
    program = (
        "import sys, finetune_trainers.preference_data.__main__, finetune_trainers.preference_data.importing\n"
        "import finetune_trainers.preference_data.judging\n"
        "print([name for name in ('torch', 'ray', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_process_that_ends_without_an_answer_is_told(data: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(command: Sequence[str], request: str) -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"], stdout=subprocess.PIPE, text=True)

    monkeypatch.setattr(asking, "start", dies)
    done = data("import", "ranked.jsonl", "--to", "p.jsonl")
    assert done.code == 7
    assert "ended with exit code 7 and no answer" in done.stderr


@pytest.mark.parametrize("command", ["import", "judge", "candidates"])
def test_the_help_of_every_command_has_two_examples_and_the_exit_codes(data: Finetune, command: str) -> None:
    text = data(command, "--help").stdout
    assert text.count(f"  finetune data {command}") >= 2
    flat = " ".join(text.split())
    assert all(f"{code} {meaning}" in flat for code, meaning in DATA_MEANINGS.items())


def test_the_exit_codes_for_judges_are_those_of_the_contract() -> None:
    assert (UNREACHABLE, DENIED) == (api.UNREACHABLE, api.DENIED)
