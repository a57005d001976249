"""Rollout by vLLM: one of it beside each trainer, given the policy's weights before each iteration.

Built by online methods where the job says `vllm`. Each rank's vLLM answers that rank's requests, so nothing but the
gathering of weights is collective; where several ranks share one, which then computes on the devices of all, it is
`vllm_team` that speaks for them. Weights travel through memory without a name, a piece at a time; orders and answers
are lines of JSON over a pipe. torch's group of one process, which vLLM wants, listens on loopback and has no members.

vLLM draws by generators of its own: an answer follows from its seed, as everywhere, but is not the one that the
trainer would have drawn. Its kernels are others too, so the probability of a token is nearly that of the trainer, which
`online.method` measures and corrects for. It may write while the policy learns, with the weights that it has; what goes
wrong meanwhile is heard of when the answers are collected.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_api.progress import Stage
from finetune_api.spec import Vllm
from finetune_trainers.checkpoint.staging import Buffer, laid_out
from finetune_trainers.context import WorkerContext
from finetune_trainers.errors import TrainerError, UserError
from finetune_trainers.precisions import DTYPES
from finetune_trainers.prepared import PreparedModel
from finetune_trainers.rollout import AheadEngine, Completion, OnProgress, Request, Sampling
from finetune_trainers.rollout.vllm_process import VllmProcess, VllmRefused, find_python, vllm_command
from finetune_trainers.rollout.vllm_team import Team, TeamEngine, device_name, release_device
from finetune_trainers.rollout.vllm_weights import policy_weights
from finetune_trainers.rollout.zero3 import inside

__all__ = ["PIECE_BYTES", "VllmEngine", "start_vllm"]

PIECE_BYTES = 1 << 28
"""Of weights that travel together, unless one is larger."""
WRITTEN_AT_ONCE = 256
_GIB = 1 << 30
_log = logging.getLogger(__name__)


def start_vllm(
    plan: RunPlan,
    model: PreparedModel,
    settings: Vllm,
    max_length: int,
    module: nn.Module,
    end_ids: Collection[int],
    context: WorkerContext,
    without: Collection[str] = (),
) -> AheadEngine:
    """vLLM beside this worker, or the one that it shares, which takes as long as its start takes. Collective. `module`
    is the engine's; `without` names parts of it that are not the policy's. Raises UserError when there is no vLLM, or
    it cannot run the model."""
    path, size, dtype = f"spec.method.{plan.method.chosen}.vllm", settings.tensor_parallel_size, DTYPES[plan.precision]
    _refuse_other_names(module, path)
    python = find_python(path)
    context.report(Stage.LOADING_MODEL, message="vLLM starts, which may take minutes")
    asked = {
        "model": model.folder,
        "dtype": _name(dtype),
        "max_length": max_length,
        "batch_size": WRITTEN_AT_ONCE * size,
        "kv_cache_bytes": settings.kv_cache_gib * _GIB,
        "trust_remote_code": plan.model.trust_remote_code,
        "tensor_parallel_size": size,
    }

    def start(devices: Sequence[str]) -> VllmEngine:
        try:
            engine = VllmEngine(vllm_command(python), asked, module, end_ids, devices, dtype, without)
        except VllmRefused as error:
            problem = Problem(path=path, message=f"{error.message}; the log has more. Mend it, or remove the field")
            raise UserError(str(problem), [problem]) from error
        if context.rank == 0 and not engine.about["gives_memory_back"]:
            _log.info("vLLM %s keeps its memory while the policy learns: on this device it cannot sleep.", engine.about)
        return engine

    if size == 1:
        return start([device_name(context.device)])
    team = Team(context, size, f"{path}.tensorParallelSize")

    def follow() -> None:
        for _ in policy_weights(module, dtype, without):
            pass

    return TeamEngine(team, lambda: start(team.devices), follow)


class VllmEngine:
    """Answers by vLLM, with the weights of the last `update_weights`."""

    is_policy = False

    def __init__(
        self,
        command: Sequence[str],
        settings: dict[str, Any],
        module: nn.Module,
        end_ids: Collection[int],
        devices: Sequence[str],
        dtype: torch.dtype,
        without: Collection[str] = (),
        piece_bytes: int = PIECE_BYTES,
    ) -> None:
        """Starts `command`. `settings` are the server's; `devices` those that vLLM is to see, named as
        CUDA_VISIBLE_DEVICES names them; `dtype` is what it computes in. Raises TrainerError."""
        self._module, self._dtype, self._without = module, dtype, without
        self._end_ids = sorted(end_ids)
        self._piece_bytes = piece_bytes
        self._started: tuple[int, Sampling] | None = None
        """How many answers are being written, and how."""
        self._buffer = Buffer()
        try:
            self._process = VllmProcess(command, settings, _variables(devices), self._buffer.file)
        except BaseException:
            self._buffer.close()
            raise
        self.about: dict[str, Any] = self._process.about
        """What vLLM says of itself."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None = None
    ) -> list[Completion]:
        self.start(requests, sampling)
        return self.collect(on_progress)

    def start(self, requests: Sequence[Request], sampling: Sampling) -> None:
        assert self._started is None, "one thing at a time"
        self._started = len(requests), sampling
        if not requests:
            return
        asked = {
            "do": "generate",
            "prompts": [list(request.prompt_ids) for request in requests],
            "seeds": [request.seed for request in requests],
            "end_ids": self._end_ids,
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
        self._process.tell(asked)

    def collect(self, on_progress: OnProgress | None = None) -> list[Completion]:
        assert self._started is not None, "nothing was asked"
        (num, sampling), self._started = self._started, None
        if not num:
            return []

        def tell(num_done: int) -> None:
            if on_progress is not None:
                on_progress(num_done, num)

        answers = self._process.hear(tell).get("answers", [])
        if len(answers) != num:
            raise TrainerError(f"vLLM gave {len(answers)} answers to {num} prompts")
        tell(num)
        return [_completion(answer, sampling.max_new_tokens) for answer in answers]

    def update_weights(self) -> None:
        assert self._started is None, "an answer is written with one policy"
        for piece, is_last in _with_last(self._pieces()):
            self._process.ask({"do": "load", "tensors": piece, "is_last": is_last})

    def digests(self) -> list[dict[str, tuple[str, list[int], str]]]:
        """Of each weight that vLLM computes with, by vLLM's name: dtype, shape and sha256 of its bytes, for each device
        that has a part of it. vLLM keeps what is multiplied with the same input as one weight, row under row."""
        of_devices = self._process.ask({"do": "digests"})["digests"]
        return [{name: (dtype, shape, digest) for name, (dtype, shape, digest) in one.items()} for one in of_devices]

    def sleep(self) -> None:
        self._process.ask({"do": "sleep"})

    def wake(self) -> None:
        release_device()
        self._process.ask({"do": "wake"})

    def close(self) -> None:
        self._process.end()
        self._buffer.close()

    def _pieces(self) -> Iterator[list[dict[str, Any]]]:
        """The policy's weights, some at a time, which lie in the shared memory until the next ones are asked for."""
        piece: list[dict[str, Any]] = []
        upto = 0
        for name, tensor in policy_weights(self._module, self._dtype, self._without):
            placed = laid_out([tensor.nbytes], upto)
            if piece and placed.size > self._piece_bytes:
                yield piece
                piece, placed = [], laid_out([tensor.nbytes])
            (start,), upto = placed
            self._write(tensor, start, upto)
            piece.append({"name": name, "dtype": _name(tensor.dtype), "shape": list(tensor.shape), "start": start})
        yield piece

    def _write(self, tensor: Tensor, start: int, end: int) -> None:
        self._buffer.reserve(max(end, self._piece_bytes))
        view = torch.frombuffer(self._buffer.view(start, end), dtype=torch.uint8)
        view.copy_(tensor.contiguous().flatten().view(torch.uint8))


def _completion(answer: dict[str, Any], max_new_tokens: int) -> Completion:
    completion = Completion(answer["ids"], answer["log_probs"], answer["ended"])
    num = len(completion.ids)
    if not 1 <= num <= max_new_tokens or len(completion.log_probs) != num:
        raise TrainerError(
            f"vLLM gave {num} tokens with {len(completion.log_probs)} log-probabilities, of {max_new_tokens} at most"
        )
    return completion


def _with_last(pieces: Iterator[list[dict[str, Any]]]) -> Iterator[tuple[list[dict[str, Any]], bool]]:
    """Each piece as soon as it is there, and an empty one to say that it was the last: the next must not be made while
    this one is still being read."""
    for piece in pieces:
        yield piece, False
    yield [], True


def _variables(devices: Sequence[str]) -> dict[str, str]:
    """Of its environment: nothing is fetched or told to anybody, and it sees `devices` alone."""
    variables = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",  # it warns of what is meant, such as that it has no tokenizer, with tracebacks
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_HOST_IP": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    if any(devices):
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    return variables


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _refuse_other_names(module: nn.Module, path: str) -> None:
    """vLLM knows weights by their names in files; of some models transformers changes them when it reads."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    model_type = str(getattr(getattr(inside(module), "config", None), "model_type", ""))
    if get_checkpoint_conversion_mapping(model_type) is not None:
        message = f"cannot be given the weights of a model of type {model_type}; remove it"
        problem = Problem(path=path, message=message)
        raise UserError(str(problem), [problem])
