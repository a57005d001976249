"""Where jobs are: what the commands that people are told to type say of it, and what cannot be a place or a name."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_client import AsyncClient, Client
from finetune_client.advice import typed
from finetune_client.cli.exits import ABSENT, OK, UNREACHABLE
from finetune_client.errors import NoSuchJob
from finetune_client.views import JobView
from tests.client.conftest import JOB, Finetune

CLUSTER = {"name": "here", "cluster": {"server": "http://127.0.0.1:1"}}
CONTEXTS = [{"name": name, "context": {"cluster": "here", "user": "me"}} for name in ("test", "prod eu")]


@pytest.fixture
def kubeconfig(tmp_path: Path) -> Path:
    file = tmp_path / "config"
    users = [{"name": "me", "user": {}}]
    document = {"clusters": [CLUSTER], "contexts": CONTEXTS, "users": users, "current-context": "test"}
    file.write_text(yaml.safe_dump(document))
    return file


def place_of(**where: Any) -> str:
    async def ask() -> str:
        async with AsyncClient(**where) as client:
            return (await client.backend()).place

    return asyncio.run(ask())


def test_a_place_is_told_as_it_was_typed(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert place_of(local=True) == "--local"
    assert place_of(ray="http://127.0.0.1:8265/") == "--ray http://127.0.0.1:8265"
    assert place_of(ray="http://[::1]:8265") == "--ray 'http://[::1]:8265'", "some shells look for files by brackets"
    assert place_of(context="prod eu", kubeconfig=kubeconfig) == f"--context 'prod eu' --kubeconfig {kubeconfig}"
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    assert place_of() == ""


def test_a_command_to_type_names_the_place_where_it_is_not_the_usual_one() -> None:
    assert typed("logs", JobView.of(JOB), "-f") == "finetune logs -f tiny -n default"
    elsewhere = JobView("tiny", "team-a", JobView.of(JOB).status, JOB, "--local")
    assert typed("get", elsewhere) == "finetune get tiny -n team-a --local"


@pytest.mark.parametrize("name", ["", ".", "../tiny", "tiny/status", "tiny?x=1", "Tiny", "t" * 254])
def test_what_is_no_name_is_not_asked_for(name: str, finetune: Finetune) -> None:
    """An empty one would be all jobs of the namespace to an API server, and they would be cancelled."""
    with Client(local=True) as client, pytest.raises(NoSuchJob, match="is not the name of a job"):
        client.job(name)
    done = finetune("cancel", name, "--ray", "http://127.0.0.1:1")
    assert (done.code, done.stdout) == (ABSENT, "")


def test_a_name_that_we_would_not_give_may_be_there() -> None:
    with Client(local=True) as client:
        assert repr(client.job("0.my-job")) == "<Job 0.my-job in default>"
        with pytest.raises(NoSuchJob, match='"team/a" is not the name of a namespace'):
            client.job("tiny", namespace="team/a")


@pytest.mark.parametrize("address", ["http://", "https:///jobs", "ray://", "ray://:10001", "head:8265", "ftp://head"])
def test_what_is_no_address_is_said_before_anything_is_asked(address: str, finetune: Finetune) -> None:
    done = finetune("list", "--ray", address)
    assert done.code == UNREACHABLE
    assert f"{address} is not the address of a Ray cluster, such as http://HEAD:8265" in done.stderr


def test_what_is_typed_counts_more_than_what_the_environment_says(
    finetune: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("FINETUNE_RAY", "http://127.0.0.1:1")
    assert "http://127.0.0.1:1 does not answer" in finetune("list").stderr
    assert finetune("list", "--local").code == OK
    both = finetune("list", "--local", "--ray", "http://127.0.0.1:2")
    assert (both.code, "name one place" in both.stderr) == (UNREACHABLE, True)


def test_who_has_no_kubernetes_is_told_of_the_other_places(
    finetune: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = finetune("list")
    assert done.code == UNREACHABLE
    assert done.stderr.endswith("Without Kubernetes: --local is this machine, --ray URL a Ray cluster\n")
