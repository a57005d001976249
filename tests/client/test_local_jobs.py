"""Jobs in the background of this machine: submitted, left alone, found again; the trainer is the fake one."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from finetune_api.job import Phase
from finetune_api.problems import InvalidManifest
from finetune_client import AsyncClient, Client, driven, runner
from finetune_client.backends.local import LocalDrivers
from finetune_client.backends.told import new_folder
from finetune_client.cli.exits import ABSENT
from finetune_client.errors import NoLog, NoSuchJob, Refused, Unreachable
from finetune_operator.kinds import Key
from tests.client.conftest import JOB, Finetune, WriteJob, wait_until
from tests.client.test_driver import PROGRAM
from tests.factories import with_changes

LASTING = {"spec.checkpoint": {"everySteps": 1}}


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    monkeypatch.setattr(driven, "PROGRAM", [sys.executable, "-c", PROGRAM])
    monkeypatch.setattr(runner, "NEEDED_PACKAGES", ())
    with Client(local=True, workdir=str(tmp_path / "jobs")) as one:
        yield one
        for view in one.list():
            one.job(view.name, view.namespace).cancel()


def test_a_job_goes_on_without_its_client_and_is_found_by_another(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRAINER", "waits")
    with Client(local=True, workdir=str(tmp_path / "jobs")) as first:
        first.submit(with_changes(JOB, LASTING))
    job = client.job("tiny")
    wait_until(lambda: job.status().phase is Phase.RUNNING)
    assert [view.place for view in (job.view(), *client.list())] == ["--local"] * 2
    with pytest.raises(InvalidManifest, match=r"metadata\.name: is the name of a job that is there already"):
        client.submit(JOB)
    job.suspend()
    assert job.wait().phase is Phase.SUSPENDED
    monkeypatch.setenv("FAKE_TRAINER", "")
    job.resume()
    assert [status.phase for status in job.watch()][-1] is Phase.SUCCEEDED
    assert [one.outcome for one in job.status().attempts] == ["Suspended", "Succeeded"]
    assert [line.text for line in job.logs(follow=True)] == ["the fake trainer starts"]
    assert next(line.text for line in job.logs(attempt=1)) == "the fake trainer starts"
    with pytest.raises(NoLog, match="attempts with a log: 1, 2"):
        list(job.logs(attempt=3))
    with pytest.raises(Refused, match="has ended"):
        job.suspend()
    job.cancel()
    with pytest.raises(NoSuchJob, match="there is no job tiny in namespace default"):
        job.status()
    assert list((tmp_path / "jobs").glob("default/tiny/*/outcome.json"))


def test_of_several_who_submit_a_name_at_once_one_begins_it_and_the_others_are_told(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRAINER", "waits")

    async def submitted() -> list[Any]:
        async with AsyncClient(local=True, workdir=str(tmp_path / "jobs")) as one:
            return await asyncio.gather(*(one.submit(JOB) for _ in range(4)), return_exceptions=True)

    found = asyncio.run(submitted())
    refused = [one for one in found if isinstance(one, InvalidManifest)]
    assert len(refused) == 3, found
    assert all("metadata.name" in str(one) and "job that is there already" in str(one) for one in refused)
    assert len(list((tmp_path / "jobs").glob("default/tiny/*.pid"))) == 1


def test_of_several_who_resume_a_job_at_once_one_starts_its_driver(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_TRAINER", "waits")
    job = client.submit(with_changes(JOB, LASTING))
    wait_until(lambda: job.status().phase is Phase.RUNNING)
    job.suspend()
    assert job.wait().phase is Phase.SUSPENDED
    [file] = (tmp_path / "jobs").glob("default/tiny/*.pid")
    wait_until(lambda: not driven.Driven(file.with_suffix("")).works)
    drivers = LocalDrivers(str(tmp_path / "jobs"))
    begun: list[int] = []
    start = driven.Driven.start

    def counted(*how: Any) -> Any:
        begun.append(1)
        return start(*how)

    monkeypatch.setattr(driven.Driven, "start", counted)

    async def resumed() -> None:
        await asyncio.gather(*(drivers.resume(job.key) for _ in range(4)))

    asyncio.run(resumed())
    assert len(begun) == 1


def test_files_that_are_not_there_are_told_before_anything_is_started(client: Client, tmp_path: Path) -> None:
    absent = f"file://{tmp_path}/absent"
    with pytest.raises(InvalidManifest) as refused:
        client.submit(with_changes(JOB, {"spec.model.source": absent, "spec.data.train": [{"source": absent}]}))
    assert [problem.path for problem in refused.value.problems] == ["spec.model.source", "spec.data.train[0].source"]
    assert client.list() == []


def test_a_driver_that_was_killed_is_told_as_a_failure_with_its_last_words(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driven, "PROGRAM", [sys.executable, "-c", "print('no such module'); raise SystemExit(1)"])
    status = client.submit(JOB).wait()
    assert status.phase is Phase.FAILED
    assert "no such module" in status.conditions[-1].message


def test_a_driver_is_known_when_the_machines_clock_was_set_and_not_by_its_number_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driven, "PROGRAM", [sys.executable, "-c", "import time; time.sleep(600)"])
    one = driven.Driven(tmp_path / "20260101-000000-000000")
    one.start({})
    try:
        booted = psutil.boot_time()
        monkeypatch.setattr("psutil._pslinux.boot_time", lambda: booted + 1)
        assert driven.Driven(one.folder).works
    finally:
        one.stop()
    file = tmp_path / "20260101-000000-000000.pid"
    file.write_text(json.dumps([os.getpid(), json.loads(file.read_text())[1]]))
    assert not one.works


def test_jobs_of_one_name_in_one_second_have_folders_of_their_own() -> None:
    moments = [datetime(2026, 1, 1, microsecond=tick, tzinfo=UTC) for tick in (1, 2)]
    first, second = (new_folder("/jobs", Key("default", "tiny"), now) for now in moments)
    assert first < second


def test_a_client_that_was_closed_says_so() -> None:
    client = Client(local=True)
    client.close()
    with pytest.raises(RuntimeError, match="the client is closed; make another one"):
        client.list()


def test_one_place_is_named_and_not_two() -> None:
    with Client(local=True, ray="http://127.0.0.1:1") as client, pytest.raises(Unreachable, match="name one place"):
        client.list()


def test_the_commands_speak_of_the_same_jobs(
    client: Client, finetune: Finetune, write_job: WriteJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = write_job()
    assert finetune("submit", file, "--local", "--dry-run").stdout.startswith("job tiny is valid")
    assert finetune("list", "--local").stderr.startswith("No jobs here.")
    done = finetune("submit", file, "--local", "--wait")
    assert done.code == 0, done
    assert "Succeeded, step 5/5" in done.stdout
    assert re.match(r"The model is file://\S+/artifact\n$", done.stderr)
    taken = finetune("submit", file, "--local")
    assert "or type: finetune cancel tiny -n default --local (" in taken.stderr
    assert finetune("get", "tiny", "--local").stdout.splitlines()[1].split()[:5] == [
        "tiny",
        "sft",
        "lora",
        "0",
        "Succeeded",
    ]
    assert finetune("logs", "tiny", "--local").stdout == "the fake trainer starts\n"
    [artifact] = finetune("artifacts", "tiny", "--local", "-o", "json").document
    assert artifact["kind"] == "adapter"
    assert "Attempts (0 restarts" in finetune("describe", "tiny", "--local").stdout
    assert finetune("suspend", "tiny", "--local").code == 1
    line = json.loads(finetune("logs", "tiny", "--local", "-o", "json").stdout)
    assert line == {"source": "trainer.log", "text": "the fake trainer starts"}
    watched = finetune("watch", "tiny", "--local", "-o", "yaml").stdout
    assert watched.startswith("---\nobservedGeneration: 1\n")
    [status] = yaml.safe_load_all(watched)
    assert (status["phase"], len(status["artifacts"])) == ("Succeeded", 1)
    told = finetune("describe", "tiny", "--local", "-o", "json").document
    assert (told["job"]["status"]["phase"], told["why"], told["events"]) == ("Succeeded", "", [])
    assert told["next"].startswith("The model is file://")
    removed = finetune("cancel", "tiny", "--local", "-o", "json")
    assert (removed.code, removed.document["metadata"]["name"]) == (0, "tiny")
    absent = finetune("get", "tiny", "--local")
    assert (absent.code, absent.stdout) == (ABSENT, "")
    assert "finetune list -A --local shows those there are" in absent.stderr


def test_suspending_and_resuming_print_the_job_for_programs(
    client: Client, finetune: Finetune, write_job: WriteJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    here = ("tiny", "--local", "-o", "json")
    finetune("submit", write_job(LASTING), "--local", fake="waits")
    try:
        wait_until(lambda: finetune("get", *here).document["status"].get("phase") == "Running")
        suspended = finetune("suspend", "--wait", *here)
        resumed = finetune("resume", *here)
        assert finetune("watch", "tiny", "--local").code == 0
    finally:
        removed = finetune("cancel", *here)
    assert suspended.document["status"]["phase"] == "Suspended"
    assert "finetune resume tiny -n default --local lets it go on" in suspended.stderr
    assert resumed.document["kind"] == "FineTuneJob"
    assert "finetune watch tiny -n default --local follows it" in resumed.stderr
    assert removed.document["status"]["phase"] == "Succeeded"


def test_waiting_for_a_job_that_fails_ends_with_the_class_of_the_failure(
    client: Client, finetune: Finetune, write_job: WriteJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    done = finetune("submit", write_job(), "--local", "--wait", fake="data-error")
    assert done.code == 3
    assert "Next: Correct the data" in done.stderr
    assert "then: finetune cancel tiny -n default --local, and finetune submit FILE --local" in done.stderr
    assert finetune("cancel", "tiny", "--local").code == 0
