"""Which checkpoints stay. Pure; `sweep` carries it out.

Every rule only adds to what is kept, and the newest valid checkpoint is kept before any rule is asked, so no policy and
no combination of them can lose it. A quota takes away again, the least useful first, and stops before that one, before
pinned ones, and before those that the caller protects (such as the one that the run resumed from, which is known
to be readable). Dates have no part in it.
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


@dataclass(frozen=True)
class Candidate:
    """A checkpoint as far as retention cares."""

    id: CheckpointId
    bytes: int
    metrics: dict[str, float] = field(default_factory=dict)
    pinned: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint stays, and why."""

    id: CheckpointId
    keep: bool
    reasons: tuple[str, ...]


def choose(
    candidates: Sequence[Candidate],
    policy: Retention,
    newest_valid: CheckpointId | None,
    protected: Collection[CheckpointId] = (),
) -> list[Verdict]:
    """A verdict for each candidate, newest first.

    `newest_valid` None: nothing is known to be readable, and everything stays.
    """
    ordered = sorted(candidates, key=lambda candidate: candidate.id, reverse=True)
    if newest_valid is None:
        return [Verdict(candidate.id, True, ("no checkpoint is known to be whole",)) for candidate in ordered]
    firm = {candidate.id: _firm(candidate, newest_valid, protected) for candidate in ordered}
    wished = _wishes([candidate for candidate in ordered if candidate.id <= newest_valid], policy)
    dropped = _over_quota(ordered, firm, wished, policy)
    verdicts = []
    for candidate in ordered:
        reasons = (*firm[candidate.id], *wished.get(candidate.id, ()))
        if candidate.id in dropped:
            verdicts.append(Verdict(candidate.id, False, (f"over the quota of {policy.quota_bytes} bytes",)))
        else:
            verdicts.append(Verdict(candidate.id, bool(reasons), reasons or ("no rule keeps it",)))
    return verdicts


def _firm(candidate: Candidate, newest_valid: CheckpointId, protected: Collection[CheckpointId]) -> tuple[str, ...]:
    """Reasons that no quota overrules. What is newer than the newest valid one is damaged: a person may mend it."""
    reasons = []
    if candidate.id == newest_valid:
        reasons.append("the newest that is whole")
    if candidate.id > newest_valid:
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
