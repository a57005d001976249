"""Everything that data can get wrong, in one table: what is found, where, and what would be right.

Each case names the files of a job's data, changes to the job, and the problem that must come first. Nothing
here may end in a traceback, or leave a half-written entry in the cache.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from finetune_api.spec import DataSource
from finetune_trainers.data.faults import MAX_LISTED
from finetune_trainers.data.sources import find_files
from finetune_trainers.errors import DataError, StorageError, TrainerError, UserError

USER = {"role": "user", "content": "one two"}
ASSISTANT = {"role": "assistant", "content": "three four"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"messages": [USER, ASSISTANT]}
LONG = {"messages": [{"role": "user", "content": "one two three " * 60}, ASSISTANT]}


PAIR = {"prompt": "one two", "chosen": "better", "rejected": "worse"}
WORSE = {"role": "assistant", "content": "five six"}
PAIRS = {"chosen": [USER, ASSISTANT], "rejected": [USER, WORSE]}
RATED = {"prompt": "one two", "completion": "three", "label": True}
DPO: dict[str, Any] = {"method": {"dpo": {"maxSeqLength": 64}}}
KTO: dict[str, Any] = {"method": {"kto": {"maxSeqLength": 64}}}
ASKED = {"prompt": "one two", "answer": "three"}


def asking(**settings: Any) -> dict[str, Any]:
    """A job of GRPO whose prompts may have 48 tokens."""
    rewards = [{"metric": {"kind": "exact-match"}}]
    grpo = {"maxSeqLength": 64, "sampling": {"maxNewTokens": 16}, "rewards": rewards, **settings}
    return {"method": {"grpo": grpo}}


def without(column: str) -> dict[str, Any]:
    return {name: value for name, value in PAIR.items() if name != column}


@dataclass(frozen=True)
class Bad:
    """One bad data set."""

    name: str
    content: Any
    """Of train.jsonl, or a dict of files by name; rows or bytes."""
    says: str
    """Part of the message."""
    file: str | None = None
    """The place, below the job's folder."""
    path: str | None = None
    value: str | None = None
    """Part of the value."""
    changes: dict[str, Any] = field(default_factory=dict)
    template: str | None = "chatml"
    error: type[TrainerError] = DataError


def messages(*turns: Any) -> list[Any]:
    """A good row, then one with these turns: the fault is in line 2."""
    return [GOOD, {"messages": list(turns)}]


def parquet(**columns: list[Any]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue()


def source(name: str, **fields: Any) -> dict[str, Any]:
    return {"data.train": [{"source": f"file://./{name}", **fields}]}


ROW_2 = "train.jsonl:2"
SOURCE = "spec.data.train[0].source"

CASES = [
    # Files
    Bad("a file that is not there", {}, "does not exist", path=SOURCE, value="train.jsonl"),
    Bad("an empty file", b"", "has no rows", path=SOURCE, value="file://./train.jsonl"),
    Bad("a file of blank lines", b"\n\n  \n", "has no rows", path=SOURCE),
    Bad(
        "a glob that matches nothing",
        {"a.csv": b"x"},
        "matches no file",
        path=SOURCE,
        changes=source("*.jsonl"),
        value="*",
    ),
    Bad(
        "a glob that matches no data",
        {"a.md": b"x"},
        "matches only files that do not end in .jsonl",
        path=SOURCE,
        changes=source("*.md"),
    ),
    Bad("an empty folder", {"d/.keep": b""}, "folder without data files", path=SOURCE, changes=source("d")),
    Bad(
        "a folder with two kinds of files",
        {"d/a.jsonl": [GOOD], "d/b.csv": b"text\nx\n"},
        "holds .csv and .jsonl files",
        path=SOURCE,
        changes=source("d"),
    ),
    Bad(
        "a file of an unknown kind",
        {"a.xlsx": b"x"},
        "has the suffix '.xlsx'; data files end in .jsonl",
        path=SOURCE,
        changes=source("a.xlsx"),
    ),
    Bad(
        "a compressed file",
        {"a.jsonl.gz": b"x"},
        "has the suffix '.gz'",
        path=SOURCE,
        changes=source("a.jsonl.gz"),
    ),
    Bad(
        "a claim that is not mounted",
        {},
        "not mounted at /nowhere/team",
        path=SOURCE,
        changes={"data.train.0.source": "pvc://team/a.jsonl"},
    ),
    Bad(
        "a package that is not installed",
        {},
        "'no_such_package', which is not installed",
        path=SOURCE,
        changes={"data.train.0.source": "package://no_such_package/a.jsonl"},
    ),
    Bad(
        "a data set that is not in the Hub's cache",
        {},
        "not in the local Hub cache",
        path=SOURCE,
        changes={"data.train.0.source": "hf://nobody/nothing"},
    ),
    Bad(
        "an evaluation file that is not there",
        [GOOD],
        "does not exist",
        path="spec.data.eval[0].source",
        changes={"data.eval": [{"source": "file://./eval.jsonl"}]},
    ),
    # JSON
    Bad(
        "broken JSON in line 3",
        b'{"text": "a"}\n\n{"text": \n',
        "Expecting value at column 10",
        "train.jsonl:3",
        value='{"text":',
    ),
    Bad("a line of plain words", [GOOD, "hello"], "not an object", ROW_2, value='"hello"'),
    Bad("a list in the place of a row", [GOOD, [1, 2]], "not an object", ROW_2, value="[1, 2]"),
    Bad("null in the place of a row", [GOOD, None], "not an object", ROW_2, value="null"),
    Bad("only rows that are no objects", [1, 2], "not an object", "train.jsonl:1", value="1"),
    Bad("two objects in one line", b'{"text": "a"} {"text": "b"}\n', "Extra data at column 15", "train.jsonl:1"),
    Bad("a line that ends too soon", b'{"text": "a"}\n{"text": "b', "not valid JSON", ROW_2),
    Bad("Latin-1 in line 2", b'{"text": "a"}\n{"text": "caf\xe9"}\n', "not UTF-8 text: byte 0xe9", ROW_2, value="caf"),
    Bad("UTF-16", '{"text": "a"}\n'.encode("utf-16"), "not UTF-8 text: byte 0xff", "train.jsonl:1"),
    Bad("JSON nested without end", b"[" * 100_000 + b"\n", "nested too deeply", "train.jsonl:1"),
    Bad(
        "a .json file with one object over many lines",
        {"a.json": b'{\n "text": "a"\n}\n'},
        "not valid JSON",
        "a.json:1",
        changes=source("a.json"),
    ),
    Bad(
        "a .json list with a comma too many",
        {"a.json": b'[{"text": "a"},\n]\n'},
        "not valid JSON",
        "a.json:",
        changes=source("a.json"),
    ),
    Bad(
        "a .json file with a string",
        {"a.json": b'"x"'},
        "must be a list of objects",
        "a.json",
        changes=source("a.json"),
    ),
    # Parquet, CSV, text
    Bad("a .parquet file that is none", {"a.parquet": b"PAR1 no"}, "Parquet", "a.parquet", changes=source("a.parquet")),
    Bad(
        "a .parquet file cut short",
        {"a.parquet": parquet(text=["a"] * 50)[:-30]},
        "not a readable Parquet file",
        "a.parquet",
        changes=source("a.parquet"),
    ),
    Bad(
        "null in row 2 of a .parquet file",
        {"a.parquet": parquet(text=["a", None])},
        "is missing; it must be text",
        "a.parquet:2",
        path="text",
        changes=source("a.parquet"),
    ),
    Bad(
        "numbers in a .parquet file",
        {"a.parquet": parquet(text=[1, 2])},
        "must be text, not a number",
        "a.parquet:1",
        path="text",
        value="1",
        changes=source("a.parquet"),
    ),
    Bad(
        "a .parquet file without rows",
        {"a.parquet": parquet(text=pyarrow.array([], pyarrow.string()))},
        "has no rows",
        path=SOURCE,
        changes=source("a.parquet"),
    ),
    Bad(
        "a .csv file without the column",
        {"a.csv": b"question,answer\nq,a\n"},
        "fits no format: the columns are question, answer",
        "a.csv:2",
        path="spec.data.train[0].format",
        changes=source("a.csv"),
    ),
    Bad(
        "a .csv record with too many fields",
        {"a.csv": b"prompt,completion\nq,a\nq,a,b\n"},
        "has 3 fields, but the header has 2",
        "a.csv:3",
        value="q,a,b",
        changes=source("a.csv"),
    ),
    Bad(
        "a .csv quote that is never closed",
        {"a.csv": b'text\nfine\n"open\nmore\n'},
        "not valid CSV",
        "a.csv:3",
        changes=source("a.csv"),
    ),
    Bad("a .csv file with only a header", {"a.csv": b"text\n"}, "has no rows", path=SOURCE, changes=source("a.csv")),
    Bad(
        "a .csv header with one name twice",
        {"a.csv": b"text,text\na,b\n"},
        "names a column twice",
        "a.csv:1",
        value="text",
        changes=source("a.csv"),
    ),
    Bad("Latin-1 in a .csv file", {"a.csv": b"text\na\ncaf\xe9\n"}, "not UTF-8", "a.csv:3", changes=source("a.csv")),
    Bad("Latin-1 in a .txt file", {"a.txt": b"one\ncaf\xe9\n"}, "not UTF-8", "a.txt:2", changes=source("a.txt")),
    Bad("a .txt file of blanks", {"a.txt": b" \n "}, "is empty", "a.txt", path="text", changes=source("a.txt")),
    # Formats and columns
    Bad(
        "columns of no format",
        [{"question": "q", "answer": "a"}],
        "fits no format: the columns are question, answer",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        value="auto",
    ),
    Bad(
        "columns of two formats",
        [{"text": "t", **GOOD}],
        "set it to messages or text",
        "train.jsonl:1",
        path="spec.data.train[0].format",
    ),
    Bad("a later row without the column", [GOOD, {"text": "t"}], "has no column 'messages'", ROW_2, path="messages"),
    Bad(
        "a named format that the rows do not have",
        [GOOD],
        "has no column 'instruction', which the format alpaca needs",
        "train.jsonl:1",
        changes=source("train.jsonl", format="alpaca"),
    ),
    Bad(
        "a mapped column that is not there",
        [GOOD],
        "has no column 'chat'",
        "train.jsonl:1",
        changes=source("train.jsonl", format="messages", columns={"messages": "chat"}),
    ),
    Bad(
        "a mapping for another format",
        [GOOD],
        "is not a column of the format messages, which has messages; remove it",
        "train.jsonl:1",
        path="spec.data.train[0].columns.text",
        value="body",
        changes=source("train.jsonl", format="messages", columns={"text": "body"}),
    ),
    Bad("text that is a number", [{"text": 5}], "must be text, not a number", "train.jsonl:1", path="text", value="5"),
    Bad(
        "half of a surrogate pair",
        b'{"text": "a"}\n{"text": "caf\\ud83d"}\n',
        "half of a surrogate pair",
        ROW_2,
        path="text",
        value="\\ud83d",
    ),
    Bad("text that is empty", [{"text": "a"}, {"text": " "}], "is empty", ROW_2, path="text"),
    Bad(
        "a completion that is a list",
        [{"prompt": "p", "completion": ["c"]}],
        "must be text, not a list",
        "train.jsonl:1",
        path="completion",
    ),
    Bad(
        "an alpaca input that is an object",
        [{"instruction": "i", "input": {"a": 1}, "output": "o"}],
        "must be text",
        "train.jsonl:1",
        path="input",
        value='{"a": 1}',
    ),
    Bad("an empty alpaca answer", [{"instruction": "i", "output": ""}], "is empty", "train.jsonl:1", path="output"),
    Bad(
        "sharegpt turns under messages",
        [GOOD, {"messages": [{"from": "human", "value": "q"}]}],
        "set format: sharegpt",
        ROW_2,
        path="messages[0]",
    ),
    Bad(
        "messages under conversations",
        [{"conversations": [USER, ASSISTANT]}],
        "set format: messages and columns.messages: conversations",
        "train.jsonl:1",
        path="conversations[0]",
    ),
    Bad(
        "a sharegpt speaker that is unknown",
        [{"conversations": [{"from": "alien", "value": "q"}, {"from": "gpt", "value": "a"}]}],
        "must be one of system, human, user, gpt",
        "train.jsonl:1",
        path="conversations[0].from",
        value='"alien"',
    ),
    Bad(
        "two system messages in a sharegpt row",
        [{"system": "s", "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]}],
        "stands beside a system message",
        "train.jsonl:1",
        path="system",
    ),
    # Messages and roles
    Bad("messages that are text", [GOOD, {"messages": "hi"}], "must be a list of messages", ROW_2, value='"hi"'),
    Bad("a conversation of no messages", messages(), "is empty; it must hold at least", ROW_2, path="messages"),
    Bad("a message that is text", messages("hi"), "must be an object", ROW_2, path="messages[0]", value='"hi"'),
    Bad("a message without a role", messages({"content": "x"}), "is missing", ROW_2, path="messages[0].role"),
    Bad("a message without content", messages({"role": "user"}), "is missing", ROW_2, path="messages[0].content"),
    Bad(
        "an unknown role",
        messages({"role": "bot", "content": "x"}, ASSISTANT),
        "use system, user or assistant",
        ROW_2,
        path="messages[0]",
        value='"bot"',
    ),
    Bad(
        "a system message in the middle", messages(USER, SYSTEM, ASSISTANT), "only the first", ROW_2, path="messages[1]"
    ),
    Bad(
        "two questions in a row", messages(USER, USER, ASSISTANT), "must be the assistant's", ROW_2, path="messages[1]"
    ),
    Bad("an answer before the question", messages(ASSISTANT, USER), "must be the user's", ROW_2, path="messages[0]"),
    Bad("a question at the end", messages(USER, ASSISTANT, USER), "is the last message", ROW_2, path="messages[2]"),
    Bad("a system message alone", messages(SYSTEM), "is the last message", ROW_2, path="messages[0]", value='"system"'),
    Bad(
        "an empty answer",
        messages(USER, {"role": "assistant", "content": ""}),
        "is empty",
        ROW_2,
        path="messages[1].content",
        value='""',
    ),
    Bad(
        "an answer of blanks",
        messages(USER, {"role": "assistant", "content": " \n"}),
        "is empty",
        ROW_2,
        path="messages[1].content",
    ),
    Bad(
        "content that is a number",
        messages({"role": "user", "content": 7}, ASSISTANT),
        "must be text, not a number",
        ROW_2,
        path="messages[0].content",
        value="7",
    ),
    Bad(
        "an image in a message",
        messages({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT),
        "only parts of type text",
        ROW_2,
        path="messages[0].content[0]",
    ),
    Bad(
        "a tool's message",
        messages(USER, {"role": "tool", "content": "x"}, ASSISTANT),
        "a tool's message",
        ROW_2,
        path="messages[1]",
    ),
    Bad(
        "a call of a tool",
        messages(USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}),
        "calls a tool",
        ROW_2,
        path="messages[1].tool_calls",
    ),
    # Judged answers
    Bad(
        "pairs for supervised fine-tuning",
        [PAIR],
        "which is preference, and the job's method does not learn from that. Known are messages",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        value="auto",
    ),
    Bad(
        "good and bad answers for supervised fine-tuning",
        [RATED],
        "would learn from bad ones too; leave out the bad ones and name the format, or use method.kto",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        value="auto",
    ),
    Bad(
        "conversations for DPO",
        [GOOD],
        "the columns are messages, which is messages, and the job's method does not learn from that."
        " Known are preference: chosen and rejected",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        changes=DPO,
    ),
    Bad("a pair with one answer", [PAIR, without("rejected")], "has no column 'rejected'", ROW_2, changes=DPO),
    Bad(
        "a pair of the same answers",
        [PAIR, PAIR | {"rejected": "better"}],
        "is the same as chosen, so there is nothing to prefer; remove the row",
        ROW_2,
        path="rejected",
        value="better",
        changes=DPO,
    ),
    Bad("an empty answer of a pair", [PAIR, PAIR | {"chosen": " "}], "is empty", ROW_2, path="chosen", changes=DPO),
    Bad(
        "an answer of a pair that is a number",
        [PAIR, PAIR | {"rejected": 7}],
        "must be text, not a number",
        ROW_2,
        path="rejected",
        value="7",
        changes=DPO,
    ),
    Bad(
        "a pair of a text and messages",
        [PAIR, PAIR | {"chosen": [ASSISTANT]}],
        "must be of the same kind as chosen: text or messages, and it is text",
        ROW_2,
        path="rejected",
        changes=DPO,
    ),
    Bad(
        "a pair whose conversations part early",
        [PAIRS, {"chosen": [USER, ASSISTANT], "rejected": [USER | {"content": "x"}, WORSE]}],
        "and chosen must be the same conversation up to the last message",
        ROW_2,
        path="rejected",
        changes=DPO,
    ),
    Bad(
        "answers without a prompt",
        [PAIR, without("prompt")],
        "begins with the assistant's message, and there is no prompt before it; add a column 'prompt'",
        ROW_2,
        path="chosen",
        changes=DPO,
    ),
    Bad(
        "a prompt that ends with an answer",
        [PAIR, PAIR | {"prompt": [USER, ASSISTANT]}],
        "must end with the user's message, which is answered",
        ROW_2,
        path="prompt",
        value="assistant",
        changes=DPO,
    ),
    Bad(
        "an answer of two messages",
        [PAIR, {"prompt": "x", "chosen": [ASSISTANT, USER, ASSISTANT], "rejected": [WORSE]}],
        "must hold the answer alone",
        ROW_2,
        path="chosen",
        value="3 messages",
        changes=DPO,
    ),
    Bad(
        "a prompt that is not the conversation's",
        [PAIRS, PAIRS | {"prompt": "something else"}],
        "does not begin with prompt; remove one of them",
        ROW_2,
        path="chosen",
        changes=DPO,
    ),
    Bad(
        "a role that is unknown in an answer",
        [PAIR, PAIR | {"chosen": [{"role": "bot", "content": "x"}], "rejected": [WORSE]}],
        "does not begin with prompt",
        ROW_2,
        path="chosen",
        changes=DPO,
    ),
    *(
        Bad(
            f"a margin that is {what}",
            [PAIR, PAIR | {"margin": value}],
            "must be a number of at least 0",
            ROW_2,
            path="margin",
            changes={"method": {"reward": {"maxSeqLength": 64}}},
        )
        for what, value in (("text", "much"), ("negative", -1), ("a truth value", True))
    ),
    Bad(
        "a pair with one answer that is too long",
        [PAIR, PAIR | {"rejected": "one two three " * 60}],
        "is longer than maxSeqLength 64; raise it, or set longRows to truncate or drop",
        ROW_2,
        path="rejected",
        value=" tokens",
        changes=DPO,
    ),
    Bad(
        "pairs that are all dropped as too long",
        [PAIR | {"rejected": "one two three " * 60}],
        "has no row that fits into maxSeqLength 64",
        path=SOURCE,
        changes={"method": {"dpo": {"maxSeqLength": 64, "longRows": "drop"}}},
    ),
    Bad(
        "preferences for a tokenizer without template",
        [PAIR],
        "brings no chat template, which data of format preference needs; set it to chatml",
        path="spec.model.chatTemplate",
        value="tokenizer",
        template=None,
        error=UserError,
        changes=DPO,
    ),
    Bad(
        "pairs for KTO",
        [PAIR],
        "which is preference, and the job's method does not learn from that. Known are unpaired-preference",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        changes=KTO,
    ),
    *(
        Bad(
            f"a label that is {what}",
            [RATED, RATED | {"label": value}],
            f"{says} must be true for a good answer or false for a bad one",
            ROW_2,
            path="label",
            changes=KTO,
        )
        for what, value, says in (
            ("missing", None, "is missing; it"),
            ("a word", "good", "is not a judgement; it"),
            ("a mark out of five", 4, "is not a judgement; it"),
        )
    ),
    # Questions
    Bad(
        "questions with answers for GRPO",
        [{"instruction": "one", "output": "two"}],
        "which is alpaca, and the job's method does not learn from that. Known are prompt: prompt",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        changes=asking(),
    ),
    Bad(
        "questions alone for supervised fine-tuning",
        [ASKED],
        "the columns are prompt, answer, which is prompt, and the job's method does not learn from that",
        "train.jsonl:1",
        path="spec.data.train[0].format",
    ),
    Bad("a row without a question", [ASKED, {"answer": "x"}], "has no column 'prompt'", ROW_2, changes=asking()),
    Bad("an empty question", [ASKED, {"prompt": " "}], "is empty", ROW_2, path="prompt", changes=asking()),
    Bad(
        "a question of no messages",
        [ASKED, {"prompt": []}],
        "is empty; it must hold at least a user's message",
        ROW_2,
        path="prompt",
        changes=asking(),
    ),
    Bad(
        "a question that is a number",
        [ASKED, {"prompt": 7}],
        "must be text, not a number",
        ROW_2,
        path="prompt",
        value="7",
        changes=asking(),
    ),
    Bad(
        "a question that ends with its answer",
        [ASKED, {"prompt": [USER, ASSISTANT]}],
        "is the last message and must be the user's",
        ROW_2,
        path="prompt[1]",
        value="assistant",
        changes=asking(),
    ),
    Bad(
        "a question of a system message alone",
        [ASKED, {"prompt": [SYSTEM]}],
        "is the last message and must be the user's",
        ROW_2,
        path="prompt[0]",
        changes=asking(),
    ),
    Bad(
        "two system messages for a question",
        [ASKED, {"prompt": [SYSTEM, USER], "system": "s"}],
        "stands beside a system message",
        ROW_2,
        path="system",
        changes=asking(),
    ),
    Bad(
        "a column that is no JSON beside a question",
        {"a.parquet": parquet(prompt=["p", "q"], taken=[None, datetime(2026, 1, 1)])},
        "holds datetime, and rewards are given every column as JSON; remove the column",
        "a.parquet:2",
        path="taken",
        changes=asking() | source("a.parquet"),
    ),
    Bad(
        "a question that leaves no room for an answer",
        [ASKED, {"prompt": "one two three " * 12}],
        "is longer than maxSeqLength 64 - sampling.maxNewTokens 16; raise maxSeqLength, or set longRows to drop",
        ROW_2,
        value=" tokens",
        changes=asking(),
    ),
    Bad(
        "questions that are all dropped as too long",
        [{"prompt": "one two three " * 60}],
        "has no row that fits into maxSeqLength 64 - sampling.maxNewTokens 16",
        path=SOURCE,
        changes=asking(longRows="drop"),
    ),
    Bad(
        "a template that asks nothing",
        [ASKED],
        "becomes no tokens, so there is nothing to answer",
        "train.jsonl:1",
        template="{% if false %}{{ messages }}{% endif %}",
        changes=asking(),
    ),
    Bad(
        "a template that refuses a question",
        [ASKED],
        "chat template refuses the conversation: not today",
        "train.jsonl:1",
        template="{{ raise_exception('not today') }}",
        changes=asking(),
    ),
    Bad(
        "questions for a tokenizer without template",
        [ASKED],
        "brings no chat template, which data of format prompt needs; set it to chatml",
        path="spec.model.chatTemplate",
        value="tokenizer",
        template=None,
        error=UserError,
        changes=asking(),
    ),
    # Tokens and templates
    Bad(
        "a row longer than the limit",
        [GOOD, LONG],
        "is longer than maxSeqLength 64; raise it, or set longRows to truncate or drop",
        ROW_2,
        value=" tokens",
    ),
    Bad(
        "rows that are all dropped as too long",
        [LONG],
        "has no row that fits into maxSeqLength 64",
        path=SOURCE,
        changes={"method.sft.longRows": "drop"},
    ),
    Bad(
        "rows whose answers are all cut away",
        [LONG],
        "has no row that fits",
        path=SOURCE,
        changes={"method.sft.longRows": "truncate"},
    ),
    Bad(
        "a template that marks no answer",
        [GOOD],
        "has no token that could be trained on",
        "train.jsonl:1",
        template="{% for m in messages %}{{ m['content'] }}{% if false %}{% generation %}{% endgeneration %}{% endif %}"
        "{% endfor %}",
    ),
    Bad(
        "a template that refuses system messages",
        [GOOD, {"messages": [SYSTEM, USER, ASSISTANT]}],
        "chat template refuses the conversation: no system please",
        ROW_2,
        template="{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system please') }}{% endif %}"
        "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    ),
    Bad(
        "conversations for a tokenizer without template",
        [GOOD],
        "brings no chat template, which data of format messages needs; set it to chatml",
        path="spec.model.chatTemplate",
        value="tokenizer",
        template=None,
        error=UserError,
    ),
    Bad(
        "a weight that takes none of the rows",
        [GOOD, GOOD],
        "takes none of the source's 1 sequences; raise it",
        path="spec.data.train[0].weight",
        value="0.1",
        changes={"data.train.0.weight": 0.1},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_data_is_refused_with_its_place_and_what_would_be_right(
    case: Bad, workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_PVC_ROOT", "/nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(workshop.folder / "hub"))
    files = case.content if isinstance(case.content, dict) else {"train.jsonl": case.content}
    for name, content in files.items():
        workshop.write(name, content)
    if case.template != "chatml":
        workshop.with_template(case.template)

    with pytest.raises(TrainerError) as caught:
        workshop.prepare(case.changes)

    assert type(caught.value) is case.error
    problem = caught.value.problems[0]
    assert case.says in problem.message
    if case.file is not None:
        assert problem.file is not None
        assert case.file in problem.file
    else:
        assert problem.file is None
    assert case.path is None or problem.path == case.path
    assert case.value is None or case.value in (problem.value or "")
    assert problem.value is None or len(problem.value) <= 1024
    assert str(problem) in caught.value.message
    assert not list(workshop.cache.glob("data/*tmp*"))


def test_there_are_at_least_forty_bad_data_sets_and_no_two_have_the_same_name() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 40


def test_all_rows_are_checked_and_the_first_problems_listed_with_the_number_of_all(workshop: Any) -> None:
    rows = [GOOD if line % 2 else {"messages": [USER]} for line in range(1, 101)]
    workshop.write("train.jsonl", rows)
    workshop.write("eval.jsonl", [LONG])
    with pytest.raises(DataError, match=r"and 50 more problems") as caught:
        workshop.prepare({"data.eval": [{"source": "file://./eval.jsonl"}]})
    assert [problem.file for problem in caught.value.problems] == [
        f"train.jsonl:{line}" for line in range(2, 2 * MAX_LISTED + 1, 2)
    ]


def test_values_are_shortened_in_messages(workshop: Any) -> None:
    workshop.write("train.jsonl", [{"text": ["word"] * 1000}])
    with pytest.raises(DataError) as caught:
        workshop.prepare()
    value = caught.value.problems[0].value
    assert value is not None
    assert len(value) == 80


def test_a_row_past_max_rows_is_not_even_read(workshop: Any) -> None:
    workshop.write("train.jsonl", [GOOD, GOOD, {"messages": []}])
    assert workshop.prepare({"data.train.0.maxRows": 2}).train[0].num_rows == 2


def test_a_file_that_may_not_be_read_is_named(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root every file may be read, so the refusal is made here."""
    workshop.write("train.jsonl", [GOOD])

    def refuse(file: Path) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("finetune_trainers.data.cache._digest", refuse)
    with pytest.raises(DataError, match=r"train.jsonl: spec.data.train\[0\].source: cannot be read: Permission denied"):
        workshop.prepare()


def test_a_file_that_breaks_off_while_it_is_read_is_named(workshop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop.write("train.jsonl", [GOOD])
    real_open = Path.open

    def refuse(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name == "train.jsonl":
            raise OSError(5, "Input/output error", str(self))
        return real_open(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=r"train.jsonl: cannot be read: Input/output error"):
        workshop.prepare()


def test_a_cache_that_cannot_be_written_is_named(workshop: Any) -> None:
    workshop.write("train.jsonl", [GOOD])
    workshop.write("occupied", b"a file")
    workshop.cache = workshop.folder / "occupied" / "cache"
    with pytest.raises(StorageError, match="occupied/cache cannot be written"):
        workshop.prepare()


def test_hub_data_without_the_package_that_reads_it_says_what_to_install(
    workshop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install 'datasets"):
        find_files(DataSource(source="hf://team/numbers"), "spec.data.train[0]")


def test_problems_are_plain_json(workshop: Any) -> None:
    workshop.write("train.jsonl", b"{]\n")
    with pytest.raises(DataError) as caught:
        workshop.prepare()
    document = caught.value.problems[0].to_document()
    assert json.loads(json.dumps(document))["file"] == "train.jsonl:1"
