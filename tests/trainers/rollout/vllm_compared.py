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
BY_INPUT = ("o_proj", "down_proj")
"""What it splits by columns: their input is split already. Other matrices are split by rows, and vectors are not."""


def differing_weights(
    found: dict[str, tuple[str, list[int], str]], weights: dict[str, Tensor], part: int = 0, of: int = 1
) -> list[str]:
    """Names of vLLM's weights, as `VllmEngine.digests` gives them of the device at `part` of as many as vLLM is split
    over, that are not the trainer's `weights` to the bit."""
    return [name for name, seen in found.items() if tuple(seen) != _digest(_as_vllm_has_it(name, weights, part, of))]


def _digest(tensor: Tensor) -> tuple[str, list[int], str]:
    content = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), hashlib.sha256(content).hexdigest()


def _as_vllm_has_it(name: str, weights: dict[str, Tensor], part: int, of: int) -> Tensor:
    """The trainer's weight of vLLM's `name`: its own, or several, row under row; the part of each that a device has."""
    for fused, parts in FUSED.items():
        if f".{fused}." in name:
            return torch.cat([weights[name.replace(fused, one)].chunk(of)[part] for one in parts])
    if any(f".{whole}." in name for whole in BY_INPUT):
        return weights[name].chunk(of, dim=1)[part]
    return weights[name].chunk(of)[part] if weights[name].dim() > 1 else weights[name]


def log_probs_of_trainer(module: Any, prompt: list[int], answer: Completion, temperature: float) -> Tensor:
    """fp32 [T]: of each token of `answer`, nats, by `module` itself."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([[*prompt, *answer.ids]])).logits[0, len(prompt) - 1 : -1]
    said: Tensor = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
    return said
