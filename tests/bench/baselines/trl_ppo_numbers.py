"""The peer: what TRL's PPOTrainer makes of its rollouts, number by number. Runs in the environment of TRL 1.12, the
last that has it.

    python trl_ppo_numbers.py SETTINGS.json RESULT.safetensors

Its formulas stand in one long method. So it trains, in float64, and each time that it calls for whitened advantages or
for gradients its variables are written down. Settings: draws, kl.

Result, by "draw/": of an iteration's rollouts [B, T] log_probs, ref_log_probs, values, ended (bool, up to the end
token), paid (bool, one token more where there is one: there TRL puts the score), kl, rewards, advantages (before they
are whitened), returns, whitened; scores [B]. By "draw/step/": log_probs, old, advantages, values, old_values, returns,
ended, paid; policy_loss, value_loss; and the gradient of their weighted sum, grad_log_probs, grad_values. Called by
bench_ppo_parity.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

SETTINGS = json.loads(Path(sys.argv[1]).read_text())
WORDS = ["<pad>", "<end>", *"abcdefghij"]
PROMPT, ANSWER, BATCH = 4, 14, 16
FOUND = {}
whiten = ppo_trainer.masked_whiten


def keep(prefix, **tensors):
    for name, tensor in tensors.items():
        FOUND[f"{prefix}/{name}"] = tensor.detach().clone().contiguous()


def tokenizer():
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", unk_token="<pad>", padding_side="left"
    )


def model(kind, seed):
    """Small, with weights large enough for opinions, and one word in a dozen ends an answer."""
    torch.manual_seed(seed)
    made = kind(
        LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
            num_labels=1,
        )
    ).double()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    return made


def watched(prefix):
    """`masked_whiten` that writes down the variables of the loop that calls it."""

    def masked_whiten(values, mask, shift_mean=True):
        white = whiten(values, mask, shift_mean)
        seen = sys._getframe(1).f_locals
        held, paid = ~seen["padding_mask"], ~seen["padding_mask_p1"]
        keep(
            prefix,
            rewards=seen["rewards"],
            log_probs=seen["logprobs"],
            ref_log_probs=seen["ref_logprobs"],
            values=seen["values"],
        )
        keep(prefix, ended=held, paid=paid, kl=seen["kl"], scores=seen["scores"], returns=seen["returns"])
        keep(prefix, advantages=values, whitened=white.masked_fill(~held, 0))
        return white

    return masked_whiten


def backward_of(trainer, prefix):
    """`accelerator.backward` that does the same."""
    backward, steps = trainer.accelerator.backward, iter(range(1000))

    def noted(loss, **kwargs):
        seen, step = sys._getframe(1).f_locals, f"{prefix}/{next(steps)}"
        rows = seen["micro_batch_inds"]
        pulls = torch.autograd.grad(loss, [seen["new_logprobs"], seen["vpred"]], retain_graph=True)
        keep(step, log_probs=seen["new_logprobs"], old=seen["mb_logprobs"], advantages=seen["mb_advantage"])
        keep(step, values=seen["vpred"], old_values=seen["mb_values"], returns=seen["mb_return"])
        keep(step, ended=~seen["padding_mask"][rows], paid=~seen["padding_mask_p1"][rows])
        keep(step, policy_loss=seen["pg_loss"], value_loss=seen["vf_loss"])
        keep(step, grad_log_probs=pulls[0], grad_values=pulls[1])
        return backward(loss, **kwargs)

    return noted


def train(draw, folder):
    prefix = str(draw)
    torch.manual_seed(draw)
    rows = [{"input_ids": torch.randint(2, len(WORDS), (PROMPT,)).tolist()} for _ in range(BATCH)]
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=folder,
            response_length=ANSWER,
            temperature=1.0,
            stop_token="eos",
            per_device_train_batch_size=BATCH // 2,
            gradient_accumulation_steps=2,
            num_ppo_epochs=3,
            # The first iteration has nothing to differ from: neither the reference nor the policy that wrote.
            total_episodes=2 * BATCH,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            kl_coef=SETTINGS["kl"],
            kl_estimator="k1",
            whiten_rewards=False,
            gamma=0.97,
            lam=0.9,
            num_sample_generations=0,
            bf16=False,
            seed=draw,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        processing_class=tokenizer(),
        model=model(LlamaForCausalLM, draw),
        ref_model=model(LlamaForCausalLM, draw),
        reward_model=model(LlamaForSequenceClassification, draw + 1),
        value_model=model(LlamaForSequenceClassification, draw + 2),
        train_dataset=Dataset.from_list(rows),
    )
    ppo_trainer.masked_whiten = watched(prefix)
    trainer.accelerator.backward = backward_of(trainer, prefix)
    trainer.train()


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for draw in range(SETTINGS["draws"]):
            train(draw, folder)
    save_file(FOUND, sys.argv[2])


if __name__ == "__main__":
    main()
