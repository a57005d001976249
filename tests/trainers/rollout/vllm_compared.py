"""vLLM's weights and probabilities beside the trainer's. Used by test_vllm and bench_vllm."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from finetune_trainers.rollout import Completion

__all__ = ["differing_weights", "log_probs_of_trainer"]

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""What vLLM keeps as one weight."""


def differing_weights(found: dict[str, tuple[str, list[int], str]], weights: dict[str, Tensor]) -> list[str]:
    """Names of vLLM's weights, as `VllmEngine.digests` gives them, that are not the trainer's `weights` to the bit."""
    return [name for name, seen in found.items() if seen != _digest(_as_vllm_has_it(name, weights))]


def _digest(tensor: Tensor) -> tuple[str, list[int], str]:
    content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), hashlib.sha256(content).hexdigest()


def _as_vllm_has_it(name: str, weights: dict[str, Tensor]) -> Tensor:
    """The trainer's weight of vLLM's `name`: its own, or several, row under row."""
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            return torch.cat([weights[name.replace(fused, part)] for part in parts])
    return weights[name]


def log_probs_of_trainer(module: Any, prompt: list[int], answer: Completion, temperature: float) -> Tensor:
    """fp32 [T]: of each token of `answer`, nats, by `module` itself."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
    said: Tensor = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    return said
