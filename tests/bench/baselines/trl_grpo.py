"""The peer: GRPO with TRL's GRPOTrainer, timed. Runs in TRL's environment, never in ours.

    python trl_grpo.py SETTINGS.json RESULT.json

Settings: model (folder in Hugging Face layout), data (jsonl of {"prompt", "answer"}), rule (of rules.py),
max_new_tokens, group_size, micro_batch_size, accumulation, iterations, lora {rank, alpha, target_modules} or null,
learning_rate, seed, threads, variant:

    default   GRPOTrainer as it comes, but for what the job asks for
    tuned     what a person would turn off for speed where memory is plenty: gradient checkpointing

Result: for each optimizer step its end (seconds since the epoch), the tokens that were written for it, and their mean
reward; and the highest resident memory in bytes. Called by bench_grpo and bench_learning.
"""

import json
import resource
import sys
import time
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from rules import score
from transformers import AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

SETTINGS = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(SETTINGS["threads"])
WRITTEN = {"tokens": 0, "rewards": []}


def rewarded(prompts, completions, answer, completion_ids, **kwargs):
    WRITTEN["tokens"] += sum(len(ids) for ids in completion_ids)
    scores = [
        score(SETTINGS["rule"], completion[0]["content"], wanted)
        for completion, wanted in zip(completions, answer, strict=True)
    ]
    WRITTEN["rewards"] += scores
    return scores


class Clock(TrainerCallback):
    """Notes when each optimizer step ends, and what had been written by then."""

    def __init__(self):
        self.steps = []

    def on_step_end(self, args, state, control, **kwargs):
        rewards, WRITTEN["rewards"] = WRITTEN["rewards"], []
        mean = sum(rewards) / len(rewards) if rewards else None
        self.steps.append({"end": time.time(), "tokens": WRITTEN["tokens"], "reward": mean})


def main():
    rows = load_dataset("json", data_files=SETTINGS["data"], split="train")
    rows = rows.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]})
    lora = SETTINGS["lora"]
    clock = Clock()
    trainer = GRPOTrainer(
        model=SETTINGS["model"],
        reward_funcs=rewarded,
        args=GRPOConfig(
            output_dir=str(Path(sys.argv[2]).parent / "trl_output"),
            max_completion_length=SETTINGS["max_new_tokens"],
            num_generations=SETTINGS["group_size"],
            per_device_train_batch_size=SETTINGS["micro_batch_size"],
            gradient_accumulation_steps=SETTINGS["accumulation"],
            max_steps=SETTINGS["iterations"],
            learning_rate=SETTINGS["learning_rate"],
            lr_scheduler_type="constant",
            beta=0.0,
            bf16=False,
            seed=SETTINGS["seed"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **({"gradient_checkpointing": False} if SETTINGS["variant"] == "tuned" else {}),
        ),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(SETTINGS["model"], padding_side="left"),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["target_modules"]
        )
        if lora
        else None,
        callbacks=[clock],
    )
    trainer.train()
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Path(sys.argv[2]).write_text(json.dumps({"steps": clock.steps, "peak_bytes": peak}))


if __name__ == "__main__":
    main()
