"""The quickstart's data: real documentation, the same every time, and nothing that is asked about twice."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "manifests" / "samples" / "quickstart" / "make_data.py"


def make(folder: Path, *arguments: str) -> dict[str, bytes]:
    command = [sys.executable, str(SCRIPT), "--folder", str(folder), *arguments]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return make(tmp_path_factory.mktemp("quickstart") / "data")


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("quickstart_make_data", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def rows(content: bytes) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in content.splitlines()]


def name_in(text: str) -> str:
    """`shlex.quote` of a question or an answer."""
    return text.split("`")[1].partition("(")[0]


def test_two_runs_write_the_same_bytes(files: dict[str, bytes], tmp_path: Path) -> None:
    assert sorted(files) == ["eval.jsonl", "question.txt", "train.jsonl"]
    assert make(tmp_path / "again") == files


def test_a_row_is_a_question_about_a_name_and_an_answer_about_the_same(files: dict[str, bytes]) -> None:
    for messages in rows(files["train.jsonl"]) + rows(files["eval.jsonl"]):
        assert [message["role"] for message in messages] == ["user", "assistant"]
        question, answer = (message["content"] for message in messages)
        assert name_in(question) == name_in(answer)


def test_questions_come_in_several_phrasings(files: dict[str, bytes]) -> None:
    phrasings = {
        question["content"].replace(name_in(question["content"]), "X") for question, _ in rows(files["train.jsonl"])
    }
    assert len(phrasings) == 5


def test_no_name_and_no_answer_stands_twice(files: dict[str, bytes]) -> None:
    every = rows(files["train.jsonl"]) + rows(files["eval.jsonl"])
    for part in (0, 1):
        contents = [name_in(messages[part]["content"]) for messages in every]
        assert len(set(contents)) == len(contents)
    texts = [messages[1]["content"].partition(")` ")[2] for messages in every]
    assert len(set(texts)) == len(texts)


def test_what_is_evaluated_is_not_trained_on_under_another_owner(files: dict[str, bytes]) -> None:
    train, evaluation = (
        {name_in(question["content"]).rpartition(".")[2] for question, _ in rows(files[name])}
        for name in ("train.jsonl", "eval.jsonl")
    )
    assert not train & evaluation


def test_the_question_asks_about_something_in_neither_file(files: dict[str, bytes]) -> None:
    question = files["question.txt"].decode().strip()
    last = name_in(question).rpartition(".")[2]
    asked = {name_in(messages[0]["content"]) for name in ("train", "eval") for messages in rows(files[f"{name}.jsonl"])}
    assert question.startswith("What does `")
    assert last not in {name.rpartition(".")[2] for name in asked}


def test_answers_are_the_documentation_of_this_python(files: dict[str, bytes]) -> None:
    def documentation(name: str) -> str:
        thing: Any = importlib.import_module("builtins")
        for part in name.split("."):
            if hasattr(thing, part):
                thing = getattr(thing, part)
            else:
                thing = importlib.import_module(part if thing.__name__ == "builtins" else f"{thing.__name__}.{part}")
        return " ".join(inspect.cleandoc(thing.__doc__).split())

    def letters(text: str) -> str:
        return "".join(filter(str.isalnum, text))  # markup was taken out

    for _, answer in rows(files["eval.jsonl"]):
        said = answer["content"].partition(")` ")[2]
        after_the_verb = said.partition(" ")[2]
        assert letters(after_the_verb) in letters(documentation(name_in(answer["content"])))


def test_too_many_rows_are_refused_with_the_number_that_there_are(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path), "--train-rows", "1000000"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ask for fewer rows" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("docstring", "text"),
    [
        ("Return a shell-escaped\n    version of it.", "Return a shell-escaped version of it."),
        ("Return `x` as :class:`str`, or ``None``.", "Return `x` as `str`, or `None`."),
        ("Do one thing and then another.\n\nIn detail.", "Do one thing and then another."),
        ("frob(x) -> y\n\nReturn y, which is whatever x has become by now.", ""),
        ("- one thing that is long enough.\n- another thing that is long enough.", ""),
        ("Deprecated: use something else instead of this function.", ""),
        ("Too short.", ""),
        (f"Too {'very ' * 50}long.", ""),
        (None, ""),
    ],
)
def test_the_first_paragraph_is_taken_when_it_is_sentences(maker: ModuleType, docstring: str | None, text: str) -> None:
    assert maker.first_paragraph(docstring) == text


@pytest.mark.parametrize(
    ("docstring", "said"),
    [
        ("Return the floor of x.", "returns the floor of x."),
        ("Returns the floor of x.", "returns the floor of x."),
        ("Push item onto heap.", "pushes item onto heap."),
        ("Copy data from src to dst.", "copies data from src to dst."),
        ("Display what there is.", ""),
        ("A class of its own.", ""),
        ("", ""),
    ],
)
def test_a_docstring_that_starts_with_a_verb_becomes_a_sentence(maker: ModuleType, docstring: str, said: str) -> None:
    assert maker.said_of_it(docstring) == said


def test_signatures_lose_self_and_annotations_and_addresses_are_refused(maker: ModuleType) -> None:
    class Thing:
        def method(self, x: int, *, y: str = "a") -> str:
            return y

    def with_address(x: object = object()) -> None:
        return None

    assert maker.call_signature(Thing.method) == "(x, *, y='a')"
    assert maker.call_signature(with_address) is None
