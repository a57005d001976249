"""Rollout in the process that trains, with the very weights that are trained. Built by online methods.

    B  rows of a batch      P  the longest prompt of some      L  columns of the cache      V  words of the vocabulary

Prompts are padded on the left, so that all rows end where the next token goes. One forward pass after the other:
either prompts enter, or each row gets one more token. Rows that have ended leave the batch, and prompts that wait
take their places; equal prompts enter as one. The logits of the last position alone are computed.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from finetune_trainers.context import WorkerContext
from finetune_trainers.evaluation import evaluating
from finetune_trainers.rollout import Completion, OnProgress, Request, Sampling
from finetune_trainers.rollout.beams import BeamSearch
from finetune_trainers.rollout.row_cache import PROMPT_TOKENS, RowCache
from finetune_trainers.rollout.sampling import draw, uniforms
from finetune_trainers.rollout.task import Task
from finetune_trainers.rollout.zero3 import fits_whole, gathered, inside, is_split, parameters_but

__all__ = ["InProcessEngine"]

LEAVING = 4
"""Rows leave, and others enter, when one in so many has ended: moving keys and values takes time too."""
_log = logging.getLogger(__name__)


class InProcessEngine:
    """Answers by a causal model: a plain one, one with adapters, or what an engine has made of it.

    Under ZeRO-3 parameters are gathered for the time of a call. Where that does not fit, all ranks make forward
    passes together until the last of them is done.

    A device that has no room for so many rows is given half of them from then on, and answers that were not whole are
    written anew. Not where ranks make passes together: the others are in the middle of one.
    """

    is_policy = True

    def __init__(
        self,
        module: nn.Module,
        pad_id: int,
        end_ids: Collection[int],
        context: WorkerContext,
        *,
        batch_size: int = 32,
        most_tokens: int | None = None,
        autocast: torch.dtype | None = None,
        gather: bool | None = None,
        without: Collection[str] = (),
    ) -> None:
        """`module`: the causal model, or the DeepSpeed engine around it. `end_ids`: tokens that end an answer.
        `batch_size`: rows that are written at once, fewer where they would come to more than `most_tokens`, prompts
        included. `autocast`: what its forward computes in under autocast, so
        that weights are rounded once for all tokens. `gather`: under ZeRO-3, None for where it fits. `without`: names
        of parts that take no part in writing, such as a critic, and are not gathered."""
        assert batch_size > 0, "somebody must write"
        self._module = inside(module)
        self._pad_id = pad_id
        self._end_ids = frozenset(end_ids)
        self._context = context
        self._batch_size, self._most_tokens = batch_size, most_tokens
        self._autocast = autocast
        self._gather = gather
        self._without = frozenset(without)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None = None
    ) -> list[Completion]:
        kind = BeamSearch if sampling.num_beams > 1 else _Writing
        writing = kind(Task(self._forward, requests, sampling, self._pad_id, self._end_ids))
        cast = torch.autocast(self._context.device.type, self._autocast, enabled=self._autocast is not None)
        with evaluating(self._module), torch.no_grad(), cast, self._parameters() as in_step:
            rows = self._rows(requests, sampling)
            writing.begin(rows)
            while True:
                try:
                    return self._written(writing, len(requests), on_progress, in_step)
                except torch.OutOfMemoryError:
                    if in_step or rows < 2 * sampling.num_beams:
                        raise
                rows //= 2
                writing.begin(rows)  # outside of the except block, whose traceback holds tensors too
                self._write_fewer(rows)

    def _rows(self, requests: Sequence[Request], sampling: Sampling) -> int:
        if self._most_tokens is None:
            return self._batch_size
        longest = max((len(request.prompt_ids) for request in requests), default=0) + sampling.max_new_tokens
        return max(1, min(self._batch_size, self._most_tokens // longest))

    def _written(
        self, writing: _Writing | BeamSearch, num: int, on_progress: OnProgress | None, in_step: bool
    ) -> list[Completion]:
        while self._goes_on(writing.is_over, in_step):
            if writing.is_over:
                idle = torch.tensor([[self._pad_id]], device=self._context.device)
                self._module(input_ids=idle, use_cache=False)
                continue
            num_done = writing.num_done
            writing.advance()
            if on_progress is not None and writing.num_done > num_done:
                on_progress(writing.num_done, num)
        return writing.completions()

    def _write_fewer(self, rows: int) -> None:
        """From now on."""
        _log.warning(
            "the device has no memory for so many answers at once; those that are not whole are written anew, %d at a"
            " time",
            rows,
        )
        self._batch_size = rows
        if self._context.device.type == "cuda":
            torch.cuda.empty_cache()

    def update_weights(self) -> None:
        """The weights are the policy's own."""

    def sleep(self) -> None:
        """Nothing is held between calls."""

    def wake(self) -> None:
        """Nothing was given back."""

    def close(self) -> None:
        """Nothing is held."""

    @contextmanager
    def _parameters(self) -> Iterator[bool]:
        """Parameters that a forward pass can use inside; yields whether ranks must make the passes together."""
        if not is_split(self._module):
            yield False
            return
        parameters = parameters_but(self._module, self._without)
        gather = fits_whole(parameters, self._context) if self._gather is None else self._gather
        if not gather:
            yield True
            return
        with gathered(self._module, parameters):
            yield False

    def _goes_on(self, is_over: bool, in_step: bool) -> bool:
        if not in_step:
            return not is_over
        at_work = torch.tensor(float(not is_over), device=self._context.device)
        return self._context.all_reduce_sum(at_work).item() > 0

    def _forward(self, ids: Sequence[Sequence[int]], paddings: Sequence[int], cache: RowCache) -> Tensor:
        """Logits [B, V] behind the new tokens `ids` [B, N]; `paddings` [B]: columns before a row's first token."""
        device = self._context.device
        before = cache.get_seq_length()
        tokens = torch.tensor(ids, device=device)  # [B, N]
        columns = torch.arange(before + tokens.shape[1], device=device)  # [L]
        starts = torch.tensor(paddings, device=device)[:, None]  # [B, 1]
        output: Any = self._module(
            input_ids=tokens,
            attention_mask=(columns >= starts).long(),  # [B, L]
            position_ids=(columns[before:] - starts).clamp(min=0),  # [B, N]
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


@dataclass
class _Row:
    """One answer while it is written."""

    request: int
    numbers: NDArray[np.float64]
    """One for each token that may come."""
    padding: int
    """Columns of the cache before its first token."""
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False

    @property
    def done(self) -> bool:
        return self.ended or len(self.ids) == len(self.numbers)


class _Writing:
    """One rank's answers, one forward pass at a time."""

    def __init__(self, task: Task) -> None:
        self._task, self._sampling = task, task.sampling
        self._prompts = [tuple(request.prompt_ids) for request in task.requests]
        assert all(self._prompts), "a prompt has at least one token"
        self._completions: dict[int, Completion] = {}
        self._batch_size = 0
        self._waiting: deque[int] = deque()
        self._rows: list[_Row] = []
        self._cache = RowCache()

    def begin(self, batch_size: int) -> None:
        """With so many rows at once; again, anew with what is not whole yet."""
        self._batch_size, prompts = batch_size, self._prompts
        left = [index for index in range(len(prompts)) if index not in self._completions]
        # the longest first: those that enter later need no more columns than there are; equal ones side by side
        self._waiting = deque(sorted(left, key=lambda i: (-len(prompts[i]), prompts[i], i)))
        self._rows, self._cache = [], RowCache()

    @property
    def num_done(self) -> int:
        return len(self._completions)

    @property
    def is_over(self) -> bool:
        return self.num_done == len(self._task.requests)

    def completions(self) -> list[Completion]:
        """In the order of requests."""
        return [self._completions[index] for index in range(len(self._task.requests))]

    def advance(self) -> None:
        """One forward pass, for new prompts or for the rows that are there."""
        num_live = sum(not row.done for row in self._rows)
        num_free = self._batch_size - num_live
        if self._waiting and (num_live == 0 or num_free * LEAVING >= self._batch_size):
            self._drop_done()
            self._enter(num_free)
            return
        if (len(self._rows) - num_live) * LEAVING >= len(self._rows):
            self._drop_done()
        ids = [[self._task.pad_id if row.done else row.ids[-1]] for row in self._rows]
        logits = self._task.forward(ids, [row.padding for row in self._rows], self._cache)
        self._take(self._rows, logits)

    def _enter(self, num_free: int) -> None:
        """Prompts that wait become rows, up to `num_free`, each with its first token."""
        entering = self._next(num_free)
        unique = list(dict.fromkeys(self._prompts[index] for index in entering))
        longest = len(unique[0])
        paddings = [longest - len(prompt) for prompt in unique]
        cache = RowCache()
        padded = [[self._task.pad_id] * padding + list(ids) for padding, ids in zip(paddings, unique, strict=True)]
        logits = self._task.forward(padded, paddings, cache)
        place = {prompt: number for number, prompt in enumerate(unique)}
        owners = [place[self._prompts[index]] for index in entering]
        if len(unique) < len(entering):
            logits = logits[owners]
            cache.keep(owners, 0)
        count = self._sampling.max_new_tokens
        rows = [
            _Row(index, uniforms(self._task.requests[index].seed, count), longest - len(self._prompts[index]))
            for index in entering
        ]
        self._take(rows, logits)
        self._join(rows, cache)

    def _next(self, num_free: int) -> list[int]:
        """The requests that enter now."""
        longest = len(self._prompts[self._waiting[0]])
        entering: list[int] = []
        num_unique = 0
        while self._waiting and len(entering) < num_free:
            index = self._waiting[0]
            if not entering or self._prompts[index] != self._prompts[entering[-1]]:
                if entering and (num_unique + 1) * longest > PROMPT_TOKENS:
                    break
                num_unique += 1
            entering.append(self._waiting.popleft())
        return entering

    def _join(self, rows: list[_Row], cache: RowCache) -> None:
        if not self._rows:
            self._rows, self._cache = rows, cache
            return
        ours, theirs = self._cache.get_seq_length(), cache.get_seq_length()
        for row in self._rows:
            row.padding += max(theirs - ours, 0)
        for row in rows:
            row.padding += max(ours - theirs, 0)
        self._cache.join(cache)
        self._rows += rows

    def _take(self, rows: list[_Row], logits: Tensor) -> None:
        """The next token of each of `rows` by logits [B, V]."""
        numbers = [0.0 if row.done else row.numbers[len(row.ids)] for row in rows]
        drawn = draw(logits, torch.tensor(numbers, dtype=torch.float64, device=logits.device), self._sampling)
        tokens, log_probs = (values.tolist() for values in drawn)
        for row, token, log_prob in zip(rows, tokens, log_probs, strict=True):
            if row.done:
                continue
            row.ids.append(token)
            row.log_probs.append(log_prob)
            row.ended = token in self._task.end_ids
            if row.done:
                self._completions[row.request] = Completion(row.ids, row.log_probs, row.ended)

    def _drop_done(self) -> None:
        """Rows that have ended leave, and with them the columns that only they had."""
        live = [place for place, row in enumerate(self._rows) if not row.done]
        if len(live) == len(self._rows):
            return
        self._rows = [self._rows[place] for place in live]
        if not live:
            self._cache = RowCache()
            return
        first = min(row.padding for row in self._rows)
        for row in self._rows:
            row.padding -= first
        self._cache.keep(live, first)
