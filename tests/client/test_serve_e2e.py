"""`finetune serve` with the real server: a tiny adapter answers over HTTP, nothing else does, and Ctrl-C ends all."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.client.conftest import is_alive, wait_until
from tests.client.test_e2e import FINETUNE
from tests.trainers.factories import tiny_model

pytestmark = pytest.mark.e2e

MESSAGES = [{"role": "user", "content": "the cat likes"}]
GREEDY = {"temperature": 0, "max_tokens": 8}


def random_adapter(model: Path, folder: Path) -> Path:
    """An adapter that changes what the model says."""
    import torch
    from transformers import AutoModelForCausalLM

    from finetune_trainers.lean_peft import peft
    from finetune_trainers.tuning import peft_warnings_off

    torch.manual_seed(3)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=64, target_modules="all-linear", init_lora_weights=False
    )
    with peft_warnings_off():
        peft.get_peft_model(AutoModelForCausalLM.from_pretrained(model), config).save_pretrained(str(folder))
    return folder


@dataclass(frozen=True)
class Serving:
    """A server that is ready."""

    process: subprocess.Popen[str]
    about: dict[str, Any]

    def ask(self, path: str, **document: Any) -> tuple[int, str]:
        """-> the status and what was answered; GET where nothing is to be said."""
        connection = http.client.HTTPConnection(urlsplit(self.about["url"]).netloc, timeout=120)
        method, body = ("POST", json.dumps(document)) if document else ("GET", None)
        connection.request(method, path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        found = answer.status, answer.read().decode()
        connection.close()
        return found

    def all_processes(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    pytest.importorskip("openai", reason="the serve extra is not installed")
    root = tmp_path_factory.mktemp("serve")
    model = tiny_model(root / "model")
    return model, random_adapter(model, root / "bot")


@pytest.fixture(scope="module")
def serving(folders: tuple[Path, Path]) -> Iterator[Serving]:
    process = subprocess.Popen(
        [*FINETUNE, "serve", str(folders[1]), "--port", "0", "--engine", "transformers", "-o", "json"],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"it ended with {process.wait()}"
    yield Serving(process, json.loads(line))
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        process.wait(300)
    process.stdout.close()


def test_a_chat_is_answered_as_finetune_chat_answers_it(serving: Serving, folders: tuple[Path, Path]) -> None:
    from finetune_trainers.chat import answer

    status, body = serving.ask("/v1/chat/completions", model="bot", messages=MESSAGES, **GREEDY)
    [expected] = answer(*folders, [MESSAGES[0]["content"]], compare_base=True, max_new_tokens=8)
    assert status == 200
    said = json.loads(body)
    assert said["model"] == "bot"
    assert said["choices"][0]["message"]["content"].strip() == expected.tuned != expected.base


def test_an_answer_can_be_streamed(serving: Serving) -> None:
    _, whole = serving.ask("/v1/chat/completions", model="bot", messages=MESSAGES, **GREEDY)
    status, body = serving.ask("/v1/chat/completions", model="bot", messages=MESSAGES, stream=True, **GREEDY)
    chunks = [json.loads(line.removeprefix("data: ")) for line in body.split("\n\n") if line.startswith("data: {")]
    parts = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert status == 200
    assert len(chunks) >= 3
    assert "".join(parts).strip() == json.loads(whole)["choices"][0]["message"]["content"].strip()


def test_a_text_is_continued(serving: Serving) -> None:
    status, body = serving.ask("/v1/completions", model="bot", prompt="the cat", **GREEDY)
    assert (status, bool(json.loads(body)["choices"][0]["text"])) == (200, True)


def test_there_is_one_model_and_no_way_to_another(serving: Serving, folders: tuple[Path, Path]) -> None:
    listed = json.loads(serving.ask("/v1/models")[1])["data"]
    assert [one["id"] for one in listed] == ["bot"]
    for name in (str(folders[0]), "org/name", "bot@main"):
        status, body = serving.ask("/v1/chat/completions", model=name, messages=MESSAGES)
        assert (status, "Server is pinned to 'bot'" in body) == (400, True)
    for path in ("/load_model", "/reset", "/v1/responses", "/v1/audio/transcriptions"):
        assert serving.ask(path, model=str(folders[0]))[0] == 404
    assert serving.ask("/docs")[0] == 404


def test_a_request_that_is_wrong_is_told_so(serving: Serving) -> None:
    status, body = serving.ask("/v1/chat/completions", model="bot")
    assert (status, json.loads(body)["detail"]) == (400, "this cannot be answered: KeyError: 'messages'")
    assert serving.ask("/v1/completions", model="bot", prompt="the", max_tokens="many")[0] == 400


def test_ctrl_c_ends_it_and_leaves_no_process(serving: Serving) -> None:
    started = serving.all_processes()
    assert len(started) >= 2
    assert serving.about["pid"] == serving.process.pid
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(300) == 0
    wait_until(lambda: not any(is_alive(one.pid) for one in started))
