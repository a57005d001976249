"""What the methods that compare answers have in common: each sequence counts the same, and so it is evaluated.

Called by the methods. A sequence is a pair of answers, or one answer that somebody liked or did not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from finetune_trainers.context import WorkerContext
from finetune_trainers.data.batches import Batch
from finetune_trainers.errors import DataError
from finetune_trainers.evaluation import evaluating, finite_loss
from finetune_trainers.methods import Method

__all__ = ["PAIR_SUMS", "evaluate_sequences", "pair_figures", "pair_sums", "pairs"]

PAIR_SUMS = 4


def pairs(values: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """`values` [D] of the documents as (chosen, rejected), [B] each; none of a batch without sequences."""
    both = values[: 2 * len(batch.slots)].view(-1, 2)
    return both[:, 0], both[:, 1]


def pair_sums(chosen: Tensor, rejected: Tensor) -> Tensor:
    """float64 [PAIR_SUMS] of the rewards [B] of chosen and rejected answers."""
    wins = (chosen > rejected).double().sum()
    count = torch.tensor(float(len(chosen)), dtype=torch.float64, device=chosen.device)
    return torch.stack([chosen.double().sum(), rejected.double().sum(), wins, count]).detach()


def pair_figures(sums: Sequence[float]) -> dict[str, float]:
    """Mean rewards, their difference, and the share of pairs in which the chosen answer has the higher one."""
    chosen, rejected, wins, count = sums[:PAIR_SUMS]
    count = max(count, 1.0)
    return {
        "rewards/chosen": chosen / count,
        "rewards/rejected": rejected / count,
        "rewards/margins": (chosen - rejected) / count,
        "rewards/accuracies": wins / count,
    }


def evaluate_sequences(
    method: Method, module: nn.Module, batches: Iterable[Batch], context: WorkerContext
) -> dict[str, float]:
    """Mean loss and the method's figures over the sequences of all ranks. Collective, the same on every rank.

    Raises NonFiniteLossError, and DataError when there is nothing to measure, on all ranks alike.
    """
    totals = torch.zeros(2 + method.num_sums, dtype=torch.float64, device=context.device)
    with evaluating(module), torch.no_grad():
        for batch in batches:
            found = method.loss(module, batch.to(context.device))
            totals[0] += found.total
            totals[1] += len(batch.slots)
            totals[2:] += found.sums
    total, count, *sums = context.all_reduce_sum(totals).tolist()
    if count == 0:
        raise DataError("the evaluation data has no rows")
    figures = {"loss": finite_loss(total / count), "rows": count, **method.figures(sums)}
    return {f"eval_{name}": value for name, value in figures.items()}
