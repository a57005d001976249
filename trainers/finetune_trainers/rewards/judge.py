"""A reward that is a reward model: frozen, and reading text by its own tokenizer and template. It is a model of its
own, split over the ranks where the policy is, or an adapter on the policy's base, where `online.judges` has put it.

    T  tokens of a packed row      D  documents in it

A prompt and its answer become the conversation that they are, with the token that ends an answer, as in the data that
the model was trained on. So it does not matter what tokenizer the policy has. What is longer than the model's positions
is cut at its end, which is counted and told once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from finetune_api.plan import RunPlan
from finetune_api.spec import DataFormat, ModelReward
from finetune_trainers.attention import PACKED_ATTENTION
from finetune_trainers.context import WorkerContext
from finetune_trainers.cpu_products import use_fast_products
from finetune_trainers.data.batches import IGNORED, Batch, dummy_batch
from finetune_trainers.data.encoding import load_encoding
from finetune_trainers.data.tokenize import RowTokenizer
from finetune_trainers.data.turns import Conversation
from finetune_trainers.evaluation import evaluating
from finetune_trainers.frozen import load_frozen, not_split
from finetune_trainers.methods.reward import Calibration
from finetune_trainers.precisions import DTYPES
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.resting import RestingWeights
from finetune_trainers.rewards import Episode, Scored
from finetune_trainers.rewards.judge_checks import JudgeFiles, find_judge
from finetune_trainers.rollout.zero3 import inside, is_split
from finetune_trainers.score_head import read_packed, scores
from finetune_trainers.tuning import peft_warnings_off

__all__ = ["Judge", "OnPolicy", "load_judge", "load_report_off"]

_TOKENS_PER_PASS = {"cpu": 2048, "cuda": 16384}
"""Enough to keep the device busy; a longer answer goes alone."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OnPolicy:
    """A reward model that is part of the policy."""

    module: nn.Module
    """The engine's. Called with `judge` and `score_positions` it gives scores."""
    name: str
    """The `judge`."""


def load_judge(
    reward: ModelReward,
    path: str,
    plan: RunPlan,
    prepared: PreparedRun,
    context: WorkerContext,
    on_policy: OnPolicy | None = None,
) -> Judge:
    """The reward model that stands at `path` of the job, in the plan's precision. Raises UserError."""
    with not_split():
        files = find_judge(reward, path)
    if on_policy is not None:
        module = on_policy.module
    else:
        module = load_frozen(partial(_load, files, DTYPES[plan.precision], context.device), plan)
    if context.rank == 0 and files.encoding.fingerprint != load_encoding(plan, prepared.model).fingerprint:
        logger.info("%s has another tokenizer or template than the model: answers go to it as text", path)
    return Judge(module, files, context, on_policy)


class Judge:
    """One reward model."""

    def __init__(
        self, module: nn.Module, files: JudgeFiles, context: WorkerContext, on_policy: OnPolicy | None = None
    ) -> None:
        """`module` reads packed documents on the context's device. Where it is split, scoring is collective."""
        self._module = module
        self._context, self._device = context, context.device
        self._in_step = is_split(module)
        self._read: Callable[..., Any] = module
        self._at_work: Callable[[], AbstractContextManager[None]] = partial(evaluating, module)
        if on_policy is not None:
            self._read = partial(module, judge=on_policy.name)
        else:
            self._at_work = RestingWeights(module, files.model).at_work
        self._padding_id = files.padding_id
        self._calibration = files.calibration
        encoding = files.encoding
        self._tokenizer = RowTokenizer(
            encoding.tokenizer,
            encoding.renderer(DataFormat.PREFERENCE),
            eos_id=encoding.eos_id,
            stop_ids=frozenset(encoding.stop_tokens.values()),
            loss_on="last",
        )
        config: Any = inside(module).config
        self._max_positions: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._told_of_cuts = False

    def score(self, episodes: Sequence[Episode]) -> Scored:
        """See `Scorer`."""
        documents, faults = self._encode(episodes)
        values: list[float | None] = [None] * len(episodes)
        for found, places in self._scored(documents):
            for place, score in zip(places, found.tolist(), strict=True):
                if math.isfinite(score):
                    values[place] = _calibrated(score, self._calibration)
                else:
                    faults[place] = f"the reward model's score is {score}"
        return Scored(values, dict(sorted(faults.items())))

    def close(self) -> None:
        return None

    def _scored(self, documents: dict[int, list[int]]) -> list[tuple[Tensor, list[int]]]:
        """Scores, and the places of the documents that have them."""
        batches = list(_packed(documents, _TOKENS_PER_PASS.get(self._device.type, 16384)))
        if self._in_step:
            most = max(self._context.all_gather_object(len(batches)))
            batches += [(dummy_batch(), [])] * (most - len(batches))
        with self._at_work(), torch.no_grad():
            found = [(scores(self._read, batch.to(self._device), self._padding_id), one) for batch, one in batches]
        return [(values, places) for values, places in found if places]

    def _encode(self, episodes: Sequence[Episode]) -> tuple[dict[int, list[int]], dict[int, str]]:
        """Tokens of each episode, by its place; and why there are none."""
        items: list[Any] = [
            Conversation([*episode.prompt, {"role": "assistant", "content": episode.completion}])
            for episode in episodes
        ]
        [(_, rows)] = self._tokenizer.encode_all([(None, items)])
        ends = np.cumsum(rows.lengths)
        documents: dict[int, list[int]] = {}
        num_cut = 0
        for place, (end, length) in enumerate(zip(ends.tolist(), rows.lengths.tolist(), strict=True)):
            if length:
                kept = min(length, self._max_positions or length)
                num_cut += kept < length
                documents[place] = rows.ids[end - length : end - length + kept].tolist()
        if num_cut and not self._told_of_cuts:
            self._told_of_cuts = True
            logger.warning(
                "%d of %d answers are longer with their prompts than the reward model's %d positions; their ends are"
                " cut off for it",
                num_cut,
                len(episodes),
                self._max_positions,
            )
        return documents, {place: fault.message for place, fault in rows.faults.items()}


def _calibrated(score: float, calibration: Calibration | None) -> float:
    if calibration is None:
        return score
    standing = (score - calibration.mean) / calibration.scale
    if not calibration.squash:
        return standing
    return 1 / (1 + math.exp(-standing)) if standing > 0 else math.exp(standing) / (1 + math.exp(standing))


def _packed(documents: dict[int, list[int]], num_tokens: int) -> Iterator[tuple[Batch, list[int]]]:
    """Batches of at most `num_tokens`, or of one document, and the places of their documents; the longest first, so
    that a device without room for it says so at once."""
    places: list[int] = []
    filled = 0
    for place in sorted(documents, key=lambda place: -len(documents[place])):
        if places and filled + len(documents[place]) > num_tokens:
            yield _batch([documents[one] for one in places]), places
            places, filled = [], 0
        places.append(place)
        filled += len(documents[place])
    if places:
        yield _batch([documents[one] for one in places]), places


def _batch(documents: Sequence[Sequence[int]]) -> Batch:
    """`documents` end to end; nothing is trained."""
    lengths = torch.tensor([len(one) for one in documents])
    ids = torch.tensor([token for one in documents for token in one])[None]  # [1, T]
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])[None]
    boundaries = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])  # [D + 1]
    nothing: Tensor = torch.full_like(ids, IGNORED)
    return Batch(ids, nothing, positions, boundaries, int(lengths.max()), 0)


def _load(
    files: JudgeFiles, dtype: torch.dtype, device: torch.device, zero3_config: dict[str, Any] | None
) -> nn.Module:
    with load_report_off() if files.adapter is not None else nullcontext():
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            files.model, dtype=dtype, attn_implementation=PACKED_ATTENTION, local_files_only=True, num_labels=1
        )
        read_packed(model)
        if files.adapter is not None:
            from finetune_trainers.lean_peft import peft

            with peft_warnings_off():
                model = peft.PeftModel.from_pretrained(model, str(files.adapter), autocast_adapter_dtype=False)
    if zero3_config is None:
        model.to(device)
    use_fast_products(model, dtype, device)
    module: nn.Module = model
    return module


@contextmanager
def load_report_off() -> Iterator[None]:
    """transformers warns of the head that the base does not have, and the adapter brings it."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
