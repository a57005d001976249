"""How faithful vLLM's rollouts are to the trainer's policy, in fp32: its weights after a sync, and its probabilities.

    python -m tests.bench.bench_vllm [--rows 64] [--tokens 64]

The real 135M model with adapters that move its answers is given to vLLM, in the environment that
tests/trainers/rollout/vllm_env.sh makes. Every weight that vLLM then computes with is compared with the trainer's by
its bytes. Of the answers that it draws at temperature 1, what it says of each token's probability is compared with what
the trainer's own model does. How long a sync takes, and tokens per second of both engines, are reported beside it.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_trainers.attention import PACKED_ATTENTION
from finetune_trainers.lean_peft import peft
from finetune_trainers.rollout import Completion, Request, RolloutEngine, Sampling
from finetune_trainers.rollout.vllm_engine import WRITTEN_AT_ONCE, VllmEngine
from finetune_trainers.rollout.vllm_process import vllm_command
from finetune_trainers.rollout.vllm_weights import policy_weights
from tests.bench.bench_rollout import end_ids_of, prompts
from tests.bench.common import busy, model_folder, write_results
from tests.trainers.rollout.vllm_compared import differing_weights, log_probs_of_trainer
from tests.trainers.rollout.vllm_environments import real_python
from tests.trainers.rollout.writers import engine_for

GOAL = 0.01
"""Nats per token, mean of the distances."""


def policy() -> nn.Module:
    """The real model with adapters as wide as training makes them."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(
        model_folder(), dtype=torch.float32, attn_implementation=PACKED_ATTENTION
    )
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    tuned: nn.Module = peft.get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return tuned.eval()


def written(engine: RolloutEngine, requests: list[Request], num_tokens: int) -> tuple[list[Completion], float]:
    """Answers, and tokens per second."""
    engine.generate(requests[:2], Sampling(4))  # what is done once
    started = time.perf_counter()
    answers = engine.generate(requests, Sampling(num_tokens))
    return answers, sum(len(answer.ids) for answer in answers) / (time.perf_counter() - started)


def measure(num_rows: int, num_tokens: int) -> dict[str, Any]:
    module, folder, load = policy(), model_folder(), busy()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    asked, end_ids = prompts(tokenizer, num_rows), end_ids_of(tokenizer)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(asked)]
    settings = {
        "model": str(folder),
        "dtype": "float32",
        "max_length": 512,
        "batch_size": WRITTEN_AT_ONCE,
        "kv_cache_bytes": 1 << 30,
        "trust_remote_code": False,
        "tensor_parallel_size": 1,
    }
    engine = VllmEngine(vllm_command(real_python()), settings, module, end_ids, [], torch.float32)
    try:
        started = time.perf_counter()
        engine.update_weights()
        sync = time.perf_counter() - started
        [seen] = engine.digests()
        answers, rate = written(engine, requests, num_tokens)
    finally:
        engine.close()
    weights = {name: tensor.clone() for name, tensor in policy_weights(module, torch.float32, ())}
    said = torch.cat([torch.tensor(answer.log_probs) for answer in answers])
    ours = torch.cat(
        [log_probs_of_trainer(module, prompt, one, 1.0) for prompt, one in zip(asked, answers, strict=True)]
    )
    gaps = (said - ours).abs()
    return {
        "vllm": {key: engine.about[key] for key in ("version",) if key in engine.about},
        "load_before": load,
        "rows": num_rows,
        "longest_answer": num_tokens,
        "weights": len(seen),
        "differing_weights": differing_weights(seen, weights),
        "tokens": len(gaps),
        "gap_mean": float(gaps.mean()),
        "gap_p99": float(gaps.quantile(0.99)),
        "gap_max": float(gaps.max()),
        "sync_seconds": round(sync, 3),
        "tokens_per_second": {
            "vllm": round(rate, 1),
            "in process": round(written(engine_for(module, end_ids, batch_size=64), requests, num_tokens)[1], 1),
        },
    }


def main() -> int:
    """0 when the goal is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    found = measure(arguments.rows, arguments.tokens)
    write_results("vllm", {"goal": GOAL, **found})
    print(
        f"{len(found['differing_weights'])} of {found['weights']} weights differ; log-probabilities of"
        f" {found['tokens']} tokens by {found['gap_mean']:.2g} nats in the mean (goal {GOAL}), {found['gap_max']:.2g}"
        f" at most; a sync takes {found['sync_seconds']} s; tokens per second: {found['tokens_per_second']}"
    )
    return int(bool(found["differing_weights"]) or found["gap_mean"] >= GOAL)


if __name__ == "__main__":
    sys.exit(main())
