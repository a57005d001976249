"""What `finetune ckpt` is told of the checkpoints at a place: one report for each of its verbs.

`python -m finetune_trainers.checkpoint.admin` looks at the storage and prints a `Told` per line; the command shows the
report as tables, or prints it as it is with `-o json`. Keys are only ever added. Every key is always there, null where
nothing is known. Sizes are bytes.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import AwareDatetime, Field, JsonValue

from finetune_api.base import Contract

__all__ = [
    "DAMAGED",
    "IN_USE",
    "Activity",
    "CheckpointDetails",
    "CheckpointList",
    "CheckpointState",
    "CheckpointSummary",
    "Collection",
    "Comparison",
    "Damages",
    "Difference",
    "Exported",
    "FileDamage",
    "GroupSummary",
    "Imported",
    "Mended",
    "PinReport",
    "PinSummary",
    "RankReads",
    "Reasoned",
    "Repair",
    "RestoreCosts",
    "StateSummary",
    "StoredFile",
    "TensorSummary",
    "ValueDifference",
    "Verification",
]

DAMAGED = 20
"""Exit code: a checkpoint that was looked at is damaged."""
IN_USE = 21
"""Exit code: refused, because a run seems to be at work there."""


class CheckpointState(StrEnum):
    """What a checkpoint's folder is."""

    WHOLE = "whole"
    """Published, and all its files are there as its manifest says."""
    DAMAGED = "damaged"
    """Published, and not as its manifest says any more."""
    UNFINISHED = "unfinished"
    """Begun, and not published: being saved, or left by a run that died."""
    ABANDONED = "abandoned"
    """Given up: it will never be a checkpoint."""
    DELETING = "deleting"
    """On its way out: a sweep has begun to delete it."""


class PinSummary(Contract):
    """Who keeps a checkpoint, and why. All null when the pin's own document cannot be read; it counts all the same."""

    by: str | None = None
    reason: str | None = None
    created: AwareDatetime | None = None


class CheckpointSummary(Contract):
    """One checkpoint, as a row of a list."""

    id: str
    step: int
    epoch: int
    """The attempt that saved it, counted from 1."""
    state: CheckpointState
    problems: list[str] = Field(default_factory=list)
    """Why it is not whole."""
    created: AwareDatetime | None = None
    """By the clock of the machine that saved it."""
    bytes: int
    """Of all files in its folder."""
    world_size: int | None = None
    zero_stage: int | None = None
    metrics: dict[str, float] = Field(default_factory=dict)
    pin: PinSummary | None = None
    keep: bool | None = None
    """Whether retention keeps it; null for what is no checkpoint."""
    reasons: list[str] = Field(default_factory=list)
    """Why it is kept, or why not."""


class Activity(Contract):
    """The last sign of life of the attempt that may publish here."""

    owner: str
    epoch: int
    last_sign: AwareDatetime | None = None
    """When it began or last began to save, by its own clock."""
    quiet_seconds: float
    """How long it may be silent and still count as at work."""
    at_work: bool
    """It counts as at work."""


class CheckpointList(Contract):
    """All checkpoints at a place, newest first."""

    uri: str
    checkpoints: list[CheckpointSummary] = Field(default_factory=list)
    newest: str | None = None
    """The one that a run would go on from."""
    bytes: int = 0
    """Of everything at the place."""
    shared_bytes: int = 0
    """Of these: in files that checkpoints share."""
    activity: Activity | None = None


class StateSummary(Contract):
    """All tensors of a role that have a state of one type."""

    role: str
    state: str
    dtype: str
    num_tensors: int
    num_elements: int
    bytes: int


class GroupSummary(Contract):
    """A group of the optimizer."""

    role: str
    name: str
    num_tensors: int
    options: dict[str, JsonValue]
    """Lists of one value for each tensor are left out."""


class StoredFile(Contract):
    """A file of a checkpoint."""

    name: str
    bytes: int
    rank: int | None = None
    """null: it is not one rank's."""


class TensorSummary(Contract):
    """A tensor, and the type of each state that is saved of it."""

    role: str
    name: str
    shape: list[int]
    states: dict[str, str]


class CheckpointDetails(Contract):
    """Everything that a checkpoint says of itself."""

    uri: str
    summary: CheckpointSummary
    job: str
    attempt: int
    base_model: dict[str, JsonValue] | None = None
    adapter: dict[str, JsonValue] | None = None
    writer: dict[str, str]
    """Versions of the programs that saved it."""
    consumed_samples: int
    global_batch: int
    data: dict[str, JsonValue] | None = None
    parent: str | None = None
    """The checkpoint that its attempt went on from."""
    lossy: dict[str, str]
    groups: list[GroupSummary]
    states: list[StateSummary]
    files: list[StoredFile]
    num_tensors: int
    num_parameters: int
    tensors: list[TensorSummary] | None = None
    """null unless they are asked for."""


class FileDamage(Contract):
    """One thing that is wrong with a file, and which elements of which tensor it is about, if it is about some."""

    file: str
    what: str
    role: str | None = None
    tensor: str | None = None
    state: str | None = None
    start: int | None = None
    end: int | None = None


class Damages(Contract):
    """What verification found of one checkpoint."""

    id: str
    whole: bool
    damages: list[FileDamage] = Field(default_factory=list)


class Verification(Contract):
    """What was verified, newest first."""

    uri: str
    deep: bool
    """Every byte was read; otherwise sizes, receipts and documents."""
    whole: bool
    """All of them are."""
    checkpoints: list[Damages]
    deleted: list[str] = Field(default_factory=list)
    """Asked for, and deleted while they were looked at, as a run does with old ones: not damaged."""
    bytes_read: int


class Difference(Contract):
    """Something that two checkpoints say differently; null on the side that does not say it."""

    what: str
    a: JsonValue = None
    b: JsonValue = None


class ValueDifference(Contract):
    """How far the elements of a state of a tensor are apart."""

    role: str
    tensor: str
    state: str
    num_elements: int
    num_different: int
    max_abs: float | None = None
    """null where nothing can be subtracted: a type without arithmetic, or NaN and infinity only."""
    relative_norm: float | None = None
    """|a - b| / |a|; null when |a| is 0 and |b| is not."""
    num_not_finite: int = 0
    """Different elements of which one is NaN or infinite; they are in no other figure."""


class Comparison(Contract):
    """What differs between two checkpoints."""

    a: str
    b: str
    fields: list[Difference]
    """Of what they say of themselves, metrics included."""
    tensors: list[Difference]
    """Tensors that only one has, or that differ in shape or type."""
    values: list[ValueDifference] | None = None
    """Those that differ, the furthest apart first; null unless values were asked for."""
    num_compared: int = 0
    """States of tensors whose values were compared."""


class RankReads(Contract):
    """What one process would read to go on from a checkpoint."""

    rank: int
    bytes_needed: int
    bytes_read: int
    """With what lies between, and whole chunks where only parts are needed, so that all can be verified."""
    requests: int
    files: int
    memory_bytes: int
    """At the most, while it reads: what it keeps, and the requests in flight."""


class RestoreCosts(Contract):
    """What going on from a checkpoint would cost at some world size."""

    id: str
    saved_world: int
    saved_zero_stage: int
    world: int
    zero_stage: int
    ranks: list[RankReads]
    bytes_needed: int
    bytes_read: int
    amplification: float
    """Bytes read / bytes needed."""
    memory_bytes: int
    """Of the process that needs most."""
    fits: bool | None = None
    """In the memory that was named for a process."""
    notes: list[str] = Field(default_factory=list)


class Exported(Contract):
    """A checkpoint written in another format."""

    id: str
    to: str
    format: str
    kind: str
    digest: str
    bytes: int


class Imported(Contract):
    """A checkpoint of another program, made one of ours."""

    id: str
    uri: str
    source: str
    format: str
    step: int
    job: str
    global_batch: int
    num_tensors: int
    num_parameters: int
    num_with_moments: int
    """Tensors whose optimizer state came along."""
    bytes: int
    notes: list[str] = Field(default_factory=list)


class Reasoned(Contract):
    """A checkpoint, and why something is done with it."""

    id: str
    reason: str
    bytes: int = 0


class Collection(Contract):
    """What a sweep by hand deleted, or would delete."""

    uri: str
    dry_run: bool
    kept: list[Reasoned]
    deleted: list[Reasoned]
    completed: list[str]
    """Unfinished ones that turned out to be all there."""
    blobs: int
    """Shared files that nothing refers to, deleted."""
    blob_bytes: int
    bytes: int
    """Freed, shared files included."""
    unfinished: int | None = None
    """Files and uploads deleted, a day old, whose writers died; null where the storage does not tell."""
    activity: Activity | None = None
    notes: list[str] = Field(default_factory=list)


class Mended(Contract):
    """A small document that was written again from what is known."""

    file: str
    what: str


class Repair(Contract):
    """What was put in order, or would be."""

    uri: str
    dry_run: bool
    completed: list[str]
    """Published: all their receipts are there."""
    closed: list[Reasoned]
    """Unfinished, and never to be finished; nothing of them is deleted here."""
    revived: list[str]
    """Pinned ones whose deletion had been announced and not begun."""
    mended: list[Mended]
    head: Difference | None = None
    """HEAD.json before and after; null when it was right."""
    damaged: list[Damages]
    """What cannot be mended."""
    activity: Activity | None = None


class PinReport(Contract):
    """What pinning or unpinning did."""

    id: str
    pinned: bool
    changed: bool
    """false: it was so before."""
    pin: PinSummary | None = None
