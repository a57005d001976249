"""Storages to test the protocol on: a folder, objects in memory, and in the control plane lane a bucket of a real S3
server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainers.checkpoint.storage.objects import ObjectStorage
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from tests.cluster.build import BuildError, program_path
from tests.cluster.s3 import S3, s3_server
from tests.trainers.checkpoint.command import Ckpt


def _say(text: str) -> None:
    print(f"\n[s3] {text}", end="", flush=True, file=sys.__stderr__)


@pytest.fixture(scope="session")
def versitygw() -> Path:
    """The S3 server's program. It is built first, which takes minutes, on a machine that has none."""
    pytest.importorskip("obstore", reason="buckets need the package obstore")
    try:
        return program_path("versitygw", _say)
    except BuildError as error:
        pytest.skip(f"no S3 server: {error}")


@pytest.fixture(scope="session")
def s3(versitygw: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A real S3 server for this session."""
    with s3_server(versitygw, tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def bucket(s3: S3) -> Storage:
    """A new bucket."""
    return open_storage(f"s3://{s3.bucket()}/runs/a", options=s3.options())


@pytest.fixture
def server(s3: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> S3:
    """The server, which this process is told of as pods are: by variables. The cache is a new one."""
    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    return s3


@pytest.fixture
def ckpt(monkeypatch: pytest.MonkeyPatch) -> Ckpt:
    """`finetune ckpt` in this process."""
    return Ckpt(monkeypatch)


@pytest.fixture(params=["posix", "memory", pytest.param("s3", marks=pytest.mark.control_plane)])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """One of each kind, empty: a folder, obstore's own store in memory, a bucket."""
    if request.param == "posix":
        return PosixStorage(str(tmp_path / "run"))
    if request.param == "memory":
        store = pytest.importorskip("obstore.store", reason="buckets need the package obstore")
        return ObjectStorage(store.MemoryStore(), "runs/a", "memory://runs/a")
    found: Storage = request.getfixturevalue("bucket")
    return found
