"""Which checkpoints stay. Pure; `sweep` carries it out.

Several trainings may have saved at one place (`identity`): of a job that was deleted and made again, or whose data
changed. Each is judged alone, so that none counts among the last or the best of another. Every rule only adds to what
is kept, and the newest valid checkpoint of each training is kept before any rule is asked, so no policy and no
combination of them can lose it. A quota takes away again, the least useful first and those of the newest training last,
and stops before the newest valid ones, before pinned ones, and before those that the caller protects (such as the one
that the run resumed from, which is known to be readable). Trainings other than that of the newest checkpoint go as a
whole where somebody says so. Dates have no part in it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Contract
from finetune_trainers.checkpoint.layout import CheckpointId

__all__ = ["Best", "Candidate", "Retention", "Verdict", "choose"]

Positive = Annotated[int, Field(ge=1)]


class Best(Contract):
    """Keep the checkpoints at which a metric was best."""

    metric: str
    mode: Literal["min", "max"] = "min"
    count: Positive = 1


class Retention(Contract):
    """What to keep beside the newest valid checkpoint."""

    keep_last: Positive | None = 3
    """None: all stay, but for what a quota takes away."""
    keep_every: Positive | None = None
    """Steps: those whose step is a multiple of it stay."""
    keep_best: Best | None = None
    quota_bytes: Positive | None = None
    """Of all checkpoints' own files together; what may not be deleted may exceed it."""
    drop_others: bool = False
    """Of trainings other than that of the newest checkpoint nothing stays but what is pinned or in use."""


@dataclass(frozen=True)
class Candidate:
    """A checkpoint as far as retention cares."""

    id: CheckpointId
    bytes: int
    metrics: dict[str, float] = field(default_factory=dict)
    pinned: bool = False
    training: int = 0
    """The number of its training; 0 is that of the newest checkpoint."""


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint stays, and why."""

    id: CheckpointId
    keep: bool
    reasons: tuple[str, ...]


def choose(
    candidates: Sequence[Candidate],
    policy: Retention,
    newest_valid: Collection[CheckpointId],
    protected: Collection[CheckpointId] = (),
) -> list[Verdict]:
    """A verdict for each candidate, newest first.

    `newest_valid` has one of each training; where one has none, nothing is known to be readable, and all of it stays.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.id, reverse=True)
    whole = {candidate.training: candidate.id for candidate in ordered if candidate.id in newest_valid}
    dropped = {candidate.id for candidate in ordered if policy.drop_others and 0 in whole and candidate.training}
    firm = {one.id: _firm(one, whole.get(one.training), one.id in dropped, protected) for one in ordered}
    wished: dict[CheckpointId, tuple[str, ...]] = {}
    for training, newest in sorted(whole.items()):
        own = [one for one in ordered if one.training == training and one.id <= newest and one.id not in dropped]
        wished |= _wishes(own, policy)
    over = _over_quota(ordered, firm, wished, policy)
    return [_verdict(one, (*firm[one.id], *wished.get(one.id, ())), one.id in over, policy) for one in ordered]


def _verdict(candidate: Candidate, reasons: tuple[str, ...], is_over: bool, policy: Retention) -> Verdict:
    keep, another = bool(reasons) and not is_over, ("of another training",) if candidate.training else ()
    if is_over:
        reasons = (f"over the quota of {policy.quota_bytes} bytes",)
    return Verdict(candidate.id, keep, (reasons or ("no rule keeps it",)) + another)


def _firm(
    candidate: Candidate, newest_valid: CheckpointId | None, is_dropped: bool, protected: Collection[CheckpointId]
) -> tuple[str, ...]:
    """Reasons that no quota overrules. What is newer than the newest valid one is damaged: a person may mend it."""
    reasons = []
    if not is_dropped:
        if newest_valid is None:
            reasons.append("no checkpoint of its training is known to be whole")
        elif candidate.id == newest_valid:
            reasons.append("the newest that is whole")
        elif candidate.id > newest_valid:
            reasons.append("newer than the newest that is whole")
    if candidate.pinned:
        reasons.append("pinned")
    if candidate.id in protected:
        reasons.append("in use")
    return tuple(reasons)


def _wishes(ordered: Sequence[Candidate], policy: Retention) -> dict[CheckpointId, tuple[str, ...]]:
    """What the rules keep, in the order in which a quota gives it up last: best, last, every."""
    wished: dict[CheckpointId, tuple[str, ...]] = {}

    def wish(candidate: Candidate, reason: str) -> None:
        wished[candidate.id] = (*wished.get(candidate.id, ()), reason)

    for candidate in _best(ordered, policy.keep_best):
        wish(candidate, f"best by {policy.keep_best.metric}" if policy.keep_best else "")
    for candidate in ordered[: policy.keep_last]:
        all_stay = "no rule says that it may go"
        wish(candidate, all_stay if policy.keep_last is None else f"one of the last {policy.keep_last}")
    for candidate in ordered:
        if policy.keep_every is not None and candidate.id.step % policy.keep_every == 0:
            wish(candidate, f"at a multiple of {policy.keep_every} steps")
    return wished


def _best(ordered: Sequence[Candidate], rule: Best | None) -> list[Candidate]:
    """Of equals the newest."""
    if rule is None:
        return []
    sign = 1 if rule.mode == "min" else -1
    measured = [one for one in ordered if math.isfinite(one.metrics.get(rule.metric, math.nan))]
    return sorted(measured, key=lambda one: sign * one.metrics[rule.metric])[: rule.count]


def _over_quota(
    ordered: Sequence[Candidate],
    firm: dict[CheckpointId, tuple[str, ...]],
    wished: dict[CheckpointId, tuple[str, ...]],
    policy: Retention,
) -> set[CheckpointId]:
    """Those that must go to make room: the last in `wished` first, which are the oldest of the weakest rule."""
    if policy.quota_bytes is None:
        return set()
    sizes = {candidate.id: candidate.bytes for candidate in ordered}
    total = sum(size for id_, size in sizes.items() if firm[id_] or id_ in wished)
    dropped = set()
    for id_ in reversed(wished):
        if total <= policy.quota_bytes:
            break
        if not firm[id_]:
            dropped.add(id_)
            total -= sizes[id_]
    return dropped
