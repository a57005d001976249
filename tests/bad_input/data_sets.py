"""Bad data sets. A row names the files of the job's data and changes to the job."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from tests.bad_input.rows import ABOUT_THE_DATA, ABOUT_THE_JOB, MANIFEST, MODEL, Row
from tests.factories import job_document

__all__ = ["DATA_SETS", "write_job"]

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


def bad(
    what: str,
    content: Any,
    right: str,
    file: str = MANIFEST,
    path: str | None = None,
    value: str | None = None,
    changes: Mapping[str, Any] | None = None,
    template: str | None = "chatml",
    code: int = ABOUT_THE_DATA,
) -> Row:
    """`content` is train.jsonl's, or a dict of files by name; rows or bytes. `template` is a stored one, the
    tokenizer's own, or None."""
    files = content if isinstance(content, dict) else {"train.jsonl": content}
    write = partial(write_all, files, changes or {}, template)
    return Row(what, write, right, file, path, value, code, found_by_looking=True)


def write_all(
    files: Mapping[str, bytes | Sequence[Any]], changes: Mapping[str, Any], template: str | None, folder: Path
) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        lines = content if isinstance(content, bytes) else b"".join(json.dumps(row).encode() + b"\n" for row in content)
        (folder / name).write_bytes(lines)
    if template in (None, "chatml"):
        write_job(folder, {"model.chatTemplate": template or "tokenizer", **changes})
    else:
        (folder / MODEL / "chat_template.jinja").write_text(str(template))
        write_job(folder, changes)


def write_job(folder: Path, changes: Mapping[str, Any]) -> None:
    """A job on the folder's model and train.jsonl, with 64 tokens a sequence unless `changes` say otherwise."""
    document = job_document(
        {
            "model.source": f"file://./{MODEL}",
            "data": {"train": [{"source": "file://./train.jsonl"}]},
            **({} if "method" in changes else {"method.sft.maxSeqLength": 64}),
            **changes,
        }
    )
    (folder / MANIFEST).write_text(yaml.safe_dump(document, sort_keys=False))


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

DATA_SETS = [
    # Files
    bad(
        "a file that is not there",
        {},
        "does not exist: there is no file or folder at",
        path=SOURCE,
        value="file://./train.jsonl",
    ),
    bad("an empty file", b"", "has no rows; fill it, or remove the source", path=SOURCE, value="file://./train.jsonl"),
    bad(
        "a file of blank lines",
        b"\n\n  \n",
        "has no rows; fill it, or remove the source",
        path=SOURCE,
        value="file://./train.jsonl",
    ),
    bad(
        "a glob that matches nothing",
        {"a.csv": b"x"},
        "matches no file; correct the pattern",
        path=SOURCE,
        changes=source("*.jsonl"),
        value="file://./*.jsonl",
    ),
    bad(
        "a glob that matches no data",
        {"a.md": b"x"},
        "matches no data files; they end in .jsonl",
        path=SOURCE,
        changes=source("*.md"),
        value="file://./*.md",
    ),
    bad(
        "an empty folder",
        {"d/.keep": b""},
        "folder without data files; they end in .jsonl",
        path=SOURCE,
        changes=source("d"),
        value="file://./d",
    ),
    bad(
        "a folder with two kinds of files",
        {"d/a.jsonl": [GOOD], "d/b.csv": b"text\nx\n"},
        "holds .csv and .jsonl files; name one kind by a glob",
        path=SOURCE,
        changes=source("d"),
        value="file://./d",
    ),
    bad(
        "a file of an unknown kind",
        {"a.xlsx": b"x"},
        "has the suffix '.xlsx'; data files end in .jsonl",
        path=SOURCE,
        changes=source("a.xlsx"),
        value="file://./a.xlsx",
    ),
    bad(
        "a compressed file",
        {"a.jsonl.gz": b"x"},
        "has the suffix '.gz'; data files end in .jsonl",
        path=SOURCE,
        changes=source("a.jsonl.gz"),
        value="file://./a.jsonl.gz",
    ),
    bad(
        "a claim that is not mounted",
        {},
        "not mounted at /nowhere/team; mount it there, or set FINETUNE_PVC_ROOT",
        path=SOURCE,
        changes={"data.train.0.source": "pvc://team/a.jsonl"},
        value="pvc://team/a.jsonl",
    ),
    bad(
        "a package that is not installed",
        {},
        "'no_such_package', which is not installed here; pip install it",
        path=SOURCE,
        changes={"data.train.0.source": "package://no_such_package/a.jsonl"},
        value="package://no_such_package/a.jsonl",
    ),
    bad(
        "a data set that is not in the Hub's cache",
        {},
        "not in the local Hub cache, and the Hub cannot be reached; name a file",
        path=SOURCE,
        changes={"data.train.0.source": "hf://nobody/nothing"},
        value="hf://nobody/nothing",
    ),
    bad(
        "an evaluation file that is not there",
        [GOOD],
        "eval.jsonl; correct the path",
        path="spec.data.eval[0].source",
        changes={"data.eval": [{"source": "file://./eval.jsonl"}]},
        value="file://./eval.jsonl",
    ),
    # JSON
    bad(
        "broken JSON in line 3",
        b'{"text": "a"}\n\n{"text": \n',
        "Expecting value at column 10",
        "train.jsonl:3",
        value='{"text":',
    ),
    bad("a line of plain words", [GOOD, "hello"], "is not an object with columns; write {", ROW_2, value='"hello"'),
    bad(
        "a list in the place of a row", [GOOD, [1, 2]], "is not an object with columns; write {", ROW_2, value="[1, 2]"
    ),
    bad("null in the place of a row", [GOOD, None], "is not an object with columns; write {", ROW_2, value="null"),
    bad(
        "only rows that are no objects",
        [1, 2],
        "is not an object with columns; write {",
        "train.jsonl:1",
        value="1",
        path="spec.data.train[0]",
    ),
    bad(
        "two objects in one line",
        b'{"text": "a"} {"text": "b"}\n',
        "Extra data at column 15",
        "train.jsonl:1",
        value='{"text": "a"} {"text": "b"}',
    ),
    bad("a line that ends too soon", b'{"text": "a"}\n{"text": "b', "not valid JSON", ROW_2, value='{"text": "b'),
    bad(
        "Latin-1 in line 2",
        b'{"text": "a"}\n{"text": "caf\xe9"}\n',
        "not UTF-8 text: byte 0xe9; save the file as UTF-8",
        ROW_2,
        value='{"text": "caf\ufffd"}',
    ),
    bad(
        "UTF-16",
        '{"text": "a"}'.encode("utf-16"),
        "not UTF-8 text: byte 0xff; save the file as UTF-8",
        "train.jsonl:1",
        value="\ufffd\ufffd{…",
    ),
    bad(
        "JSON nested without end",
        b"[" * 100_000 + b"\n",
        "nested too deeply for JSON data; a row is one object with columns",
        "train.jsonl:1",
        value="[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[…",
    ),
    bad(
        "a .json file with an object that goes on and on",
        {"a.json": b'{ "text":\n'},
        "not valid JSON",
        "a.json:1",
        changes=source("a.json"),
        value='{ "text":',
    ),
    bad(
        "a .json list with a comma too many",
        {"a.json": b'[{"text": "a"},\n]\n'},
        "not valid JSON",
        "a.json:2",
        changes=source("a.json"),
        value="]",
    ),
    bad(
        "a .json file with a string",
        {"a.json": b'"x"'},
        "must be a list of objects",
        "a.json",
        changes=source("a.json"),
        value='"x"',
    ),
    # Parquet, CSV, text
    bad("a .parquet file that is none", {"a.parquet": b"PAR1 no"}, "Parquet", "a.parquet", changes=source("a.parquet")),
    bad(
        "a .parquet file cut short",
        {"a.parquet": parquet(text=["a"] * 50)[:-30]},
        "; write it again",
        "a.parquet",
        changes=source("a.parquet"),
    ),
    bad(
        "null in row 2 of a .parquet file",
        {"a.parquet": parquet(text=["a", None])},
        "is missing; it must be text",
        "a.parquet:2",
        path="text",
        changes=source("a.parquet"),
    ),
    bad(
        "numbers in a .parquet file",
        {"a.parquet": parquet(text=[1])},
        "must be text, not a number",
        "a.parquet:1",
        path="text",
        value="1",
        changes=source("a.parquet"),
    ),
    bad(
        "a .parquet file without rows",
        {"a.parquet": parquet(text=pyarrow.array([], pyarrow.string()))},
        "has no rows; fill it, or remove the source",
        path=SOURCE,
        changes=source("a.parquet"),
        value="file://./a.parquet",
    ),
    bad(
        "a .csv file without the column",
        {"a.csv": b"question,answer\nq,a\n"},
        "fits no format: the columns are question, answer",
        "a.csv:2",
        path="spec.data.train[0].format",
        changes=source("a.csv"),
        value="auto",
    ),
    bad(
        "a .csv record with too many fields",
        {"a.csv": b"prompt,completion\nq,a\nq,a,b\n"},
        "has 3 fields, but the header has 2; put commas into quotes",
        "a.csv:3",
        value="q,a,b",
        changes=source("a.csv"),
    ),
    bad(
        "a .csv quote that is never closed",
        {"a.csv": b'text\nfine\n"open\nmore\n'},
        "; close the quote that is open",
        "a.csv:3",
        changes=source("a.csv"),
    ),
    bad(
        "a .csv file with only a header",
        {"a.csv": b"text\n"},
        "has no rows; fill it, or remove the source",
        path=SOURCE,
        changes=source("a.csv"),
        value="file://./a.csv",
    ),
    bad(
        "a .csv header with one name twice",
        {"a.csv": b"text,text\na,b\n"},
        "names a column twice in the header; rename one",
        "a.csv:1",
        value="text",
        changes=source("a.csv"),
    ),
    bad(
        "Latin-1 in a .csv file",
        {"a.csv": b"text\na\ncaf\xe9\n"},
        "not UTF-8 text; save the file as UTF-8",
        "a.csv:3",
        changes=source("a.csv"),
        value="caf\ufffd",
    ),
    bad(
        "Latin-1 in a .txt file",
        {"a.txt": b"one\ncaf\xe9\n"},
        "not UTF-8 text: byte 0xe9; save the file as UTF-8",
        "a.txt:2",
        changes=source("a.txt"),
        value="one\ncaf\ufffd\n",
    ),
    bad(
        "a .txt file of blanks",
        {"a.txt": b" \n "},
        "is empty; it must hold text",
        "a.txt",
        path="text",
        changes=source("a.txt"),
        value='" \\n "',
    ),
    # Formats and columns
    bad(
        "columns of no format",
        [{"question": "q", "answer": "a"}],
        "fits no format: the columns are question, answer",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        value="auto",
    ),
    bad(
        "columns of two formats",
        [{"text": "t", **GOOD}],
        "set it to messages or text",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        value="auto",
    ),
    bad("a later row without the column", [GOOD, {"text": "t"}], "has no column 'messages'", ROW_2, path="messages"),
    bad(
        "a named format that the rows do not have",
        [GOOD],
        "has no column 'instruction', which the format alpaca needs",
        "train.jsonl:1",
        changes=source("train.jsonl", format="alpaca"),
        path="instruction",
    ),
    bad(
        "a mapped column that is not there",
        [GOOD],
        "has no column 'chat'",
        "train.jsonl:1",
        changes=source("train.jsonl", format="messages", columns={"messages": "chat"}),
        path="chat",
    ),
    bad(
        "a mapping for another format",
        [GOOD],
        "is not a column of the format messages, which has messages; remove it",
        "train.jsonl:1",
        path="spec.data.train[0].columns.text",
        value='"body"',
        changes=source("train.jsonl", format="messages", columns={"text": "body"}),
    ),
    bad("text that is a number", [{"text": 5}], "must be text, not a number", "train.jsonl:1", path="text", value="5"),
    bad(
        "half of a surrogate pair, which is no character; remove it",
        b'{"text": "a"}\n{"text": "caf\\ud83d"}\n',
        "half of a surrogate pair, which is no character; remove it",
        ROW_2,
        path="text",
        value='"caf\\ud83d"',
    ),
    bad(
        "text that is empty",
        [{"text": "a"}, {"text": " "}],
        "is empty; it must hold text",
        ROW_2,
        path="text",
        value='" "',
    ),
    bad(
        "a completion that is a list",
        [{"prompt": "p", "completion": ["c"]}],
        "must be text, not a list",
        "train.jsonl:1",
        path="completion",
        value='["c"]',
    ),
    bad(
        "an alpaca input that is an object",
        [{"instruction": "i", "input": {"a": 1}, "output": "o"}],
        "must be text",
        "train.jsonl:1",
        path="input",
        value='{"a": 1}',
    ),
    bad(
        "an empty alpaca answer",
        [{"instruction": "i", "output": ""}],
        "is empty; it must hold text",
        "train.jsonl:1",
        path="output",
        value='""',
    ),
    bad(
        "sharegpt turns under messages",
        [GOOD, {"messages": [{"from": "human", "value": "q"}]}],
        "set format: sharegpt",
        ROW_2,
        path="messages[0]",
        value='{"from": "human", "value": "q"}',
    ),
    bad(
        "messages under conversations",
        [{"conversations": [USER, ASSISTANT]}],
        "set format: messages and columns.messages: conversations",
        "train.jsonl:1",
        path="conversations[0]",
        value='{"role": "user", "content": "one two"}',
    ),
    bad(
        "a sharegpt speaker that is unknown",
        [{"conversations": [{"from": "alien", "value": "q"}, {"from": "gpt", "value": "a"}]}],
        "must be one of system, human, user, gpt",
        "train.jsonl:1",
        path="conversations[0].from",
        value='"alien"',
    ),
    bad(
        "two system messages in a sharegpt row",
        [{"system": "s", "conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}]}],
        "stands beside a system message",
        "train.jsonl:1",
        path="system",
    ),
    # Messages and roles
    bad(
        "messages that are text",
        [GOOD, {"messages": "hi"}],
        "must be a list of messages",
        ROW_2,
        value='"hi"',
        path="messages",
    ),
    bad(
        "a conversation of no messages",
        messages(),
        "is empty; it must hold at least",
        ROW_2,
        path="messages",
        value="[]",
    ),
    bad("a message that is text", messages("hi"), "must be an object", ROW_2, path="messages[0]", value='"hi"'),
    bad("a message without a role", messages({"content": "x"}), "is missing", ROW_2, path="messages[0].role"),
    bad("a message without content", messages({"role": "user"}), "is missing", ROW_2, path="messages[0].content"),
    bad(
        "an unknown role",
        messages({"role": "bot", "content": "x"}, ASSISTANT),
        "use system, user or assistant",
        ROW_2,
        path="messages[0]",
        value='"bot"',
    ),
    bad(
        "a system message in the middle",
        messages(USER, SYSTEM, ASSISTANT),
        "only the first",
        ROW_2,
        path="messages[1]",
        value='"system"',
    ),
    bad(
        "two questions in a row",
        messages(USER, USER, ASSISTANT),
        "must be the assistant's",
        ROW_2,
        path="messages[1]",
        value='"user"',
    ),
    bad(
        "an answer before the question",
        messages(ASSISTANT, USER),
        "must be the user's",
        ROW_2,
        path="messages[0]",
        value='"assistant"',
    ),
    bad(
        "a question at the end",
        messages(USER, ASSISTANT, USER),
        "is the last message",
        ROW_2,
        path="messages[2]",
        value='"user"',
    ),
    bad("a system message alone", messages(SYSTEM), "is the last message", ROW_2, path="messages[0]", value='"system"'),
    bad(
        "an empty answer",
        messages(USER, {"role": "assistant", "content": ""}),
        "is empty; it must hold text",
        ROW_2,
        path="messages[1].content",
        value='""',
    ),
    bad(
        "an answer of blanks",
        messages(USER, {"role": "assistant", "content": " \n"}),
        "is empty; it must hold text",
        ROW_2,
        path="messages[1].content",
        value='" \\n"',
    ),
    bad(
        "content that is a number",
        messages({"role": "user", "content": 7}, ASSISTANT),
        "must be text, not a number",
        ROW_2,
        path="messages[0].content",
        value="7",
    ),
    bad(
        "an image in a message",
        messages({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ASSISTANT),
        "only parts of type text",
        ROW_2,
        path="messages[0].content[0]",
        value='{"type": "image_url", "image_url": "x"}',
    ),
    bad(
        "a tool's message",
        messages(USER, {"role": "tool", "content": "x"}, ASSISTANT),
        "a tool's message",
        ROW_2,
        path="messages[1]",
        value='"tool"',
    ),
    bad(
        "a call of a tool",
        messages(USER, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}),
        "calls a tool",
        ROW_2,
        path="messages[1].tool_calls",
    ),
    # Judged answers
    bad(
        "pairs for supervised fine-tuning",
        [PAIR],
        "which is preference, and the job's method does not learn from that. Known are messages",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        value="auto",
    ),
    bad(
        "good and bad answers for supervised fine-tuning",
        [RATED],
        "would learn from bad ones too; leave out the bad ones and name the format, or use method.kto",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        value="auto",
    ),
    bad(
        "conversations for DPO",
        [GOOD],
        "the columns are messages, which is messages, and the job's method does not learn from that."
        " Known are preference: chosen and rejected",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        changes=DPO,
        value="auto",
    ),
    bad(
        "a pair with one answer",
        [PAIR, without("rejected")],
        "has no column 'rejected'",
        ROW_2,
        changes=DPO,
        path="rejected",
    ),
    bad(
        "a pair of the same answers",
        [PAIR, PAIR | {"rejected": "better"}],
        "is the same as chosen, so there is nothing to prefer; remove the row",
        ROW_2,
        path="rejected",
        value='"better"',
        changes=DPO,
    ),
    bad(
        "an empty answer of a pair",
        [PAIR, PAIR | {"chosen": " "}],
        "is empty; it must hold text",
        ROW_2,
        path="chosen",
        changes=DPO,
        value='" "',
    ),
    bad(
        "an answer of a pair that is a number",
        [PAIR, PAIR | {"rejected": 7}],
        "must be text, not a number",
        ROW_2,
        path="rejected",
        value="7",
        changes=DPO,
    ),
    bad(
        "a pair of a text and messages",
        [PAIR, PAIR | {"chosen": [ASSISTANT]}],
        "must be of the same kind as chosen: text or messages, and it is text",
        ROW_2,
        path="rejected",
        changes=DPO,
        value='"worse"',
    ),
    bad(
        "a pair whose conversations part early",
        [PAIRS, {"chosen": [USER, ASSISTANT], "rejected": [USER | {"content": "x"}, WORSE]}],
        "and chosen must be the same conversation up to the last message",
        ROW_2,
        path="rejected",
        changes=DPO,
    ),
    bad(
        "answers without a prompt",
        [PAIR, without("prompt")],
        "begins with the assistant's message, and there is no prompt before it; add a column 'prompt'",
        ROW_2,
        path="chosen",
        changes=DPO,
    ),
    bad(
        "a prompt that ends with an answer",
        [PAIR, PAIR | {"prompt": [USER, ASSISTANT]}],
        "must end with the user's message, which is answered",
        ROW_2,
        path="prompt",
        value='"assistant"',
        changes=DPO,
    ),
    bad(
        "an answer of two messages",
        [PAIR, {"prompt": "x", "chosen": [ASSISTANT, USER, ASSISTANT], "rejected": [WORSE]}],
        "must hold the answer alone",
        ROW_2,
        path="chosen",
        value="3 messages",
        changes=DPO,
    ),
    bad(
        "a prompt that is not the conversation's",
        [PAIRS, PAIRS | {"prompt": "something else"}],
        "does not begin with prompt; remove one of them",
        ROW_2,
        path="chosen",
        changes=DPO,
    ),
    bad(
        "a role that is unknown in an answer",
        [PAIR, PAIR | {"chosen": [{"role": "bot", "content": "x"}], "rejected": [WORSE]}],
        "does not begin with prompt",
        ROW_2,
        path="chosen",
        changes=DPO,
    ),
    *(
        bad(
            f"a margin that is {what}",
            [PAIR, PAIR | {"margin": value}],
            "must be a number of at least 0",
            ROW_2,
            path="margin",
            value=json.dumps(value),
            changes={"method": {"reward": {"maxSeqLength": 64}}},
        )
        for what, value in (("text", "much"), ("negative", -1), ("a truth value", True))
    ),
    bad(
        "a pair with one answer that is too long",
        [PAIR, PAIR | {"rejected": "one two three " * 60}],
        "is longer than maxSeqLength 64; raise it, or set longRows to truncate or drop",
        ROW_2,
        path="rejected",
        value="867 tokens",
        changes=DPO,
    ),
    bad(
        "pairs that are all dropped as too long",
        [PAIR | {"rejected": "one two three " * 60}],
        "has no row that fits into maxSeqLength 64",
        path=SOURCE,
        changes={"method": {"dpo": {"maxSeqLength": 64, "longRows": "drop"}}},
        value="file://./train.jsonl",
    ),
    bad(
        "preferences for a tokenizer without template",
        [PAIR],
        "brings no chat template, which data of format preference needs; set it to chatml",
        path="spec.model.chatTemplate",
        value="tokenizer",
        template=None,
        code=ABOUT_THE_JOB,
        changes=DPO,
    ),
    bad(
        "pairs for KTO",
        [PAIR],
        "which is preference, and the job's method does not learn from that. Known are unpaired-preference",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        changes=KTO,
        value="auto",
    ),
    bad(
        "answers to one prompt for KTO",
        [RATED, RATED | {"label": False}],
        "answers one prompt only, and how far the policy has moved is measured by answers to other prompts; add rows"
        " with another prompt, or learn from pairs by dpo",
        path=SOURCE,
        changes=KTO,
        value="file://./train.jsonl",
    ),
    *(
        bad(
            f"answers for KTO that are all marked {what}",
            [RATED | {"label": label}, RATED | {"prompt": "three four", "label": label}],
            f"has 2 answers whose label is {json.dumps(label)} and none whose label is {json.dumps(not label)}",
            path="spec.data.train",
            changes=KTO,
        )
        for what, label in (("good", True), ("bad", False))
    ),
    *(
        bad(
            f"a label that is {what}",
            [RATED, RATED | {"label": value}],
            f"{says} must be true for a good answer or false for a bad one",
            ROW_2,
            path="label",
            value=json.dumps(value),
            changes=KTO,
        )
        for what, value, says in (
            ("missing", None, "is missing; it"),
            ("a word", "good", "is not a judgement; it"),
            ("a mark out of five", 4, "is not a judgement; it"),
        )
    ),
    # Questions
    bad(
        "questions with answers for GRPO",
        [{"instruction": "one", "output": "two"}],
        "which is alpaca, and the job's method does not learn from that. Known are prompt: prompt",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        changes=asking(),
        value="auto",
    ),
    bad(
        "questions alone for supervised fine-tuning",
        [ASKED],
        "the columns are prompt, answer, which is prompt, and the job's method does not learn from that",
        "train.jsonl:1",
        path="spec.data.train[0].format",
        value="auto",
    ),
    bad(
        "a row without a question",
        [ASKED, {"answer": "x"}],
        "has no column 'prompt'",
        ROW_2,
        changes=asking(),
        path="prompt",
    ),
    bad(
        "an empty question",
        [ASKED, {"prompt": " "}],
        "is empty; it must hold text",
        ROW_2,
        path="prompt",
        changes=asking(),
        value='" "',
    ),
    bad(
        "a question of no messages",
        [ASKED, {"prompt": []}],
        "is empty; it must hold at least a user's message",
        ROW_2,
        path="prompt",
        changes=asking(),
        value="[]",
    ),
    bad(
        "a question that is a number",
        [ASKED, {"prompt": 7}],
        "must be text, not a number",
        ROW_2,
        path="prompt",
        value="7",
        changes=asking(),
    ),
    bad(
        "a question that ends with its answer",
        [ASKED, {"prompt": [USER, ASSISTANT]}],
        "is the last message and must be the user's",
        ROW_2,
        path="prompt[1]",
        value='"assistant"',
        changes=asking(),
    ),
    bad(
        "a question of a system message alone",
        [ASKED, {"prompt": [SYSTEM]}],
        "is the last message and must be the user's",
        ROW_2,
        path="prompt[0]",
        changes=asking(),
        value='"system"',
    ),
    bad(
        "two system messages for a question",
        [ASKED, {"prompt": [SYSTEM, USER], "system": "s"}],
        "stands beside a system message",
        ROW_2,
        path="system",
        changes=asking(),
    ),
    bad(
        "a column that is no JSON beside a question",
        {"a.parquet": parquet(prompt=["p", "q"], taken=[None, datetime(2026, 1, 1)])},
        "holds datetime, and rewards are given every column as JSON; remove the column",
        "a.parquet:2",
        path="taken",
        changes=asking() | source("a.parquet"),
        value="datetime.datetime(2026, 1, 1, 0, 0)",
    ),
    bad(
        "a question that leaves no room for an answer",
        [ASKED, {"prompt": "one two three " * 12}],
        "is longer than maxSeqLength 64 - sampling.maxNewTokens 16; raise maxSeqLength, or set longRows to drop",
        ROW_2,
        value="187 tokens",
        changes=asking(),
    ),
    bad(
        "questions that are all dropped as too long",
        [{"prompt": "one two three " * 60}],
        "has no row that fits into maxSeqLength 64 - sampling.maxNewTokens 16",
        path=SOURCE,
        changes=asking(longRows="drop"),
        value="file://./train.jsonl",
    ),
    bad(
        "a template that asks nothing",
        [ASKED],
        "becomes no tokens, so there is nothing to answer; choose another chatTemplate",
        "train.jsonl:1",
        template="{% if false %}{{ messages }}{% endif %}",
        changes=asking(),
    ),
    bad(
        "a template that refuses a question",
        [ASKED],
        "chat template refuses the conversation: not today; change the row, or the chatTemplate",
        "train.jsonl:1",
        template="{{ raise_exception('not today') }}",
        changes=asking(),
    ),
    bad(
        "questions for a tokenizer without template",
        [ASKED],
        "brings no chat template, which data of format prompt needs; set it to chatml",
        path="spec.model.chatTemplate",
        value="tokenizer",
        template=None,
        code=ABOUT_THE_JOB,
        changes=asking(),
    ),
    # Tokens and templates
    bad(
        "a row longer than the limit",
        [GOOD, LONG],
        "is longer than maxSeqLength 64; raise it, or set longRows to truncate or drop",
        ROW_2,
        value="870 tokens",
    ),
    bad(
        "rows that are all dropped as too long",
        [LONG],
        "has no row that fits into maxSeqLength 64",
        path=SOURCE,
        changes={"method.sft.longRows": "drop"},
        value="file://./train.jsonl",
    ),
    bad(
        "rows whose answers are all cut away",
        [LONG],
        "has no row that fits",
        path=SOURCE,
        changes={"method.sft.longRows": "truncate"},
        value="file://./train.jsonl",
    ),
    bad(
        "a template that marks no answer",
        [GOOD],
        "has no token that could be trained on: the answer becomes none; choose another chatTemplate",
        "train.jsonl:1",
        template="{% for m in messages %}{{ m['content'] }}{% if false %}{% generation %}{% endgeneration %}{% endif %}"
        "{% endfor %}",
    ),
    bad(
        "a template that refuses system messages",
        [GOOD, {"messages": [SYSTEM, USER, ASSISTANT]}],
        "chat template refuses the conversation: no system please; change the row, or the chatTemplate",
        ROW_2,
        template="{% for m in messages %}"
        "{% if m['role'] == 'system' %}{{ raise_exception('no system please') }}{% endif %}"
        "{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    ),
    bad(
        "conversations for a tokenizer without template",
        [GOOD],
        "brings no chat template, which data of format messages needs; set it to chatml",
        path="spec.model.chatTemplate",
        value="tokenizer",
        template=None,
        code=ABOUT_THE_JOB,
    ),
    bad(
        "a weight that takes none of the rows",
        [GOOD, GOOD],
        "takes none of the source's 2 sequences; raise it",
        path="spec.data.train[0].weight",
        value="0.1",
        changes={"data.train.0.weight": 0.1},
    ),
]
