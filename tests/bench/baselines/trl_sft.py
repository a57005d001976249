"""The peer: supervised fine-tuning with TRL's SFTTrainer, timed. Runs in TRL's environment, never in ours.

    python trl_sft.py SETTINGS.json RESULT.json

Settings: model (folder in Hugging Face layout), data (jsonl of {"messages": [user, assistant]}), max_seq_length,
micro_batch_size, accumulation, steps, precision (fp32, bf16), lora {rank, alpha, target_modules}, learning_rate, seed,
threads, variant:

    default   SFTTrainer as it comes, but for what the job asks for (packing, length, batch, LoRA, precision)
    tuned     what a person would turn off for speed where memory is plenty: gradient checkpointing

Result: variant and for each optimizer step its end (seconds since the epoch) and tokens that went through the model.
Called by bench_sft_throughput and bench_startup.
"""

import json
import sys
import time
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

SETTINGS = json.loads(Path(sys.argv[1]).read_text())
torch.set_num_threads(SETTINGS["threads"])


class TimedTrainer(SFTTrainer):
    """Counts what goes through the model. Packed rows arrive without padding, so every token is a real one."""

    num_tokens = 0
    num_trained_tokens = 0

    def training_step(self, model, inputs, *args, **kwargs):
        assert "attention_mask" not in inputs, "padded, so the count of tokens would be wrong"
        self.num_tokens += inputs["input_ids"].numel()
        self.num_trained_tokens += int((inputs["labels"] != -100).sum())
        return super().training_step(model, inputs, *args, **kwargs)


class Clock(TrainerCallback):
    """Notes when each optimizer step ends, and what it had seen by then."""

    def __init__(self):
        self.steps = []
        self.trainer = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.time()

    def on_step_end(self, args, state, control, **kwargs):
        trainer = self.trainer
        self.steps.append(
            {"end": time.time(), "tokens": trainer.num_tokens, "trained_tokens": trainer.num_trained_tokens}
        )


def main():
    tokenizer = AutoTokenizer.from_pretrained(SETTINGS["model"])
    rows = load_dataset("json", data_files=SETTINGS["data"], split="train")
    # A conversation's end as the completion: the loss is then on the answer only.
    rows = rows.map(
        lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
        remove_columns=rows.column_names,
    )
    clock = Clock()
    trainer = TimedTrainer(
        model=SETTINGS["model"],
        args=SFTConfig(
            output_dir=str(Path(sys.argv[2]).parent / "trl_output"),
            packing=True,
            max_length=SETTINGS["max_seq_length"],
            per_device_train_batch_size=SETTINGS["micro_batch_size"],
            gradient_accumulation_steps=SETTINGS["accumulation"],
            max_steps=SETTINGS["steps"],
            learning_rate=SETTINGS["learning_rate"],
            bf16=SETTINGS["precision"] == "bf16",
            seed=SETTINGS["seed"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            **({"gradient_checkpointing": False} if SETTINGS["variant"] == "tuned" else {}),
            **SETTINGS.get("arguments", {}),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM",
            r=SETTINGS["lora"]["rank"],
            lora_alpha=SETTINGS["lora"]["alpha"],
            target_modules=SETTINGS["lora"]["target_modules"],
        ),
        callbacks=[clock],
    )
    clock.trainer = trainer
    trainer.train()
    result = {
        "variant": SETTINGS["variant"],
        "attention": trainer.model.config._attn_implementation,
        "began": clock.began,
        "steps": clock.steps,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "sequences": len(trainer.train_dataset),
        "dataset_tokens": sum(len(row) for row in trainer.train_dataset["input_ids"]),
    }
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
