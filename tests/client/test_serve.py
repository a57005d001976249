"""`finetune serve`: which model is meant, how the server is started, followed and ended. The server is a double."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_client import runner
from finetune_client.cli.exits import ABSENT, INVALID, SERVE_MEANINGS
from finetune_client.cli.jobs.verbs import Where
from finetune_client.cli.serve.sources import NotServable, Served, _of_view, to_serve
from finetune_client.cli.serve.verb import how_to_ask
from finetune_client.serving import Serving
from finetune_client.views import JobView
from tests.client.conftest import FAKE_TRAINER, LAUNCHER, is_alive, wait_until

HERE = Where(None, None, None, None, False)


def adapter(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
    return folder


def run_of(root: Path, name: str, time: str, with_model: bool = True) -> Path:
    folder = root / "runs" / name / time
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps({"name": name}))
    if with_model:
        adapter(folder / "artifact")
    return folder


def view(phase: str, *uris: str) -> JobView:
    artifacts = [{"uri": uri, "kind": "adapter", "digest": "b3", "bytes": 1} for uri in uris]
    return JobView.of(
        {"metadata": {"name": "bot", "namespace": "team-a"}, "status": {"phase": phase, "artifacts": artifacts}}
    )


def refused(source: str) -> str:
    with pytest.raises(NotServable) as found:
        to_serve(source, HERE)
    return str(found.value)


def test_a_job_is_its_newest_run_with_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path, "bot", "20260101-000000")
    run_of(tmp_path, "bot", "20260102-000000")
    run_of(tmp_path, "bot", "20260103-000000", with_model=False)
    found = to_serve("job://bot", HERE)
    newest = "runs/bot/20260102-000000/artifact"
    assert found == Served(["--adapter", newest], f"the adapter in {newest}", "bot")


def test_a_run_is_served_by_its_jobs_name_and_a_folder_by_its_own(tmp_path: Path) -> None:
    run = run_of(tmp_path, "bot", "20260101-000000")
    assert to_serve(str(run), HERE).name == "bot"
    assert to_serve(str(run / "artifact"), HERE).name == "bot"
    assert to_serve((adapter(tmp_path / "mine")).as_uri(), HERE).name == "mine"


def test_a_run_that_failed_and_one_at_work_are_told_apart(tmp_path: Path) -> None:
    run = run_of(tmp_path, "bot", "20260101-000000", with_model=False)
    assert "has written no artifact; see its trainer.log" in refused(str(run))
    lock = os.open(run, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert "a run at work, which has written no model yet" in refused(str(run))
    os.close(lock)


@pytest.mark.parametrize(
    ("source", "right"),
    [
        (
            "pvc://models/bot",
            "claim models is not mounted here. Serve it in the cluster, as manifests/samples/serving/",
        ),
        ("s3://bucket", "is a whole bucket; name the artifact in it"),
        ("hf://org/model", "is not what a job has trained"),
        ("file:///nowhere/at/all", "is no folder of this machine"),
        ("ftp://host/bot", "has the unknown scheme ftp://"),
    ],
)
def test_a_model_that_is_elsewhere_is_refused_with_what_to_do(source: str, right: str) -> None:
    assert right in refused(source)


def test_a_claim_that_is_mounted_here_is_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_PVC_ROOT", str(tmp_path))
    folder = adapter(tmp_path / "models" / "bot")
    assert to_serve("pvc://models/bot", HERE).option == ["--adapter", str(folder)]
    assert _of_view(view("Succeeded", "s3://bucket/bot", "pvc://models/bot")).option == ["--adapter", str(folder)]


def test_what_lies_in_a_bucket_is_for_the_trainers_to_fetch(finetune: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert _of_view(view("Succeeded", "pvc://models/bot", "s3://bucket/a/b")).option == [
        "--artifact",
        "s3://bucket/a/b",
    ]
    done = finetune("serve", "s3://bucket/models/bot", "--base", "hf://org/name", fake="refuses")
    assert "Preparing the artifact at s3://bucket/models/bot" in done.stderr
    assert "asked: serve --artifact s3://bucket/models/bot --name bot " in capfd.readouterr().err


@pytest.mark.parametrize(
    ("job", "right"),
    [
        (view("Running"), "job bot is Running and has written no model yet; finetune watch bot -n team-a follows it"),
        (view("Failed"), "job bot has failed and written no model; finetune describe bot -n team-a says why"),
        (
            view("Succeeded", "pvc://models/bot"),
            "is not on this machine: pvc://models/bot is on a volume of the cluster",
        ),
    ],
    ids=["running", "failed", "on a volume"],
)
def test_a_job_elsewhere_without_a_model_here_is_refused(job: JobView, right: str) -> None:
    with pytest.raises(NotServable, match=right) as found:
        _of_view(job)
    assert found.value.code == ABSENT


def test_a_job_that_nobody_knows_is_refused(finetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = finetune("serve", "job://bot", "--kubeconfig", tmp_path / "none")
    assert done.code != 0
    assert "none is not there; name a kubeconfig" in done.stderr
    there = finetune("serve", "job://bot")
    assert "there is no run of bot below runs/, and " in there.stderr


def test_packages_that_are_missing_are_named_with_their_extras(
    finetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "NEEDED_PACKAGES", ("no_such_package",))
    done = finetune("serve", adapter(tmp_path / "bot"))
    assert done.code == INVALID
    assert "(no_such_package); install the extras: pip install 'finetune-operator[trainers,serve]'" in done.stderr


def test_a_whole_model_needs_no_base(finetune: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    done = finetune("serve", tmp_path, "--base", "hf://org/name")
    assert (done.code, "leave --base out" in done.stderr) == (INVALID, True)


def test_everything_that_was_typed_reaches_the_trainers(
    finetune: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = adapter(tmp_path / "bot")
    options = ("--host", "127.0.0.2", "--port", "0", "--engine", "vllm", "--base", "hf://org/name", "--name", "x")
    done = finetune("serve", folder, *options, fake="refuses")
    assert done.code == INVALID
    told = capfd.readouterr().err
    asked = f"--adapter {folder} --name x --host 127.0.0.2 --port 0 --engine vllm --base hf://org/name"
    assert f"the fake trainer was asked: serve {asked}\n--port: is taken" in told


def test_the_help_has_the_exit_codes(finetune: Any) -> None:
    text = finetune("serve", "--help").stdout
    assert text.count("  finetune serve") >= 2
    assert all(f"{code} {meaning}" in " ".join(text.split()) for code, meaning in SERVE_MEANINGS.items())


def test_how_to_ask_is_a_line_that_a_shell_takes() -> None:
    lines = how_to_ask(Serving("transformers", "it's", "127.0.0.1", 8123), 17)
    assert lines[0] == "it's is served at http://127.0.0.1:8123/v1 by transformers"
    curl = next(line for line in lines if "curl" in line).partition("ask")[2]
    words = subprocess.run(
        ["bash", "-c", f"curl() {{ printf '%s\\n' \"$@\"; }}; {curl}"], capture_output=True, text=True
    )
    assert json.loads(words.stdout.splitlines()[-1])["model"] == "it's"
    assert not any("password" in line for line in lines)


def test_whoever_listens_to_everybody_is_told(finetune: Any) -> None:
    serving = Serving("transformers", "bot", "0.0.0.0", 8000)
    assert serving.url == "http://127.0.0.1:8000/v1"
    assert any("no password" in line for line in how_to_ask(serving, 17))
    assert Serving("transformers", "bot", "::1", 8000).url == "http://[::1]:8000/v1"


class Command:
    """`finetune serve` in a process of its own, over the double."""

    def __init__(self, folder: Path, fake: str) -> None:
        launcher = LAUNCHER.format(trainer=str(FAKE_TRAINER))
        self.process = subprocess.Popen(
            [sys.executable, "-c", launcher, "serve", str(folder), "--port", "0", "-o", "json"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"FAKE_TRAINER": fake},
            start_new_session=True,
        )
        self.started: list[psutil.Process] = []

    def ready(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        document: dict[str, Any] = json.loads(self.process.stdout.readline())
        self.remember()
        return document

    def remember(self) -> None:
        self.started = psutil.Process(self.process.pid).children(recursive=True)

    def ended(self) -> tuple[int, str]:
        _, told = self.process.communicate(timeout=300)
        return self.process.returncode, told

    def is_clean(self) -> bool:
        return not any(is_alive(one.pid) for one in self.started)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[str], Command]]:
    commands: list[Command] = []

    def begin(fake: str = "") -> Command:
        commands.append(Command(adapter(tmp_path / "bot"), fake))
        return commands[-1]

    yield begin
    for one in commands:
        if one.process.poll() is None:  # the test failed on the way
            one.remember()
            for process in one.started:
                process.kill()
            one.process.kill()
            one.process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_and_that_is_no_failure(serve: Any, number: signal.Signals) -> None:
    command = serve()
    told = command.ready()
    assert told["model"] == "bot"
    assert told["url"].startswith("http://127.0.0.1:")
    os.kill(told["pid"], number)
    code, said = command.ended()
    assert code == 0
    assert "the fake trainer prepares" in said
    assert len(command.started) >= 2
    assert command.is_clean()


def test_a_server_that_does_not_listen_is_killed_by_the_second_signal_with_all_that_it_started(serve: Any) -> None:
    command = serve("deaf")
    command.ready()
    command.process.send_signal(signal.SIGINT)
    wait_until(lambda: "Ending the server" in command.process.stderr.readline())
    command.process.send_signal(signal.SIGINT)
    assert command.ended()[0] == 0
    assert len(command.started) >= 3
    assert command.is_clean()


def test_a_server_that_is_not_ready_yet_can_be_interrupted(serve: Any) -> None:
    command = serve("never-ready")
    wait_until(lambda: "prepares" in command.process.stderr.readline())
    command.remember()
    command.process.send_signal(signal.SIGINT)
    assert command.ended()[0] == 130
    assert command.is_clean()


def test_a_server_that_dies_is_reported(serve: Any) -> None:
    command = serve("dies")
    command.ready()
    code, said = command.ended()
    assert code == 1
    assert "the server was ended by signal 9" in said
    assert command.is_clean()


def test_the_server_ends_with_a_command_that_was_killed(serve: Any) -> None:
    command = serve()
    command.ready()
    command.process.kill()
    command.process.communicate()
    wait_until(command.is_clean)
