"""The peer: TRL's DPOTrainer on rows in a given order. Runs in TRL's environment, never in ours.

    python trl_dpo.py SETTINGS.json RESULT.json

Settings: model (folder in Hugging Face layout), data (jsonl of prompt, chosen and rejected, already rendered, in the
order in which they are to be seen), loss_types, beta, max_length, batch_size, steps, learning_rate, threads.
Result: by loss type the losses, margins and gradient norms of all steps. Called by bench_dpo_parity.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

SETTINGS = json.loads(Path(sys.argv[1]).read_text())
FIGURES = ("loss", "grad_norm", "rewards/margins", "rewards/chosen", "logps/chosen", "logps/rejected")
torch.set_num_threads(SETTINGS["threads"])


class InOrder(DPOTrainer):
    """Rows come as they stand: which rows share a batch is settled before."""

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(dataset if dataset is not None else self.train_dataset)


def curve(loss_type):
    trainer = InOrder(
        model=AutoModelForCausalLM.from_pretrained(SETTINGS["model"], dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(Path(sys.argv[2]).parent / f"trl_output_{loss_type}"),
            loss_type=[loss_type],
            beta=SETTINGS["beta"],
            max_length=SETTINGS["max_length"],
            per_device_train_batch_size=SETTINGS["batch_size"],
            max_steps=SETTINGS["steps"],
            learning_rate=SETTINGS["learning_rate"],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=1.0,
            bf16=False,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=load_dataset("json", data_files=SETTINGS["data"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(SETTINGS["model"]),
    )
    # Kept as they are counted: what is logged is rounded.
    norms = []
    clip = trainer.accelerator.clip_grad_norm_
    trainer.accelerator.clip_grad_norm_ = lambda *args, **kwargs: norms.append(clip(*args, **kwargs)) or norms[-1]
    losses = []
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: losses.append(step(*args, **kwargs)) or losses[-1]
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    figures = {name: [entry[name] for entry in logged] for name in FIGURES if name in logged[0]}
    return figures | {"loss": [float(loss) for loss in losses], "grad_norm": [float(norm) for norm in norms]}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps({loss_type: curve(loss_type) for loss_type in SETTINGS["loss_types"]}))
