"""The peer: PPO with TRL's PPOTrainer, timed. Runs in the environment of TRL 1.12, the last that has it.

    python trl_ppo.py SETTINGS.json RESULT.json

Settings: model (folder in Hugging Face layout), reward_model (the same, a sequence classifier with one label) or null
and rule (of rules.py), data (jsonl of {"prompt"}, with a rule {"prompt", "answer"}), max_new_tokens, micro_batch_size,
accumulation, iterations, passes, learning_rate, kl, seed, threads, lora {rank, alpha, target_modules} or null. All else
is as PPOTrainer comes. It asks for gradient checkpointing and never turns it on: its own loop takes the place of the
one that would.

Result: for each iteration its end (seconds since the epoch), the tokens that were written for it, their mean reward,
and their distance from the reference (nats per rollout); and the highest resident memory in bytes. Called by bench_ppo
and bench_learning.
"""

import json
import resource
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import load_dataset
from peft import LoraConfig
from rules import score
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

SETTINGS = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(SETTINGS["threads"])
WRITTEN = {"tokens": 0}
generate = ppo_trainer.batch_generation


def counting(model, queries, batch_size, pad_token_id, config):
    """TRL's batch_generation; what it has written is counted up to each row's end."""
    found, logits = generate(model, queries, batch_size, pad_token_id, config)
    WRITTEN["tokens"] += int((found[:, queries.shape[1] :] != pad_token_id).sum())
    return found, logits


ppo_trainer.batch_generation = counting


class Clock(TrainerCallback):
    """Notes when each iteration ends, what had been written by then, and the mean score."""

    def __init__(self):
        self.steps = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs = logs or {}

    def on_step_end(self, args, state, control, **kwargs):
        found = {"reward": self.logs.get("objective/scores"), "kl": self.logs.get("objective/kl")}
        self.steps.append({"end": time.time(), "tokens": WRITTEN["tokens"]} | found)


class Ruled(torch.nn.Module):
    """A rule in the shape of a sequence classifier, which is all that PPOTrainer takes: the score of a whole text
    stands at each of its positions."""

    base_model_prefix = "texts"

    def __init__(self, tokenizer, rows):
        super().__init__()
        self.texts, self.score = self.of_texts, torch.nn.Identity()
        self.tokenizer = tokenizer
        self.answers = {row["prompt"]: row["answer"] for row in rows}

    def of_texts(self, input_ids, attention_mask, **kwargs):
        scores = [self.of_text(ids[held].tolist()) for ids, held in zip(input_ids, attention_mask, strict=True)]
        spread = torch.tensor(scores)[:, None, None].expand(*input_ids.shape, 1)
        return SimpleNamespace(hidden_states=[spread])

    def of_text(self, ids):
        asked, _, completion = self.tokenizer.decode(ids).rpartition("<|im_start|>assistant\n")
        prompt = asked.rpartition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        return score(SETTINGS["rule"], completion.replace("<|im_end|>", ""), self.answers[prompt])


def load(kind, folder, **settings):
    model = kind.from_pretrained(folder, dtype=torch.float32, **settings)
    model.config.pad_token_id = 0
    return model


def main():
    tokenizer = AutoTokenizer.from_pretrained(SETTINGS["model"], padding_side="left")
    tokenizer.pad_token_id = 0  # its own is the token that ends an answer, which PPOTrainer would take for padding
    rows = load_dataset("json", data_files=SETTINGS["data"], split="train")
    if SETTINGS["reward_model"]:
        judge = load(AutoModelForSequenceClassification, SETTINGS["reward_model"])
    else:
        judge = Ruled(tokenizer, rows)

    def ask(row):
        turns = [{"role": "user", "content": row["prompt"]}]
        return {"input_ids": tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]}

    rows = rows.map(ask, remove_columns=rows.column_names)
    lora = SETTINGS["lora"]
    clock = Clock()
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(Path(sys.argv[2]).parent / "trl_output"),
            response_length=SETTINGS["max_new_tokens"],
            temperature=1.0,
            stop_token="eos",
            per_device_train_batch_size=SETTINGS["micro_batch_size"],
            gradient_accumulation_steps=SETTINGS["accumulation"],
            num_ppo_epochs=SETTINGS["passes"],
            total_episodes=SETTINGS["iterations"] * SETTINGS["micro_batch_size"] * SETTINGS["accumulation"],
            learning_rate=SETTINGS["learning_rate"],
            lr_scheduler_type="constant",
            kl_coef=SETTINGS["kl"],
            num_sample_generations=0,
            bf16=False,
            seed=SETTINGS["seed"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        ),
        processing_class=tokenizer,
        model=load(AutoModelForCausalLM, SETTINGS["model"]),
        ref_model=None,
        reward_model=judge,
        value_model=load(AutoModelForSequenceClassification, SETTINGS["model"], num_labels=1),
        train_dataset=rows,
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
