"""Beam search: the likeliest answers that are found by going on with several beginnings of each at once. Called by
`in_process`, for rollouts and for candidates alike.

    B  beginnings, of all prompts that are searched together      V  words of the vocabulary

No chance is involved: whoever searches for a prompt finds the same answers.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finetune_trainers.rollout import Completion
from finetune_trainers.rollout.row_cache import PROMPT_TOKENS, RowCache
from finetune_trainers.rollout.task import Task

__all__ = ["BeamSearch"]


@dataclass(frozen=True)
class _Beam:
    """An answer, or the beginning of one: its last token, and what stands before that."""

    before: _Beam | None
    token: int
    log_prob: float
    total: float
    """Log-probability of all its tokens."""
    length: int


@dataclass
class _Search:
    """For one prompt."""

    prompt: tuple[int, ...]
    padding: int
    """Columns of the cache before the prompt."""
    live: list[_Beam]
    ended: list[_Beam] = field(default_factory=list)


class BeamSearch:
    """One rank's answers, one forward pass at a time. Requests with the same prompt share its search, of which each
    gets the answer at its `place`, the best one first."""

    def __init__(self, task: Task) -> None:
        self._task, self._sampling = task, task.sampling
        self._waiting: dict[tuple[int, ...], int] = defaultdict(int)
        for request in task.requests:
            self._waiting[tuple(request.prompt_ids)] += 1
        self._found: dict[tuple[int, ...], list[Completion]] = {}
        self._at_once = 0
        self._order: deque[tuple[int, ...]] = deque()
        self._searches: list[_Search] = []
        self._cache = RowCache()

    def begin(self, batch_size: int) -> None:
        """With so many rows at once; again, anew with what is not found yet."""
        self._at_once = max(1, batch_size // self._sampling.num_beams)
        left = [prompt for prompt in self._waiting if prompt not in self._found]
        self._order = deque(sorted(left, key=lambda prompt: (-len(prompt), prompt)))
        self._searches, self._cache = [], RowCache()

    @property
    def num_done(self) -> int:
        return sum(self._waiting[prompt] for prompt in self._found)

    @property
    def is_over(self) -> bool:
        return len(self._found) == len(self._waiting)

    def completions(self) -> list[Completion]:
        """In the order of requests."""
        return [self._found[tuple(request.prompt_ids)][request.place] for request in self._task.requests]

    def advance(self) -> None:
        """One forward pass, for new prompts or for the beginnings that are there."""
        if self._searches:
            ids = [[beam.token] for search in self._searches for beam in search.live]
        else:
            self._enter()
            longest = len(self._searches[0].prompt)
            ids = [[self._task.pad_id] * (longest - len(one.prompt)) + list(one.prompt) for one in self._searches]
        paddings = [search.padding for search in self._searches for _ in search.live]
        logits = self._task.forward(ids, paddings, self._cache)
        self._go_on((logits.float() / (self._sampling.temperature or 1.0)).log_softmax(dim=-1).double())

    def _enter(self) -> None:
        fitting = max(1, PROMPT_TOKENS // len(self._order[0]))
        prompts = [self._order.popleft() for _ in range(min(self._at_once, fitting, len(self._order)))]
        nothing = _Beam(None, self._task.pad_id, 0.0, 0.0, 0)
        self._searches = [_Search(one, len(prompts[0]) - len(one), [nothing]) for one in prompts]
        self._cache = RowCache()

    def _go_on(self, log_probs: Tensor) -> None:
        """Each search goes on with the best of all continuations, by log-probabilities [B, V]."""
        kept: list[int] = []  # rows of the cache that beginnings go on from
        goes_on: list[_Search] = []
        row = 0
        for search in self._searches:
            upto = row + len(search.live)
            parents = self._extend(search, log_probs[row:upto])
            if self._is_over(search):
                self._found[search.prompt] = self._best(search)
            else:
                goes_on.append(search)
                kept += [row + parent for parent in parents]
            row = upto
        self._searches = goes_on
        if not goes_on:
            return
        first = min(search.padding for search in goes_on)
        for search in goes_on:
            search.padding -= first
        self._cache.keep(kept, first)

    def _extend(self, search: _Search, log_probs: Tensor) -> list[int]:
        """The new beginnings of `search`; which of the old ones each goes on from."""
        beams, width = self._sampling.num_beams, log_probs.shape[-1]
        before = torch.tensor([beam.total for beam in search.live], dtype=torch.float64, device=log_probs.device)
        totals = (before[:, None] + log_probs).flatten()
        # so many that enough are left when all others have come to an end
        best = totals.topk(min((1 + max(len(self._task.end_ids), 1)) * beams, len(totals)))
        own = log_probs.flatten()[best.indices].tolist()
        live: list[_Beam] = []
        parents: list[int] = []
        for rank, (place, total) in enumerate(zip(best.indices.tolist(), best.values.tolist(), strict=True)):
            parent, token = divmod(place, width)
            beam = _Beam(search.live[parent], token, own[rank], total, search.live[parent].length + 1)
            if token not in self._task.end_ids:
                if len(live) < beams:
                    live.append(beam)
                    parents.append(parent)
            elif rank < beams:
                search.ended.append(beam)
        search.live = live
        return parents

    def _is_over(self, search: _Search) -> bool:
        return len(search.ended) >= self._sampling.num_beams or search.live[0].length == self._sampling.max_new_tokens

    def _best(self, search: _Search) -> list[Completion]:
        penalty, end_ids = self._sampling.length_penalty, self._task.end_ids
        cut = search.live if search.live[0].length == self._sampling.max_new_tokens else []
        ranked = sorted([*search.ended, *cut], key=lambda beam: beam.total / beam.length**penalty, reverse=True)
        return [_completion(beam, beam.token in end_ids) for beam in ranked[: self._sampling.num_beams]]


def _completion(beam: _Beam, ended: bool) -> Completion:
    ids: list[int] = []
    log_probs: list[float] = []
    here: _Beam | None = beam
    while here is not None and here.before is not None:
        ids.append(here.token)
        log_probs.append(here.log_prob)
        here = here.before
    return Completion(ids[::-1], log_probs[::-1], ended)
