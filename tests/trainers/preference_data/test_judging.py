"""An AI judge on the loopback: both orders, what is remembered, patience, and what becomes of its key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.answers import Step
from finetune_api.preference_data import JudgeReport, ToJudge
from finetune_trainers.errors import DataError, UserError
from finetune_trainers.preference_data.asking import DeniedError, UnreachableError
from finetune_trainers.preference_data.judging import judge
from tests.trainers.preference_data.judge_service import JudgeService, Reply, likes_length, likes_the_first

SECRET = "sk-do-not-tell-0123456789"
ROWS = [
    {"prompt": "q", "answers": ["long answer", "short", "short"], "colour": "red"},
    {"prompt": "r", "answers": ["x", "y"]},
]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeService]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    service = JudgeService()
    yield service
    service.close()


class Bench:
    """A source on disk, a judge, and what was told and waited for."""

    def __init__(self, folder: Path, service: JudgeService) -> None:
        self.folder, self.service = folder, service
        self.to = folder / "prefs.jsonl"
        self.waits: list[float] = []
        self.steps: list[Step] = []

    @property
    def journal(self) -> Path:
        return self.folder / "prefs.jsonl.verdicts"

    def ask(self, rows: list[dict[str, Any]] | None = None, **fields: Any) -> JudgeReport:
        source = self.folder / "answers.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in (ROWS if rows is None else rows)))
        defaults = {"source": f"file://{source}", "to": str(self.to), "url": self.service.url, "model": "big"}
        return judge(ToJudge(**(defaults | fields)), self.steps.append, self.waits.append)

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.to.read_text().splitlines()]


Make = Callable[..., JudgeReport]


@pytest.fixture
def bench(tmp_path: Path, service: JudgeService) -> Bench:
    return Bench(tmp_path, service)


def test_a_verdict_that_follows_the_answer_is_a_preference_and_a_tie_is_no_row(bench: Bench) -> None:
    report = bench.ask()
    assert bench.rows() == [{"prompt": "q", "chosen": "long answer", "rejected": "short"}]
    assert (report.rows_read, report.pairs, report.preferred, report.ties) == (2, 2, 1, 1)
    assert (report.asked, report.remembered) == (4, 0)
    assert (report.disagreement, report.first_preferred, report.agreement) == (0.0, 0.5, None)
    assert (report.prompt_tokens, report.completion_tokens) == (400, 28)
    assert [bench.steps[-1].done, bench.steps[-1].total] == [4, 4]


def test_the_service_is_asked_as_openai_compatible_ones_are(bench: Bench) -> None:
    bench.ask(temperature=0.5, max_tokens=99)
    assert set(bench.service.paths) == {"/v1/chat/completions"}
    [request, *_] = bench.service.requests
    assert {name: request[name] for name in ("model", "temperature", "max_tokens")} == {
        "model": "big",
        "temperature": 0.5,
        "max_tokens": 99,
    }
    assert [message["role"] for message in request["messages"]] == ["system", "user"]


def refuses(taken: set[str]) -> Callable[[dict[str, Any]], Reply | None]:
    """As services do whose models reason first: one parameter is named at a time."""

    def refusal(asked: dict[str, Any]) -> Reply | None:
        name = next((one for one in asked if one not in {"model", "messages"} | taken), None)
        if name is None:
            return None
        code = "unsupported_value" if name == "temperature" else "unsupported_parameter"
        error = {"message": f"'{name}' is not supported" + "." * 1000, "param": name, "code": code}
        return Reply(400, json.dumps({"error": error}).encode())

    return refusal


def test_what_a_service_does_not_take_is_renamed_or_left_out_once_and_for_all(bench: Bench) -> None:
    bench.service.refusal = refuses({"max_completion_tokens"})
    report = bench.ask(max_tokens=99, concurrency=1)
    assert (report.preferred, report.ties, report.unreadable) == (1, 1, 0)
    sent = [request.keys() - {"model", "messages"} for request in bench.service.requests]
    assert sent[-4:] == [{"max_completion_tokens"}] * 4
    assert len(sent) == 4 + 2
    assert bench.service.requests[-1]["max_completion_tokens"] == 99
    told = json.loads(Path(report.data.provenance).read_text())["judge"]
    assert told["sent"] == {"max_completion_tokens": 99}


def test_questions_that_are_under_way_when_a_parameter_is_refused_are_asked_again_too(bench: Bench) -> None:
    bench.service.refusal = refuses({"max_completion_tokens"})
    rows = [{"prompt": str(n), "answers": ["long answer", "short"]} for n in range(20)]
    report = bench.ask(rows, concurrency=8)
    assert (report.preferred, report.unreadable) == (20, 0)


@pytest.mark.parametrize(
    "refusal",
    [
        {"error": {"message": "no", "param": "model", "code": "unsupported_value"}},
        {"error": {"message": "too long", "param": "max_tokens", "code": "invalid_value"}},
        {"error": {"message": "no", "param": None, "code": "unsupported_parameter"}},
        {"error": "no"},
        ["no"],
    ],
)
def test_another_refusal_is_about_the_question(refusal: Any, bench: Bench) -> None:
    bench.service.replies = [Reply(400, json.dumps(refusal).encode())]
    report = bench.ask([ROWS[0], ROWS[0] | {"prompt": "r"}], concurrency=1)
    assert (report.asked, report.unreadable, len(bench.service.requests)) == (4, 1, 4)


def test_a_judge_who_is_for_whatever_comes_first_prefers_nothing_and_that_is_counted(bench: Bench) -> None:
    bench.service.opinion = likes_the_first
    with pytest.raises(DataError, match="of 2 pairs 0 are ties, 2 have a verdict that changes with the order"):
        bench.ask()
    assert not bench.to.exists()


def changes_its_mind_about_x(a: str, b: str) -> str:
    return likes_the_first(a, b) if "x" in (a, b) else likes_length(a, b)


def test_a_judge_who_changes_its_mind_with_the_order_is_told(bench: Bench) -> None:
    bench.service.opinion = changes_its_mind_about_x
    report = bench.ask()
    assert (report.preferred, report.changed, report.ties) == (1, 1, 0)
    assert report.disagreement == 0.5
    assert report.first_preferred == 0.75
    assert len(bench.rows()) == 1


def test_people_are_judged_too(bench: Bench) -> None:
    report = bench.ask(
        [
            {"prompt": "q", "chosen": "much better", "rejected": "bad"},
            {"prompt": "r", "chosen": "no", "rejected": "the longer one"},
            {"prompt": "s", "chosen": "x", "rejected": "y"},
        ]
    )
    assert report.agreement == 0.5
    assert [row["chosen"] for row in bench.rows()] == ["much better", "the longer one"]


def test_what_was_judged_is_not_asked_again_also_when_the_last_line_was_not_finished(bench: Bench) -> None:
    bench.ask()
    lines = bench.journal.read_text().splitlines(keepends=True)
    bench.journal.write_text("".join(lines[:2]) + lines[2][:20])
    bench.service.requests.clear()
    report = bench.ask(overwrite=True)
    assert (report.asked, report.remembered, len(bench.service.requests)) == (2, 2, 2)
    assert report.preferred == 1
    bench.service.requests.clear()
    report = bench.ask(overwrite=True)
    assert (report.asked, report.remembered, bench.service.requests) == (0, 4, [])


def test_another_judge_is_asked_everything(bench: Bench) -> None:
    bench.ask()
    assert bench.ask(overwrite=True, model="small").asked == 4
    assert bench.ask(overwrite=True, instructions="Only spelling counts.").asked == 4
    assert bench.ask(overwrite=True).asked == 0


def test_a_service_that_goes_away_in_the_middle_costs_only_the_rest(bench: Bench) -> None:
    good = bench.service.completion
    bench.service.replies = [Reply(500)] * 3
    with pytest.raises(UnreachableError, match=r"answers 500 .* the same command asks only for the rest"):
        bench.ask(retries=2, concurrency=1)
    assert bench.waits == [0.5, 1.0]
    assert not bench.to.exists()
    bench.service.replies.clear()
    calls = iter(range(100))
    bench.service.completion = lambda asked: good(asked) if next(calls) < 2 else b"<html>"  # type: ignore[method-assign]
    with pytest.raises(UnreachableError, match="and no chat completion; check --url"):
        bench.ask(concurrency=1)
    assert len(bench.journal.read_text().splitlines()) == 2
    bench.service.completion = good  # type: ignore[method-assign]
    assert (report := bench.ask(concurrency=1)).remembered == 2
    assert report.asked == 2


def test_a_busy_service_is_waited_for_as_long_as_it_says(bench: Bench) -> None:
    bench.service.replies = [Reply(429, headers={"Retry-After": "7"}), Reply(503)]
    assert bench.ask(concurrency=1).preferred == 1
    assert bench.waits == [7.0, 1.0]


def test_a_question_that_the_judge_refuses_is_counted_and_the_others_are_judged(bench: Bench) -> None:
    bench.service.replies = [Reply(400, b"content filter")]
    bench.service.opinion = changes_its_mind_about_x
    report = bench.ask([{"prompt": "p", "answers": ["a", "bb"]}, *ROWS], concurrency=1)
    assert (report.unreadable, report.preferred, report.changed) == (1, 1, 1)
    assert report.disagreement == 0.5, "of two that have two verdicts"
    assert "content filter" in bench.journal.read_text()


@pytest.mark.parametrize("status", [401, 403])
def test_a_judge_who_does_not_let_us_ask_is_asked_once(bench: Bench, status: int) -> None:
    bench.service.replies = [Reply(status)] * 9
    with pytest.raises(DeniedError, match="--key-env names the variable"):
        bench.ask(concurrency=1)
    assert len(bench.service.requests) <= 4
    assert bench.waits == []


def test_a_judge_who_says_nothing_that_can_be_read_is_not_asked_further(bench: Bench) -> None:
    bench.service.opinion = lambda a, b: "who knows"
    rows = [{"prompt": f"q{number}", "answers": ["a", "bb"]} for number in range(100)]
    with pytest.raises(UserError, match="none of the first 32 answers of the judge has a verdict"):
        bench.ask(rows, concurrency=2)
    assert len(bench.service.requests) < 60


def test_the_key_goes_to_the_service_and_nowhere_else(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", SECRET)
    bench.service.opinion = lambda a, b: "A" if len(a) > len(b) else "B"
    bench.ask(key_env="JUDGE_KEY")
    assert {headers["Authorization"] for headers in bench.service.headers} == {f"Bearer {SECRET}"}
    bench.service.replies = [Reply(403, f"no such key: {SECRET}".encode())]
    with pytest.raises(DeniedError) as refused:
        bench.ask(key_env="JUDGE_KEY", overwrite=True, model="other", concurrency=1)
    assert "no such key: ..." in str(refused.value)
    everything = "".join(file.read_text() for file in bench.folder.iterdir())
    assert SECRET not in everything + str(refused.value)
    assert "JUDGE_KEY" in (bench.folder / "prefs.jsonl.provenance").read_text()


@pytest.mark.parametrize(("value", "said"), [(None, "is not set"), ("two\nlines", "holds what no header can hold")])
def test_a_key_that_is_not_there_is_refused_before_anything_is_asked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, value: str | None, said: str
) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(UserError, match=f"--key-env: the environment variable JUDGE_KEY {said}"):
        bench.ask(key_env="JUDGE_KEY")
    assert bench.service.requests == []


def test_no_more_is_asked_at_a_time_than_may_be(bench: Bench) -> None:
    rows = [{"prompt": f"q{number}", "answers": ["a", "bb"]} for number in range(20)]
    assert bench.ask(rows, concurrency=3).preferred == 20
    assert bench.service.most_at_once <= 3


def test_some_pairs_of_many_answers_are_drawn_by_the_seed(bench: Bench) -> None:
    rows = [{"prompt": "q", "answers": ["a" * length for length in range(1, 7)]}]
    first = bench.ask(rows, pairs_per_row=3, seed=1)
    assert first.pairs == 3
    drawn = bench.rows()
    bench.ask(rows, pairs_per_row=3, seed=1, overwrite=True)
    assert bench.rows() == drawn
    bench.ask(rows, pairs_per_row=3, seed=2, overwrite=True)
    assert bench.rows() != drawn


def test_the_pairs_of_each_row_are_drawn_anew(bench: Bench) -> None:
    answers = ["a" * length for length in range(1, 7)]
    bench.ask([{"prompt": f"q{number}", "answers": answers} for number in range(8)], pairs_per_row=1)
    assert len({(row["chosen"], row["rejected"]) for row in bench.rows()}) > 1


def test_who_judged_and_what_was_asked_stands_beside_the_rows(bench: Bench) -> None:
    bench.ask(url=f"{bench.service.url}/chat/completions?version=secret")
    assert bench.service.paths[0] == "/v1/chat/completions?version=secret"
    told = json.loads((bench.folder / "prefs.jsonl.provenance").read_text())
    assert told["judge"]["model"] == "big"
    assert "{first}" in told["judge"]["messages"][1]["content"]
    assert told["counts"]["preferred"] == 1
    assert told["settings"]["seed"] == 0
    assert "secret" not in json.dumps(told)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q"}, "has neither 'answers' nor 'chosen' and 'rejected'"),
        ({"prompt": "q", "answers": "a"}, "answers: must be a list"),
        ({"prompt": "q", "answers": ["a", 3]}, r"answers\[1\]: must be text, not a number"),
    ],
)
def test_a_row_that_cannot_be_judged_is_named_before_anything_is_asked(
    bench: Bench, row: dict[str, Any], said: str
) -> None:
    with pytest.raises(DataError, match=rf"answers.jsonl:3: {said}"):
        bench.ask([*ROWS, row])
    assert bench.service.requests == []
