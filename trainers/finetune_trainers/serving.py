"""`serve`: a trained model behind an OpenAI-compatible server. Called by `__main__`.

    artifact ──▶ its base, checked; merged where vLLM serves ──▶ this process becomes the server

The server is vLLM's where an environment with it is found, else that of transformers (`serving_transformers`). What
is prepared may have to be fetched, as the base of an adapter from the Hub. So the server begins anew, in the same
process by its number, and is told from its first moment on that there is no network.

Standard output is for the program that started this one, a JSON object a line:

    {"say": "Merging the adapter into its base"}              what takes time now, any number of them
    {"serving": {"engine": "vllm", "model": "support-bot", "host": "127.0.0.1", "port": 8000}}     the last

From then on the server loads; it is ready when GET /health answers. All that it prints goes to standard error.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from blake3 import blake3

from finetune_api.failures import Problem
from finetune_api.spec import Precision
from finetune_trainers.artifact_folder import ADAPTER_WEIGHTS, CALIBRATION, DIGESTS
from finetune_trainers.errors import UserError
from finetune_trainers.exporting import base_of_adapter
from finetune_trainers.merge import base_weights, merge_adapter, named_base
from finetune_trainers.model_sources import locate_model
from finetune_trainers.rollout.vllm_process import VARIABLE, find_python
from finetune_trainers.weights import file_digest

__all__ = ["ENGINES", "ServeRequest", "Server", "bound", "prepare", "serve", "transformers_command", "vllm_command"]

ENGINES = ("auto", "transformers", "vllm")
NEEDED_PACKAGES = ("fastapi", "openai", "uvicorn")
"""By the server of transformers, beside those that train."""
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "0",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",
}
"""Nothing is fetched, nothing is told to anybody, and nobody loads another model into the server."""
_PRECISIONS = {"float32": Precision.FP32, "float16": Precision.FP16}


@dataclass(frozen=True)
class ServeRequest:
    """What was asked for."""

    name: str
    """What those who ask call the model."""
    model: Path | None = None
    """A whole model's folder,"""
    adapter: Path | None = None
    """or an adapter's,"""
    artifact: str | None = None
    """or the URI of one or the other."""
    host: str = "127.0.0.1"
    port: int = 8000
    """0: whichever is free."""
    engine: str = "auto"
    base: str | None = None
    """Folder or URI of the adapter's base, where it is not at the place that the adapter names."""


@dataclass(frozen=True)
class Server:
    """How the server is started."""

    engine: str
    command: list[str]
    port: int


def serve(request: ServeRequest, cache: Path) -> NoReturn:
    """Become the server of what was asked for. Raises UserError."""
    try:
        listener = bound(request.host, request.port)
    except OSError as error:
        raise _no_listener(request, error) from error
    server = prepare(request, cache, listener)
    about = {"engine": server.engine, "model": request.name, "host": request.host, "port": server.port}
    print(json.dumps({"serving": about}), flush=True)
    os.dup2(2, 1)
    os.execve(server.command[0], server.command, os.environ | OFFLINE)


def prepare(request: ServeRequest, cache: Path, listener: socket.socket) -> Server:
    """All that comes before the server. `listener` is the address, held; vLLM takes it anew. Raises UserError."""
    python = _vllm_python(request.engine)
    if python is None:
        _check_packages()
    model, adapter = _folders(request, cache)
    port = int(listener.getsockname()[1])
    if python is None:
        listener.set_inheritable(True)
        return Server("transformers", transformers_command(request.name, model, adapter, listener.fileno()), port)
    if adapter is not None:
        model = _merged(model, adapter, cache)
    listener.close()
    return Server("vllm", vllm_command(python, request.name, model, request.host, port), port)


def transformers_command(name: str, model: Path, adapter: Path | None, listener: int) -> list[str]:
    """`listener`: the descriptor of the bound socket."""
    command = [sys.executable, "-P", "-m", "finetune_trainers.serving_transformers", "--name", name]
    command += ["--model", str(model), "--listener", str(listener)]
    return command if adapter is None else [*command, "--adapter", str(adapter)]


def vllm_command(python: str, name: str, model: Path, host: str, port: int) -> list[str]:
    """vLLM's own server, of one model under one name."""
    module = "vllm.entrypoints.openai.api_server"
    where = ["--host", host, "--port", str(port)]
    return [python, "-I", "-m", module, "--model", str(model), "--served-model-name", name, *where]


def bound(host: str, port: int) -> socket.socket:
    """A socket at that address, not listening yet: held so that nobody takes it while the model is prepared. Raises
    OSError."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    try:
        return _bound(family, address, shared=False)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
    # What connections of an earlier server leave behind for a minute is in nobody's way.
    return _bound(family, address, shared=True)


def _bound(family: int, address: Any, shared: bool) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, shared)
        listener.bind(address)
    except BaseException:
        listener.close()
        raise
    return listener


def _no_listener(request: ServeRequest, error: OSError) -> UserError:
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        why = "is no address of this machine; 127.0.0.1 is, for its own programs, and 0.0.0.0 stands for all"
        return _refused("--host", request.host, why)
    why = f"cannot be had on {request.host}: {error.strerror}; choose another port, or 0 for one that is free"
    return _refused("--port", str(request.port), why)


def _vllm_python(engine: str) -> str | None:
    """The interpreter that has vLLM; None: transformers serves."""
    if engine == "transformers":
        return None
    try:
        return find_python("--engine")
    except UserError as error:
        if engine == "auto" and not os.environ.get(VARIABLE):
            return None
        why = error.problems[0].message.partition(". ")[0]
        raise _refused("--engine", engine, f"{why}; mend that, or choose --engine transformers") from error


def _check_packages() -> None:
    missing = [name for name in NEEDED_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"serving needs packages that are not installed ({', '.join(missing)}); install the serve extra:"
            " pip install 'finetune-operator[serve]', or vLLM in an environment of its own"
        )


def _folders(request: ServeRequest, cache: Path) -> tuple[Path, Path | None]:
    """The whole model, and the adapter that belongs to it. Raises UserError."""
    model, adapter = request.model, request.adapter
    if request.artifact is not None:
        _say(f"Fetching {request.artifact}, unless it is here")
        folder = _located(request.artifact, "--artifact", None, cache)
        model, adapter = (None, folder) if (folder / "adapter_config.json").is_file() else (folder, None)
    if adapter is None:
        assert model is not None
        _check_model(model)
        return model, None
    if not (adapter / ADAPTER_WEIGHTS).is_file():
        raise _of_folder(adapter, f"has no {ADAPTER_WEIGHTS}; name the folder of an adapter")
    _check_writes(adapter)
    base = _base(adapter, request.base, cache)
    _check_model(base)
    _say("Checking that the base is the one that the adapter was trained on")
    named_base(adapter, base_weights(base))
    return base, adapter


def _check_model(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise _of_folder(folder, "has no config.json; name the folder of a model")
    _check_writes(folder)
    base_weights(folder)  # safetensors, and all of them: pickles are not loaded


def _check_writes(folder: Path) -> None:
    if (folder / CALIBRATION).is_file():
        raise _of_folder(folder, "is a reward model: it scores answers and writes none; name a model that answers")


def _base(adapter: Path, given: str | None, cache: Path) -> Path:
    """Where the adapter's base is: as told, else where the adapter was trained, else by the name that its job gave."""
    if given is not None:
        return _located(given if "://" in given else Path(given).absolute().as_uri(), "--base", None, cache)
    try:
        return base_of_adapter(adapter)
    except UserError as error:
        named = _named(adapter)
        if str(named.get("source", "hf://")).startswith("hf://"):  # that is what was tried
            raise UserError(f"{error.message}; or name the base with --base", error.problems) from error
        return _located(str(named["source"]), f"{adapter / DIGESTS}: base.source", named.get("revision"), cache)


def _named(adapter: Path) -> Mapping[str, Any]:
    try:
        return dict(json.loads((adapter / DIGESTS).read_text())["base"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # an adapter from elsewhere


def _located(source: str, field: str, revision: str | None, cache: Path) -> Path:
    try:
        path = locate_model(source, field, revision)
    except ValueError as error:
        raise _refused(field, source, str(error)) from error
    if path.is_dir():
        return path
    from finetune_trainers.gguf import is_gguf, unpack_gguf  # brings torch

    if not is_gguf(path):
        raise _refused(field, source, "is neither a model's folder nor a GGUF file")
    return unpack_gguf(path, file_digest(path), cache, lambda _, sentence: _say(sentence))


def _merged(base: Path, adapter: Path, cache: Path) -> Path:
    """The adapter merged into its base, in the cache by what both consist of: made once."""
    inputs = blake3()
    for path in (adapter / ADAPTER_WEIGHTS, adapter / "adapter_config.json", base / "config.json"):
        inputs.update(file_digest(path).encode())
    inputs.update(base_weights(base).digest().encode())
    folder = cache / "served" / inputs.hexdigest()
    if not folder.is_dir():
        _say(f"Merging the adapter into its base, once, in {folder}")
        merge_adapter(base, adapter, folder, _precision(base))
    return folder


def _precision(folder: Path) -> Precision:
    """As the base has it; bf16 for what is held in fewer bits."""
    config = json.loads((folder / "config.json").read_text())
    return _PRECISIONS.get(str(config.get("dtype", config.get("torch_dtype"))), Precision.BF16)


def _say(sentence: str) -> None:
    print(json.dumps({"say": sentence}), flush=True)


def _of_folder(folder: Path, message: str) -> UserError:
    problem = Problem(file=str(folder), message=message)
    return UserError(str(problem), [problem])


def _refused(option: str, value: str, message: str) -> UserError:
    problem = Problem(path=option, value=value, message=message)
    return UserError(str(problem), [problem])
