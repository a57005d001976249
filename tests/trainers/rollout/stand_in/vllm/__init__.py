"""As much of vLLM as the server uses, by plain transformers: the real one takes a minute to start. Tests of the pipe,
of weights and of training run against this one, and against the real one where there is an environment with it.

Weights have the names of the model's files, and each token takes a forward pass over all that is there.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

__version__ = "stand-in"

_custom_ops = types.SimpleNamespace()
sys.modules["vllm.model_executor"] = types.ModuleType("vllm.model_executor")
sys.modules["vllm.model_executor.layers"] = layers = types.ModuleType("vllm.model_executor.layers")
layers.utils = types.SimpleNamespace()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class SamplingParams:
    temperature: float
    top_p: float
    top_k: int
    seed: int
    max_tokens: int
    logprobs: int
    stop_token_ids: list[int]
    ignore_eos: bool
    detokenize: bool


@dataclass(frozen=True)
class LogProb:
    logprob: float


@dataclass
class Output:
    token_ids: list[int]
    logprobs: list[dict[int, LogProb]]
    finish_reason: str | None = None


@dataclass
class Request:
    request_id: str
    prompt: list[int]
    sampling: SamplingParams
    generator: torch.Generator
    outputs: list[Output]

    @property
    def finished(self) -> bool:
        return self.outputs[0].finish_reason is not None


class Model(nn.Module):
    """Has the methods that vLLM's models have."""

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        super().__init__()
        config = AutoConfig.from_pretrained(folder)
        self._inner = AutoModelForCausalLM.from_config(config).to(dtype).eval()

    def named_parameters(self, *_: Any, **__: Any) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self._inner.named_parameters()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        known, loaded = dict(self.named_parameters()), set()
        for name, tensor in weights:
            known[name].data.copy_(tensor)
            loaded.add(name)
        return loaded

    def compute_logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._inner.lm_head(hidden)
        return logits

    def hidden(self, ids: list[int]) -> Tensor:
        states: Tensor = self._inner.model(input_ids=torch.tensor([ids])).last_hidden_state[:, -1]
        return states


class Worker:
    """Of as many as would share each weight; here each has all of them."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def apply_model(self, function: Callable[[Model], Any]) -> Any:
        return function(self._model)


class LLM:
    def __init__(self, model: str, dtype: str, **settings: Any) -> None:
        if settings["kv_cache_memory_bytes"] < 1 << 20:
            raise ValueError("no room for keys and values")
        models = [Model(model, getattr(torch, dtype)) for _ in range(settings["tensor_parallel_size"])]
        self._workers = [Worker(one) for one in models]
        self.llm_engine = Engine(models[0])

    def collective_rpc(self, method: Callable[[Worker], Any]) -> list[Any]:
        with torch.no_grad():
            return [method(worker) for worker in self._workers]

    def reset_prefix_cache(self) -> bool:
        return True


class Engine:
    def __init__(self, model: Model) -> None:
        self._model = model
        self._requests: list[Request] = []

    def add_request(self, request_id: str, prompt: dict[str, list[int]], sampling: SamplingParams) -> None:
        generator = torch.Generator().manual_seed(sampling.seed)
        self._requests.append(Request(request_id, prompt["prompt_token_ids"], sampling, generator, [Output([], [])]))

    def has_unfinished_requests(self) -> bool:
        return bool(self._requests)

    @torch.no_grad()
    def step(self) -> list[Request]:
        """One more token for each."""
        seen = list(self._requests)
        for request in seen:
            self._write(request)
        self._requests = [request for request in seen if not request.finished]
        return seen

    def _write(self, request: Request) -> None:
        sampling, output = request.sampling, request.outputs[0]
        logits = self._model.compute_logits(self._model.hidden(request.prompt + output.token_ids))[0].float()
        log_probs = logits.log_softmax(-1)
        token = int(logits.argmax()) if not sampling.temperature else _drawn(logits, sampling, request.generator)
        output.token_ids.append(token)
        output.logprobs.append({token: LogProb(float(log_probs[token]))})
        if token in sampling.stop_token_ids:
            output.finish_reason = "stop"
        elif len(output.token_ids) == sampling.max_tokens:
            output.finish_reason = "length"


def _drawn(logits: Tensor, sampling: SamplingParams, generator: torch.Generator) -> int:
    probabilities, tokens = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    if sampling.top_k:
        probabilities[sampling.top_k :] = 0
    probabilities[probabilities.cumsum(0) - probabilities >= sampling.top_p] = 0
    return int(tokens[torch.multinomial(probabilities, 1, generator=generator)])
