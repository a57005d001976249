"""The server of transformers for one model: `python -m finetune_trainers.serving_transformers --name NAME --model DIR`.

`serving` has this take its place, with the environment that keeps it off the network. The handlers, the endpoints and
what turns requests into text are those of `transformers serve`; that program loads whatever a request names, lists
what is in the Hub's cache and forgets its model when it is told to. Here there is one model, loaded before anybody is
listened to, and of the endpoints those that ask it.
"""

from __future__ import annotations

import argparse
import copy
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import HTTPException
from jinja2 import TemplateError
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

from finetune_trainers.cpu_products import use_fast_products
from finetune_trainers.tuning import peft_warnings_off

__all__ = ["ENDPOINTS", "OneModel", "endpoints", "main"]

ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")
STOP_SECONDS = 3
"""How long answers under way may take when the server is told to end."""


class OneModel(ModelManager):
    """Holds one model, and knows no other."""

    def __init__(self, name: str, model: Path, adapter: Path | None) -> None:
        self._folder, self._adapter = model, adapter
        self._since = int(time.time())
        super().__init__(device="auto" if torch.cuda.is_available() else "cpu", force_model=name)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """As those who ask have it: there are no revisions."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> Any:
        """Raises ValueError for any other name."""
        if model_id_and_revision != self.force_model:
            raise ValueError(f"{model_id_and_revision} is not served here")
        return super().load_model_and_processor(model_id_and_revision)

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """What /v1/models lists."""
        return [{"id": self.force_model, "object": "model", "created": self._since, "owned_by": "finetune"}]

    def _load_processor(self, *_: Any, **__: Any) -> Any:
        adapted = self._adapter is not None and (self._adapter / "tokenizer_config.json").is_file()
        return AutoTokenizer.from_pretrained(self._adapter if adapted else self._folder, local_files_only=True)

    def _load_model(self, *_: Any, **__: Any) -> Any:
        model: Any = AutoModelForCausalLM.from_pretrained(
            self._folder, dtype=self.dtype, device_map=self.device, local_files_only=True, use_safetensors=True
        )
        if self._adapter is not None:
            from finetune_trainers.lean_peft import peft

            with peft_warnings_off():
                model = peft.PeftModel.from_pretrained(model, str(self._adapter)).merge_and_unload()
        use_fast_products(model, model.dtype, model.device)
        return model.eval()


class _Chat(ChatCompletionHandler):
    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        with _told_to_those_who_ask():
            return await super().handle_request(body, request_id)


class _Completion(CompletionHandler):
    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        with _told_to_those_who_ask():
            return await super().handle_request(body, request_id)


@contextmanager
def _told_to_those_who_ask() -> Iterator[None]:
    """The handlers take a request as it comes, and what is wrong with it shows in their own errors."""
    try:
        yield
    except (KeyError, TypeError, ValueError, TemplateError) as error:
        raise HTTPException(400, f"this cannot be answered: {type(error).__name__}: {error}") from error


def endpoints(manager: OneModel) -> Any:
    """The application: ENDPOINTS, and none of those that load, list or drop models."""
    state = GenerationState()
    app = build_server(
        manager,
        _Chat(manager, state),
        _Completion(manager, state),
        ResponseHandler(manager, state),
        TranscriptionHandler(manager, state),
        SystemOneHandler(manager, state),
        state,
    )
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) in ENDPOINTS]
    return app


def main() -> None:
    """Load, then listen until a signal comes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--adapter", type=Path)
    parser.add_argument("--listener", type=int, required=True)
    options = parser.parse_args()
    app = endpoints(OneModel(options.name, options.model, options.adapter))
    config = uvicorn.Config(app, log_config=_logging(), timeout_graceful_shutdown=STOP_SECONDS)
    with socket.socket(fileno=options.listener) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, True)  # for the one that comes after
        uvicorn.Server(config).run(sockets=[listener])


def _logging() -> dict[str, Any]:
    """A line a request, but not for those that only ask whether it is well."""
    settings: dict[str, Any] = copy.deepcopy(uvicorn.config.LOGGING_CONFIG)
    settings["filters"] = {"asked": {"()": _Asked}}
    settings["handlers"]["access"] |= {"stream": "ext://sys.stderr", "filters": ["asked"]}
    settings["loggers"]["uvicorn"]["level"] = "WARNING"
    settings["loggers"]["uvicorn.error"]["level"] = "WARNING"
    return settings


class _Asked(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "/health" not in str(record.args)


if __name__ == "__main__":
    main()
