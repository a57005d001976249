"""A process in which vLLM answers prompts: `python -I vllm_server.py IN OUT SHARED`, in vLLM's own environment.

Started by `vllm_process`. It imports nothing of ours: this file is all that the two environments have in common. IN and
OUT are descriptors of pipes that carry one JSON object a line, SHARED one of memory in which weights arrive. What vLLM
prints goes where this process's output goes.

    first line in   {"model": folder, "dtype": "float32", "max_length": 512, "kv_cache_bytes": 2147483648,
                     "tensor_parallel_size": 1, ...}
    first line out  {"version": "0.32.0", "gives_memory_back": false}
    then, by turns
      {"do": "load", "tensors": [{"name": ..., "dtype": "float32", "shape": [...], "start": 0}, ...], "is_last": true}
                    {}
      {"do": "generate", "prompts": [[1, 2], ...], "seeds": [...], "end_ids": [...], "max_new_tokens": 64, ...}
                    {"done": 0} every second or so, then {"answers": [{"ids", "log_probs", "ended"}, ...]}
      {"do": "digests"}
                    {"digests": [{name: [dtype, shape, sha256 of the bytes]}, ...]} of what each process of vLLM
                    computes with: one, or as many as share each weight
      {"do": "sleep"} and {"do": "wake"}
                    {}
    or, at any time {"error": "..."}

It ends when IN is closed, whatever it is at. With a tensor_parallel_size above 1 vLLM starts that many processes of
its own, which end with this one. Facts about vLLM are those of 0.32.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import queue
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import IO, Any

TELL_SECONDS = 1.0


def main(arguments: list[str]) -> None:
    """Serve until the other side closes its end."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(int(arguments[0]), lines), daemon=True).start()
    with os.fdopen(int(arguments[1]), "w", encoding="utf-8") as answers:
        try:
            writer = _Writer(json.loads(lines.get()), int(arguments[2]), answers)
            _tell(answers, writer.about())
            while True:
                asked = json.loads(lines.get())
                _tell(answers, getattr(writer, asked.pop("do"))(**asked))
        except Exception as error:  # whatever vLLM raises
            traceback.print_exc()
            _tell(answers, {"error": f"{type(error).__name__}: {error}"[:2000]})


def _read(descriptor: int, lines: queue.SimpleQueue[str]) -> None:
    """Pass on what comes in; end the process with the stream."""
    with os.fdopen(descriptor, encoding="utf-8") as stream:
        for line in stream:
            lines.put(line)
    os._exit(0)


def _tell(stream: IO[str], document: dict[str, Any]) -> None:
    stream.write(json.dumps(document) + "\n")
    stream.flush()


class _Writer:
    """vLLM with one model. Its methods are what can be asked."""

    def __init__(self, settings: dict[str, Any], shared: int, answers: IO[str]) -> None:
        import torch
        import vllm  # type: ignore[import-not-found]  # it is in another environment

        self._vllm, self._answers = vllm, answers
        self._memory = f"/proc/{os.getpid()}/fd/{shared}"  # as vLLM's own processes can open it, too
        self._on_gpu = torch.cuda.is_available()
        if not self._on_gpu:
            _keep_plain_weights()
        size = settings["tensor_parallel_size"]
        self._llm = vllm.LLM(
            model=settings["model"],
            dtype=settings["dtype"],
            tensor_parallel_size=size,
            distributed_executor_backend="mp" if size > 1 else None,
            max_model_len=settings["max_length"],
            max_num_seqs=settings["batch_size"],
            kv_cache_memory_bytes=settings["kv_cache_bytes"],
            gpu_memory_utilization=0.01,  # no more than must be free at the start, beside a trainer that holds much
            trust_remote_code=settings["trust_remote_code"],
            seed=0,
            load_format="dummy",  # the trainer's weights follow
            skip_tokenizer_init=True,
            generation_config="vllm",  # and not what the model's folder would have
            logprobs_mode="raw_logprobs",
            enable_sleep_mode=self._on_gpu,
            enforce_eager=not self._on_gpu,
            disable_log_stats=True,
        )
        self._loaded: list[set[str]] = [set() for _ in range(size)]
        """Names of weights that each process has taken over."""

    def about(self) -> dict[str, Any]:
        return {"version": str(self._vllm.__version__), "gives_memory_back": self._on_gpu}

    def load(self, tensors: list[dict[str, Any]], is_last: bool) -> dict[str, Any]:
        """Take over weights, under the names of the model's files; after the last of them all must be there."""
        for loaded, names in zip(self._loaded, self._on_model(partial(_load, self._memory, tensors)), strict=True):
            loaded.update(names)
        if is_last:
            missing: set[str] = set()
            for loaded, names in zip(self._loaded, self._on_model(_names), strict=True):
                missing.update(set(names) - loaded)
                loaded.clear()
            if missing:
                raise ValueError(f"weights that vLLM has were not given: {', '.join(sorted(missing)[:8])}")
            self._llm.reset_prefix_cache()
        return {}

    def generate(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        end_ids: list[int],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
    ) -> dict[str, Any]:
        """Answers in the order of `prompts`. Log-probabilities are those before top-p and top-k."""
        scale = 1.0 / (temperature or 1.0)
        self._on_model(partial(_scale_logits, scale))
        engine = self._llm.llm_engine
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            sampling = self._vllm.SamplingParams(
                temperature=1.0 if temperature else 0.0,  # the logits are divided by it already
                top_p=top_p,
                top_k=top_k,
                seed=seed,
                max_tokens=max_new_tokens,
                logprobs=0,
                stop_token_ids=end_ids,
                ignore_eos=True,  # the trainer says what ends an answer
                detokenize=False,
            )
            engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
        found: dict[int, dict[str, Any]] = {}
        told_at = time.monotonic()
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    found[int(output.request_id)] = _answer(output.outputs[0])
            if time.monotonic() - told_at > TELL_SECONDS:
                told_at = time.monotonic()
                _tell(self._answers, {"done": len(found)})
        return {"answers": [found[number] for number in range(len(prompts))]}

    def digests(self) -> dict[str, Any]:
        return {"digests": self._on_model(_digests)}

    def sleep(self) -> dict[str, Any]:
        if self._on_gpu:
            self._llm.sleep(level=2)  # without its weights, which come again before it answers again
        return {}

    def wake(self) -> dict[str, Any]:
        if self._on_gpu:
            self._llm.wake_up()
        return {}

    def _on_model(self, function: Any) -> list[Any]:
        """What `function` of the model gives in each process."""
        return list(self._llm.collective_rpc(partial(_called, function)))


def _called(function: Any, worker: Any) -> Any:
    return worker.apply_model(function)


def _load(memory: str, tensors: list[dict[str, Any]], model: Any) -> list[str]:
    """Names of the weights that `model` has taken over of `tensors`, which lie in the file `memory`."""
    with Path(memory).open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        return list(model.load_weights(_views(mapped, tensors)))


def _views(memory: mmap.mmap, tensors: list[dict[str, Any]]) -> Any:
    import torch

    for one in tensors:
        dtype, count = getattr(torch, one["dtype"]), 1
        for size in one["shape"]:
            count *= size
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=one["start"])
        # a copy: a tensor that vLLM kept, or an error's traceback, would keep the memory open
        yield one["name"], flat.view(one["shape"]).clone()


def _names(model: Any) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _digests(model: Any) -> dict[str, Any]:
    return {
        name: [str(one.dtype).removeprefix("torch."), list(one.shape), _digest(one)]
        for name, one in model.named_parameters()
    }


def _digest(tensor: Any) -> str:
    import torch

    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy()).hexdigest()


def _answer(output: Any) -> dict[str, Any]:
    ids = list(output.token_ids)
    log_probs = [by_token[token].logprob for token, by_token in zip(ids, output.logprobs, strict=True)]
    return {"ids": ids, "log_probs": log_probs, "ended": output.finish_reason == "stop"}


def _scale_logits(scale: float, model: Any) -> None:
    """Let `model`'s logits be those at the sampling temperature: vLLM itself divides by it where log-probabilities have
    been taken already, or takes them where top-p and top-k have left their marks."""
    plain = type(model).compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = plain(model, *args, **kwargs)
        return None if logits is None else logits.float() * scale

    model.compute_logits = compute_logits


def _keep_plain_weights() -> None:
    """On a CPU vLLM would keep linear layers in a packed form alone, into which no new weights can be loaded."""
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils  # type: ignore[import-not-found]

    _custom_ops._supports_onednn = False
    utils.check_cpu_sgl_kernel = lambda *_: False


if __name__ == "__main__":
    main(sys.argv[1:])
elif __name__ == "__mp_main__":  # one of vLLM's own processes, which starts from nothing where there is no GPU
    import torch

    if not torch.cuda.is_available():
        _keep_plain_weights()
