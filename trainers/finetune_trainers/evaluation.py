"""How well the model predicts and answers held-out rows. Called by the loop, on every rank at the same step.

`evaluate` measures the loss of given answers; `evaluate_generation` lets the model write its own. Both leave the
module as they found it, keep no gradients, and return the same figures on every rank.

Shapes: T tokens of a batch, K of them trained, V words of the vocabulary, B prompts of a batch, P the longest prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from finetune_api.spec import GenerationEval
from finetune_trainers.attention import forward_kwargs
from finetune_trainers.data.batches import IGNORED, Batch
from finetune_trainers.errors import DataError, NonFiniteLossError
from finetune_trainers.generation_metrics import answer_metrics, exact_match, token_f1

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from finetune_trainers.context import WorkerContext
    from finetune_trainers.data.prompts import EvalPrompt

__all__ = ["EarlyStop", "Verdict", "evaluate", "end_token_ids", "evaluate_generation", "evaluating", "finite_loss"]

LOGITS_ROWS = 512
"""Rows of logits taken to fp32 at a time: 100 MB for a vocabulary of 50,000."""
PROMPTS_PER_BATCH = 8
LARGEST_LOSS = 700.0
"""exp() of more than this is no longer a float."""


def evaluate(module: nn.Module, batches: Iterable[Batch], context: WorkerContext) -> dict[str, float]:
    """Loss (nats per trained token), perplexity and accuracy of the next token, over the batches of all ranks.

    Every trained token counts the same, whatever batch or rank it is in. Under ZeRO-3 all ranks must bring the same
    number of batches. Raises NonFiniteLossError when the loss is NaN or infinite, and DataError when there is
    nothing to measure, on all ranks alike.
    """
    totals = torch.zeros(3, dtype=torch.float64)  # sum of losses, correct tokens, tokens
    with evaluating(module), torch.no_grad():
        for batch in batches:
            totals += _sums(module, batch.to(context.device))
    totals = context.all_reduce_sum(totals.to(context.device))
    loss_sum, num_correct, num_tokens = totals.tolist()
    if num_tokens == 0:
        raise DataError("no row of the evaluation data has a token inside the loss")
    loss = finite_loss(loss_sum / num_tokens)
    return {
        "eval_loss": loss,
        "eval_perplexity": math.exp(min(loss, LARGEST_LOSS)),
        "eval_token_accuracy": num_correct / num_tokens,
        "eval_tokens": num_tokens,
    }


def finite_loss(loss: float) -> float:
    """`loss`, which every rank has. Raises NonFiniteLossError when it is NaN or infinite."""
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the evaluation loss is {loss}")
    return loss


def _sums(module: nn.Module, batch: Batch) -> Tensor:
    """[3] float64 on the CPU: sum of losses, number of correct tokens, number of trained tokens of one batch.

    A batch with nothing trained still goes through the module: under ZeRO-3 the other ranks wait for it.
    """
    logits = module(input_ids=batch.input_ids, **forward_kwargs(batch)).logits[0]  # [K, V]
    labels = batch.labels[batch.labels != IGNORED]  # [K]
    sums = torch.zeros(3, dtype=torch.float64)
    for start in range(0, labels.numel(), LOGITS_ROWS):
        rows = logits[start : start + LOGITS_ROWS].float()
        targets = labels[start : start + LOGITS_ROWS]
        sums[0] += functional.cross_entropy(rows, targets, reduction="sum").double().cpu()
        sums[1] += (rows.argmax(dim=-1) == targets).sum().cpu()
    sums[2] = labels.numel()
    return sums


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, and after it every submodule in the mode that it was in: frozen parts may differ."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def evaluate_generation(
    module: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[EvalPrompt],
    settings: GenerationEval,
    context: WorkerContext,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Greedy answers to `prompts` (at least one), their metrics, and one row per prompt for people to read.

    Prompts of similar length share a batch, and batches are dealt to the ranks in turn. Under ZeRO-3 every forward
    pass is a collective: all ranks get the same number of batches, and go on until the slowest answer has ended.
    """
    mine = _batches_of_rank([len(p.prompt_ids) for p in prompts], context.rank, context.world_size)
    answers: dict[int, str] = {}
    with evaluating(module), torch.no_grad():
        for batch in mine:
            texts = _answers(
                module,
                tokenizer,
                [prompts[i].prompt_ids for i in batch],
                settings,
                context,
            )
            answers.update(zip(batch, texts, strict=True))
    for others in context.all_gather_object(answers):
        answers.update(others)
    in_order = [answers[i] for i in range(len(prompts))]
    references = [prompt.reference for prompt in prompts]
    samples = [
        {
            "prompt": _decode(tokenizer, prompt.prompt_ids, skip_special_tokens=False),
            "reference": prompt.reference,
            "answer": answer,
            "exact_match": exact_match(answer, prompt.reference),
            "f1": token_f1(answer, prompt.reference),
        }
        for prompt, answer in zip(prompts, in_order, strict=True)
    ]
    return answer_metrics(in_order, references), samples


def _batches_of_rank(lengths: Sequence[int], rank: int, world_size: int) -> list[list[int]]:
    """Indices of the prompts that this rank answers, in batches of similar length, as many batches on every rank: a
    rank that is left over repeats the last batch."""
    by_length = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    batches = [by_length[i : i + PROMPTS_PER_BATCH] for i in range(0, len(by_length), PROMPTS_PER_BATCH)]
    batches += [batches[-1]] * (-len(batches) % world_size)
    return batches[rank::world_size]


def _answers(
    module: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[list[int]],
    settings: GenerationEval,
    context: WorkerContext,
) -> list[str]:
    """The answers to one batch of prompts, padded on the left so that all of them end where generation begins."""
    end_ids = end_token_ids(module, tokenizer)
    padding_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(end_ids), 0)
    longest = max(len(ids) for ids in prompt_ids)  # P
    padded = [[padding_id] * (longest - len(ids)) + ids for ids in prompt_ids]
    mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompt_ids]
    generated: Tensor = module.generate(  # type: ignore[operator]  # nn.Module's attributes are Tensor | Module
        input_ids=torch.tensor(padded, device=context.device),  # [B, P]
        attention_mask=torch.tensor(mask, device=context.device),  # [B, P]
        generation_config=_greedy(settings.max_new_tokens, end_ids, padding_id),
        synced_gpus=context.world_size > 1 and _is_split_over_ranks(module),
    )
    return [_decode(tokenizer, ids[longest:].tolist(), skip_special_tokens=True).strip() for ids in generated]


def _greedy(max_new_tokens: int, end_ids: list[int], padding_id: int) -> Any:
    """The likeliest token at each step. generate() fills what is left out from the model's own settings, so each one
    that would change the choice (a temperature, a penalty) is set to have no effect."""
    from transformers import (
        GenerationConfig,
    )  # a second of import that jobs without generation do not pay

    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids or None,
        pad_token_id=padding_id,
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_k=50,
        top_p=1.0,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        use_cache=True,
    )


def end_token_ids(module: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the tokenizer's, and those that the model's own generation settings add."""
    configured = getattr(getattr(module, "generation_config", None), "eos_token_id", None)
    of_model = configured if isinstance(configured, list) else [configured]
    return sorted({int(i) for i in (tokenizer.eos_token_id, *of_model) if i is not None})


def _is_split_over_ranks(module: nn.Module) -> bool:
    """Whether ZeRO-3 has partitioned the parameters (it marks each with an id)."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))


@dataclass(frozen=True)
class Verdict:
    """What one more evaluation says."""

    improved: bool
    """The loss is the lowest so far, by more than min_delta: keep this model."""
    stop: bool
    """There have been `patience` evaluations in a row without improvement."""


class EarlyStop:
    """Counts evaluations without improvement. No clock, no files: the loop tells it each loss in order."""

    def __init__(self, patience: int, min_delta: float = 0.0) -> None:
        self._patience = patience
        self._min_delta = min_delta
        self.num_without_improvement = 0
        self.best_loss = math.inf

    def update(self, loss: float) -> Verdict:
        """The verdict on the newest evaluation. The first one always improves."""
        improved = loss < self.best_loss - self._min_delta
        if improved:
            self.best_loss = loss
        self.num_without_improvement = 0 if improved else self.num_without_improvement + 1
        return Verdict(improved, stop=self.num_without_improvement >= self._patience)
