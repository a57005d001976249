"""What the rollout tests share: a policy on disk, prompts of many lengths, a worker on its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from finetune_trainers.attention import PACKED_ATTENTION
from finetune_trainers.rollout import Completion, Request, Sampling
from finetune_trainers.rollout.in_process import InProcessEngine
from tests.trainers.tiny import VOCABULARY, tiny_model

__all__ = ["PAD", "PROMPTS", "Alone", "engine_for", "greedy_by_transformers", "load_policy", "policy", "requests_for"]

PAD = 0
GREEDY = Sampling(max_new_tokens=24, temperature=0.0)


def _prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()


PROMPTS = [_prompt(length, seed) for seed, length in enumerate([3, 17, 1, 9, 30, 9, 12, 2, 21, 5])]


class Alone:
    """The part of WorkerContext that rollout uses, without a group."""

    rank, world_size, local_world_size, device = 0, 1, 1, torch.device("cpu")

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


def policy(folder: Path, architecture: str = "Llama", **config: Any) -> nn.Module:
    """A small model, written to `folder`."""
    tiny_model(folder, architecture, **config)
    return load_policy(folder)


def load_policy(folder: Path) -> nn.Module:
    """The model in `folder` with the attention that trainers use."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=PACKED_ATTENTION)
    return model


def engine_for(module: nn.Module, end_ids: Sequence[int] = (), context: Any = None, **settings: Any) -> InProcessEngine:
    worker: Any = context or Alone()
    return InProcessEngine(module, PAD, end_ids, worker, **({"batch_size": 4} | settings))


def requests_for(prompts: Sequence[list[int]], first_seed: int = 100) -> list[Request]:
    return [Request(prompt, first_seed + number) for number, prompt in enumerate(prompts)]


def greedy_by_transformers(model: Any, prompts: Sequence[list[int]], end_ids: Sequence[int] = ()) -> list[Completion]:
    """What `generate` writes for each prompt on its own, cut behind the first of `end_ids`; without probabilities."""
    settings = GenerationConfig(
        max_new_tokens=GREEDY.max_new_tokens, do_sample=False, pad_token_id=PAD, eos_token_id=None, use_cache=True
    )
    found = []
    for prompt in prompts:
        with torch.no_grad():
            whole = model.eval().generate(input_ids=torch.tensor([prompt]), generation_config=settings)[0].tolist()
        ids = whole[len(prompt) :]
        end = next((place for place, token in enumerate(ids) if token in end_ids), None)
        found.append(Completion(ids if end is None else ids[: end + 1], [], end is not None))
    return found
