"""What a trainer and its writer tell each other: one JSON object a line, over a socket pair. Pure.

    trainer   begin     once: where to write, for which attempt
              flush     a staged set lies in a buffer; write it
              give-up   some rank could not write its part of this step: do not publish it
    writer    ready     it runs
              written   its rank's part is durable, and the buffer free
              published (rank 0) the checkpoint exists
              failed    there will be no checkpoint of this step, for this reason

The lines are short: what is large, slices and intent, lies in the buffer that a `flush` names. The end of the stream
from the trainer means that nothing more will come; the writer finishes what it was given, and ends.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal, NamedTuple, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from finetune_api.base import Contract
from finetune_api.progress import SavedCheckpoint
from finetune_trainers.checkpoint.fence import Fence
from finetune_trainers.checkpoint.manifest import Intent, Parent
from finetune_trainers.checkpoint.retention import Retention

__all__ = [
    "VERSION",
    "Begin",
    "Failed",
    "Flush",
    "GiveUp",
    "Published",
    "Ready",
    "Said",
    "StagedAux",
    "StagedSet",
    "StagedSlice",
    "Told",
    "Written",
    "line",
    "said",
    "told",
]

VERSION: Final = 1
"""Trainer and writer are of one installation; a mixed one must not go unseen."""


class _Message(Contract):
    version: Literal[1] = VERSION


class Begin(_Message):
    kind: Literal["begin"] = "begin"
    uri: str
    pvc_root: str
    exclusive: bool
    """Whether the store's conditional writes hold, as rank 0 has found."""
    rank: int
    fence: Fence
    retention: Retention
    protected: Parent | None = None
    """The checkpoint that the attempt went on from: no policy deletes it."""
    expected_bytes: int = 0
    """Of a staged set: the writer takes the memory for it before the trainer needs it."""


class Flush(_Message):
    kind: Literal["flush"] = "flush"
    buffer: int
    start: int
    """Where the StagedSet lies in it, as JSON."""
    end: int


class GiveUp(_Message):
    kind: Literal["give-up"] = "give-up"
    step: int
    reason: str


class Ready(_Message):
    kind: Literal["ready"] = "ready"
    pid: int


class Written(_Message):
    kind: Literal["written"] = "written"
    step: int
    seconds: float


class Published(_Message):
    kind: Literal["published"] = "published"
    checkpoint: SavedCheckpoint
    seconds: float
    """From the first byte that rank 0 wrote."""


class Failed(_Message):
    kind: Literal["failed"] = "failed"
    step: int
    reason: str
    superseded: bool = False
    """A newer attempt has begun: nothing that this one saves will ever count."""


Told = Annotated[Begin | Flush | GiveUp, Field(discriminator="kind")]
Said = Annotated[Ready | Written | Published | Failed, Field(discriminator="kind")]


class StagedSlice(NamedTuple):
    """A slice of the intent's tensors and where its bytes lie in the buffer. A row of a long table."""

    tensor: int
    state: str
    start: int
    end: int
    offset: int


class StagedAux(NamedTuple):
    """A small file, by name with suffix, and where it lies."""

    name: str
    offset: int
    size: int


class StagedSet(Contract):
    """One rank's part of a checkpoint, in a buffer."""

    intent: Intent
    slices: tuple[StagedSlice, ...]
    aux: tuple[StagedAux, ...]
    folder: str | None = None
    """Files that checkpoints share (`folders`), in a folder made for this flush; deleted after it. Rank 0's."""


Message = TypeVar("Message")

_TOLD: TypeAdapter[Told] = TypeAdapter(Told)
_SAID: TypeAdapter[Said] = TypeAdapter(Said)


def line(message: Told | Said) -> bytes:
    return message.model_dump_json(by_alias=True, exclude_none=True).encode() + b"\n"


def told(data: bytes) -> Told:
    """What the trainer has told. Raises ValueError for anything that is not of this version."""
    return _parsed(_TOLD, data)


def said(data: bytes) -> Said:
    """What the writer has said. Raises ValueError."""
    return _parsed(_SAID, data)


def _parsed(adapter: TypeAdapter[Message], data: bytes) -> Message:
    try:
        return adapter.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ValueError(f"{data[:200]!r} is no message of version {VERSION}: {first['msg']}") from None
