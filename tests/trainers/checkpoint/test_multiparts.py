"""Uploads to a bucket whose writer died: told, aborted when they are old, and admitted where they cannot be seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage import multiparts
from finetune_trainers.checkpoint.storage.errors import StorageUnavailableError
from finetune_trainers.checkpoint.storage.multiparts import Keys, Upload, Uploads, signed_headers, uploads_of
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.sweep import sweep
from tests.cluster.s3 import S3
from tests.trainers.checkpoint.command import Ckpt
from tests.trainers.checkpoint.saving import save, start

DOCUMENTED = Keys("AKIAIOSFODNN7EXAMPLE", "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY")
"""Of the examples in the documentation of S3's signatures."""


@pytest.mark.parametrize(
    ("query", "signature"),
    [
        ("lifecycle=", "fea454ca298b7da1c68078a5d1bdbfbbe0d65c699e0f91ac7a200a0136783543"),
        ("max-keys=2&prefix=J", "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"),
    ],
)
def test_requests_are_signed_as_the_documentation_has_it(query: str, signature: str) -> None:
    url = f"https://examplebucket.s3.amazonaws.com/?{query}"
    headers = signed_headers("GET", url, "us-east-1", DOCUMENTED, datetime(2013, 5, 24, tzinfo=UTC))
    assert headers["authorization"].endswith(f"Signature={signature}")


def test_keys_that_are_lent_bring_their_token(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys("a", "b", "lent")
    headers = signed_headers("GET", "https://s3/b", "r", keys, datetime(2026, 1, 1, tzinfo=UTC))
    assert headers["x-amz-security-token"] == "lent"
    assert "x-amz-security-token" in headers["authorization"]


@pytest.mark.parametrize(
    ("options", "environment", "root"),
    [
        ({}, {}, None),
        ({}, {"AWS_ACCESS_KEY_ID": "a"}, None),
        ({}, {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}, "https://s3.us-east-1.amazonaws.com/bucket"),
        (
            {"access_key_id": "a", "secret_access_key": "b"},
            {"AWS_REGION": "eu-central-1"},
            "https://s3.eu-central-1.amazonaws.com/bucket",
        ),
        ({"access_key_id": "a", "secret_access_key": "b", "endpoint": "http://h:1/"}, {}, "http://h:1/bucket"),
        (
            {"access_key_id": "a", "secret_access_key": "b", "endpoint": "https://bucket.h"},
            {"AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true"},
            "https://bucket.h",
        ),
    ],
)
def test_the_bucket_is_looked_for_where_the_store_looks_for_it(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, str], environment: dict[str, str], root: str | None
) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION", "DEFAULT_REGION", "ENDPOINT_URL", "ENDPOINT"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = uploads_of("bucket", options)
    assert (None if found is None else found._root) == root


def test_a_store_that_is_away_is_said_to_be_away() -> None:
    with pytest.raises(StorageUnavailableError, match="unfinished uploads"):
        Uploads("http://127.0.0.1:9/bucket", "r", DOCUMENTED).open("")


Begin = Callable[[str], None]


@pytest.fixture
def place(s3: S3) -> str:
    return f"s3://{s3.bucket()}/runs/a"


@pytest.fixture
def begin(s3: S3, place: str) -> Begin:
    """Begins an upload below the place and goes away."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(place.split("/")[2], **s3.options(), client_options={"allow_http": True})

    def upload(name: str) -> None:
        writer = obstore.open_writer(store, f"runs/a/{name}", buffer_size=5 << 20)
        writer.write(bytes(11 << 20))

    return upload


def old(monkeypatch: pytest.MonkeyPatch) -> None:
    """A day and an hour go by."""
    inner = multiparts._uploads
    later = lambda page, now: [Upload(one.key, one.id, one.age_seconds + 90_000) for one in inner(page, now)]  # noqa: E731
    monkeypatch.setattr(multiparts, "_uploads", later)


@pytest.mark.control_plane
def test_an_upload_whose_writer_died_goes_with_a_sweep_when_it_is_a_day_old(
    s3: S3, place: str, begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = open_storage(place, options=s3.options())
    fence = start(storage)
    save(storage, fence, 10)
    for name in ("export/a b+c.safetensors", "export/ä.safetensors"):
        begin(name)
    begin("b.safetensors")
    everything = uploads_of(place.split("/")[2], s3.options())
    assert everything is not None
    assert [upload.key for upload in everything.open("runs/a/export/") or ()] == [
        "runs/a/export/a b+c.safetensors",
        "runs/a/export/ä.safetensors",
    ]
    assert len(everything.open("") or ()) == 3
    assert sweep(storage, Retention(), fence).num_unfinished == 0, "they are young"
    old(monkeypatch)
    assert sweep(storage, Retention(), fence).num_unfinished == 3
    assert everything.open("") == []


@pytest.mark.control_plane
def test_gc_tells_of_them_and_where_it_cannot_what_to_do(
    s3: S3, place: str, begin: Begin, ckpt: Ckpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    storage = open_storage(place)
    save(storage, start(storage), 10)
    begin("export/a.safetensors")
    old(monkeypatch)
    planned = json.loads(ckpt("gc", place, "--dry-run", "-o", "json").stdout)
    assert (planned["unfinished"], planned["notes"]) == (1, [])
    assert "1 file whose writer died deleted" in ckpt("gc", place, "--yes").stdout
    assert json.loads(ckpt("gc", place, "--yes", "-o", "json").stdout)["unfinished"] == 0
    monkeypatch.setattr(multiparts, "uploads_of", lambda *_: None)
    found = json.loads(ckpt("gc", place, "--dry-run", "-o", "json").stdout)
    assert found["unfinished"] is None
    assert "lifecycle rule that aborts incomplete multipart uploads" in found["notes"][0]


@pytest.mark.control_plane
def test_keys_that_may_not_look_are_no_failure(s3: S3, place: str) -> None:
    wrong = Uploads(f"{s3.endpoint}/{place.split('/')[2]}", "us-east-1", DOCUMENTED)
    assert wrong.open("") is None
