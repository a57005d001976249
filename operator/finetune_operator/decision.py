"""What a pass decides: a value. `decide` returns it, `reconcile` carries it out.

Carried out in the order of the fields: what is created first, then what is deleted, then the status that speaks of
both, then the events that speak of the status, and last what is asked of others, which the status has noted too. A pass
that breaks off in between is made good by the next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from finetune_operator.kinds import Key, Kind

__all__ = ["Create", "Decision", "Delete", "Event", "Merge"]

Document = dict[str, Any]


@dataclass(frozen=True)
class Create:
    """An object that should exist. One of ours under that name is as good."""

    kind: Kind
    document: Document


@dataclass(frozen=True)
class Delete:
    """An object that should not exist: this one, by its uid, and not another that has its name by then."""

    kind: Kind
    key: Key
    uid: str | None


@dataclass(frozen=True)
class Merge:
    """A change to an object that is there, as a JSON merge patch. One that is gone by then needs none."""

    kind: Kind
    key: Key
    patch: Document


@dataclass(frozen=True)
class Event:
    """Something that people should hear of."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True)
class Decision:
    """All that follows from one look at a job. The empty one changes nothing."""

    create: tuple[Create, ...] = ()
    delete: tuple[Delete, ...] = ()
    status: Document | None = None
    """The FineTuneJob's whole new `status`; None: it stays as it is, and nothing is written."""
    events: tuple[Event, ...] = ()
    merge: tuple[Merge, ...] = ()
    requeue_after: float | None = None
    """Seconds until time alone would change the decision; None: never."""
