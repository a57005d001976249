"""What a shell is told when somebody presses Tab, as its own script asks for it."""

from __future__ import annotations

import http.server
import json
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from finetune_client.cli.app import app
from finetune_client.cli.jobs import completion
from tests.factories import job_document

Complete = Callable[[str], list[str]]


@pytest.fixture
def complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Complete:
    """What completes a line, in a home without jobs and kubeconfig. Nothing is ever said besides."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("KUBECONFIG", "KUBERNETES_SERVICE_HOST", "FINETUNE_RAY"):
        monkeypatch.delenv(name, raising=False)

    def ask(line: str) -> list[str]:
        words = shlex.split(line) + ([""] if line.endswith(" ") else [])
        asked = {"_FINETUNE_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        done = CliRunner().invoke(app, [], prog_name="finetune", env=asked)
        assert (done.exit_code, done.stderr) == (0, ""), done
        return done.stdout.split()

    return ask


@contextmanager
def cluster(*names: str, answers: bool = True) -> Iterator[str]:
    """An API server with these jobs in namespace team-a; its address."""
    end = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not answers:
                end.wait(60)
                return
            there = self.path.startswith("/apis/finetune-operator.io/v1alpha1/namespaces/team-a/finetunejobs")
            body = json.dumps({"items": [job_document(name=name) for name in names if there]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            """Says nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            end.set()
            server.shutdown()
            thread.join()


def kubeconfig_for(address: str, folder: Path) -> Path:
    file = folder / "kubeconfig"
    config = {
        "clusters": [{"name": "c", "cluster": {"server": address}}],
        "users": [{"name": "u", "user": {"token": "secret"}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "team-a"}}],
        "current-context": "x",
    }
    file.write_text(yaml.safe_dump(config))
    return file


def test_commands_options_and_their_values_are_completed(complete: Complete) -> None:
    assert complete("finetune su") == ["submit", "suspend"]
    assert complete("finetune logs --at") == ["--attempt"]
    assert complete("finetune watch tiny -o ") == ["table", "json", "yaml"]
    assert complete("finetune ckpt ver") == ["verify"]


def test_names_of_jobs_on_this_machine_are_completed_behind_local(complete: Complete, tmp_path: Path) -> None:
    for where in ("default/support-bot", "default/summaries", "team-a/support-desk"):
        folder = tmp_path / ".finetune/jobs" / where
        folder.mkdir(parents=True)
        (folder / "20260101-000000-000000.pid").touch()
    for command in ("get", "watch", "logs", "suspend", "resume", "cancel", "artifacts", "describe"):
        assert complete(f"finetune {command} --local supp") == ["support-bot"]
    assert complete("finetune logs --local -n team-a ") == ["support-desk"]


def test_names_of_jobs_in_a_cluster_are_completed_as_kubectl_would_find_it(
    complete: Complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with cluster("support-bot", "summaries") as address:
        file = kubeconfig_for(address, tmp_path)
        assert complete(f"finetune logs --kubeconfig {file} -f supp") == ["support-bot"]
        assert complete(f"finetune logs --kubeconfig {file} -n team-b ") == []
        monkeypatch.setenv("KUBECONFIG", str(file))
        for command in ("get", "watch", "logs", "suspend", "resume", "cancel", "artifacts", "describe"):
            assert complete(f"finetune {command} su") == ["summaries", "support-bot"]
        monkeypatch.setenv("FINETUNE_RAY", "http://127.0.0.1:1")
        assert complete("finetune get ") == []


def test_a_cluster_that_is_not_there_or_takes_its_time_completes_nothing(
    complete: Complete, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, "_SECONDS", 0.5)
    assert complete("finetune get ") == []
    assert complete(f"finetune get --kubeconfig {kubeconfig_for('http://127.0.0.1:1', tmp_path)} ") == []
    assert complete(f"finetune get --kubeconfig {tmp_path} --context nowhere ") == []
    with cluster("support-bot", answers=False) as address:
        assert complete(f"finetune get --kubeconfig {kubeconfig_for(address, tmp_path)} ") == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_shell_gets_a_script_that_asks_the_command(complete: Complete, shell: str) -> None:
    done = CliRunner().invoke(app, [], prog_name="finetune", env={"_FINETUNE_COMPLETE": f"source_{shell}"})
    assert done.exit_code == 0
    assert f"complete_{shell}" in done.stdout
