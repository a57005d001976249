"""`finetune ckpt` on a bucket of a real S3 server, with credentials from the environment as people have them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from finetune_client.cli.app import app
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.storage.protocol import Storage
from tests.cluster.s3 import S3
from tests.trainers.checkpoint.saving import intent_of, save, start, write_all

pytestmark = pytest.mark.control_plane

Ckpt = Callable[..., Result]


@pytest.fixture
def ckpt(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Ckpt:
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(app, ["ckpt", *arguments], prog_name="finetune")
        for said in (result.stdout, result.stderr):
            assert s3.secret_key not in said
            assert "Traceback" not in said
        return result

    return run


@pytest.fixture
def saved(bucket: Storage) -> Storage:
    """Steps 10, 20 and 30, long ago, and 40, which lacks only its manifest."""
    fence = start(bucket)
    for step in (10, 20, 30):
        save(bucket, fence, step)
    write_all(bucket, intent_of(fence, 40))
    return bucket


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_bucket_is_looked_at_without_a_write(ckpt: Ckpt, saved: Storage) -> None:
    before = sorted((stored.name, stored.bytes) for stored in saved.list(""))
    found = document(ckpt("ls", saved.uri, "--keep-last", "1", "-o", "json"))
    assert [(row["step"], row["state"]) for row in found["checkpoints"]] == [
        (40, "unfinished"),
        (30, "whole"),
        (20, "whole"),
        (10, "whole"),
    ]
    assert ckpt("verify", saved.uri, "--all", "--deep").exit_code == 0
    assert document(ckpt("plan", saved.uri, "--world", "3", "-o", "json"))["bytesNeeded"] == 4 * 5603
    said = document(ckpt("gc", saved.uri, "--keep-last", "1", "--dry-run", "-o", "json"))
    assert [one["id"][:10] for one in said["deleted"]] == ["0000000030", "0000000020", "0000000010"]
    assert sorted((stored.name, stored.bytes) for stored in saved.list("")) == before


def test_a_damaged_object_is_found(ckpt: Ckpt, saved: Storage) -> None:
    name = layout.shard(CheckpointId(1, 20), 0)
    data = bytearray(saved.read(name))
    data[5000] ^= 1
    saved.replace(name, bytes(data))
    done = ckpt("verify", saved.uri, "20", "--deep")
    assert done.exit_code == 20
    assert f"{name} model weight param [0, 1024)" in done.stdout


def test_a_bucket_is_put_in_order_and_swept(ckpt: Ckpt, saved: Storage) -> None:
    assert document(ckpt("repair", saved.uri, "-o", "json"))["completed"] == ["0000000040-e00001"]
    assert ckpt("pin", saved.uri, "10", "--reason", "for the paper").exit_code == 0
    assert ckpt("gc", saved.uri, "--keep-last", "1", "--yes").exit_code == 0
    assert sorted(checkpoint.step for checkpoint in listed(saved)) == [10, 40]


def test_wrong_keys_and_wrong_buckets_are_said_in_a_sentence(
    ckpt: Ckpt, saved: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ckpt("ls", "s3://no-such-bucket/run").exit_code == 6
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    done = ckpt("ls", saved.uri)
    assert done.exit_code == 6
    assert "not-the-secret" not in done.stdout + done.stderr
