"""What comes before a server: the address held, the base found and checked, and how vLLM's server is started. vLLM is a
stand-in; that transformers answers is said in tests/client/test_serve_e2e."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from finetune_trainers import serving
from finetune_trainers.artifact_folder import CALIBRATION, DIGESTS
from finetune_trainers.errors import UserError
from finetune_trainers.serving import ServeRequest, bound, prepare, transformers_command, vllm_command
from finetune_trainers.weights import WeightFiles

MODULE = "model.layers.0.self_attn.q_proj"
VLLM = """#!{python}
import json, os, sys
if sys.argv[2] == "-c":
    sys.exit(0)
print("vLLM prints this")
print(json.dumps([sys.argv[1:], dict(os.environ)]), file=open({told!r}, "w"))
"""


@pytest.fixture(autouse=True)
def no_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ROLLOUT_VLLM_PYTHON", raising=False)
    monkeypatch.setattr(serving, "NEEDED_PACKAGES", ())


def base(folder: Path, fill: float = 1.0) -> Path:
    """A model of one matrix."""
    folder.mkdir(parents=True)
    save_file({f"{MODULE}.weight": np.full((4, 4), fill, np.float32)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"dtype": "float32"}))
    return folder


def adapter(folder: Path, of: Path, **named: Any) -> Path:
    folder.mkdir(parents=True)
    pair = {"lora_A": np.ones((1, 4), np.float32), "lora_B": np.full((4, 1), 2.0, np.float32)}
    tensors = {f"base_model.model.{MODULE}.{name}.weight": value for name, value in pair.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": str(of)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = WeightFiles.of(of)
    digest = weights.digest() if weights is not None else None
    described = {"base": {"source": "hf://org/name", "revision": None, "digest": digest} | named}
    (folder / DIGESTS).write_text(json.dumps(described))
    return folder


def prepared(request: ServeRequest, cache: Path) -> list[str]:
    with bound("127.0.0.1", 0) as listener:
        return prepare(request, cache, listener).command


def of_adapter(folder: Path, **more: Any) -> ServeRequest:
    return ServeRequest("bot", adapter=folder, **more)


def of_model(folder: Path, **more: Any) -> ServeRequest:
    return ServeRequest("bot", model=folder, **more)


def test_an_adapter_is_served_on_the_base_that_it_names(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", model)
    command = prepared(of_adapter(folder), tmp_path)
    number = int(command[command.index("--listener") + 1])
    assert command == transformers_command("bot", model, folder, number)
    assert command[1] == "-P", "nothing in the user's folder takes a module's place"


def test_an_artifact_by_its_uri_is_what_its_folder_holds(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", model)
    whole = prepared(ServeRequest("bot", artifact=model.as_uri()), tmp_path)
    assert ("--adapter" in whole, whole[whole.index("--model") + 1]) == (False, str(model))
    adapted = prepared(ServeRequest("bot", artifact=folder.as_uri()), tmp_path)
    assert adapted[adapted.index("--adapter") + 1] == str(folder)


def test_a_base_that_has_moved_is_found_by_the_name_that_its_job_gave(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", model, source=(tmp_path / "moved").as_uri())
    model.rename(tmp_path / "moved")
    assert str(tmp_path / "moved") in prepared(of_adapter(folder), tmp_path)


def test_a_base_that_is_nowhere_is_asked_for(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", model)
    model.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"no such file or folder; correct the path.*or name the base with --base"):
        prepared(of_adapter(folder), tmp_path)
    assert str(tmp_path / "moved") in prepared(of_adapter(folder, base=str(tmp_path / "moved")), tmp_path)


def test_another_base_than_the_adapters_is_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base(tmp_path / "base"))
    other = base(tmp_path / "other", fill=2.0)
    with pytest.raises(UserError, match="is not the base of this adapter"):
        prepared(of_adapter(folder, base=str(other)), tmp_path)


@pytest.mark.parametrize(
    ("given", "right"),
    [
        ("config.json", "is neither a model's folder nor a GGUF file"),
        ("nowhere", "no such file or folder"),
        ("ftp://host/model", "has the unknown scheme ftp://"),
    ],
)
def test_a_base_that_is_none_is_refused(tmp_path: Path, given: str, right: str) -> None:
    model = base(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", model)
    named = given if "://" in given else str(model / given)
    with pytest.raises(UserError, match=right):
        prepared(of_adapter(folder, base=named), tmp_path)


def test_what_cannot_answer_is_refused(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    (model / CALIBRATION).write_text("{}")
    with pytest.raises(UserError, match="is a reward model: it scores answers and writes none"):
        prepared(of_model(model), tmp_path)


def test_weights_that_are_a_pickle_are_refused(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    with pytest.raises(UserError, match="holds no safetensors weights"):
        prepared(of_model(model), tmp_path)


def test_packages_that_are_missing_are_named_with_their_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "NEEDED_PACKAGES", ("no_such_package",))
    with pytest.raises(UserError, match=r"\(no_such_package\); install the serve extra: pip install 'finetune-op"):
        prepared(of_model(base(tmp_path / "base")), tmp_path)


def test_vllm_that_is_wanted_and_not_there_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = base(tmp_path / "base")
    with pytest.raises(UserError, match="ROLLOUT_VLLM_PYTHON is not set"):
        prepared(of_model(model, engine="vllm"), tmp_path)
    monkeypatch.setenv("ROLLOUT_VLLM_PYTHON", "/nowhere/python")
    with pytest.raises(UserError, match=r"names /nowhere/python, .* choose --engine transformers"):
        prepared(of_model(model), tmp_path)
    assert prepared(of_model(model, engine="transformers"), tmp_path)[0] == sys.executable


def test_an_address_that_is_taken_or_none_is_refused(tmp_path: Path) -> None:
    with bound("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"--port: cannot be had .* or 0 for one that is free \(found {port}\)"):
            serving.serve(of_model(tmp_path, port=port), tmp_path)
    with pytest.raises(UserError, match=r"--host: is no address of this machine"):
        serving.serve(of_model(tmp_path, host="203.0.113.7"), tmp_path)


def test_a_port_is_held_from_the_beginning() -> None:
    with bound("127.0.0.1", 0) as listener, pytest.raises(OSError, match="in use"):
        bound("127.0.0.1", listener.getsockname()[1])
    assert listener.family is socket.AF_INET


def started(tmp_path: Path, *arguments: str) -> tuple[list[dict[str, Any]], list[str], dict[str, str], str]:
    """What `serve` said, what vLLM was told in arguments and environment, and what came on stderr."""
    vllm, told = tmp_path / "python", tmp_path / "told.json"
    vllm.write_text(VLLM.format(python=sys.executable, told=str(told)))
    vllm.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "finetune_trainers", "serve", *arguments, "--name", "bot", "--port", "0"],
        env=os.environ | {"ROLLOUT_VLLM_PYTHON": str(vllm), "FINETUNE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=True,
    )
    words, variables = json.loads(told.read_text())
    return [json.loads(line) for line in done.stdout.splitlines()], words, variables, done.stderr


def test_vllm_serves_the_adapter_merged_into_its_base_and_stays_off_the_network(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "adapter", base(tmp_path / "base"))
    said, words, variables, complaints = started(tmp_path, "--adapter", str(folder))
    [merged] = (tmp_path / "cache" / "served").iterdir()
    about = said[-1]["serving"]
    assert about | {"port": 0} == {"engine": "vllm", "model": "bot", "host": "127.0.0.1", "port": 0}
    assert words == vllm_command("", "bot", merged, "127.0.0.1", about["port"])[1:]
    assert (variables["HF_HUB_OFFLINE"], variables["VLLM_NO_USAGE_STATS"]) == ("1", "1")
    assert load_file(merged / "model.safetensors")[f"{MODULE}.weight"].tolist() == [[3.0] * 4] * 4
    assert any("Merging the adapter into its base" in one.get("say", "") for one in said)
    assert "vLLM prints this" in complaints, "stdout is for the program that started this one"

    again, _, _, _ = started(tmp_path, "--adapter", str(folder))
    assert not any("Merging" in one.get("say", "") for one in again)


def test_vllm_serves_a_whole_model_as_it_is(tmp_path: Path) -> None:
    model = base(tmp_path / "base")
    _, words, _, _ = started(tmp_path, "--model", str(model))
    assert words[words.index("--model") + 1] == str(model)
    assert words[words.index("--served-model-name") + 1] == "bot"
