"""What a checkpoint is made of, as frozen models. Pure; `documents` says how they are written and upgraded.

    INTENT.json    Intent      everything that the coordinator knows before the first byte is written
    receipt-*      Receipt     one rank's files, with their digests
    MANIFEST.json  Manifest    the intent and all receipts: follows from these and from nothing else
                   Abandoned   the word, in a manifest's place, that there never will be one

Because a manifest follows from intent and receipts, whoever has these can complete a checkpoint whose coordinator died,
and two that do so at once write the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Literal, NamedTuple

from pydantic import AwareDatetime, Field, JsonValue

from finetune_api.base import Contract
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.documents import kind_of, parse
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.slices import Source

__all__ = [
    "ITEM_BYTES",
    "Abandoned",
    "AuxRecord",
    "BaseModelPin",
    "BlobRecord",
    "DataState",
    "Extent",
    "Intent",
    "Manifest",
    "ParamGroup",
    "Parent",
    "Receipt",
    "ShardRecord",
    "SliceKey",
    "TensorRecord",
    "World",
    "parse_manifest",
]

ITEM_BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of an element, by the names that safetensors has for types."""

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FileName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
"""In the checkpoint's own folder: a manifest cannot lead a reader anywhere else."""


class SliceKey(NamedTuple):
    """What slices are slices of: one state (`param`, `exp_avg`, ...) of one tensor of one role."""

    role: str
    name: str
    state: str


class World(Contract):
    """How the state was spread when it was saved. Restoring needs none of it; people and plans do."""

    size: Annotated[int, Field(ge=1)]
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    tensor_parallel: Annotated[int, Field(ge=1)] = 1


class BaseModelPin(Contract):
    """The model that training began from, by content."""

    source: str
    revision: str | None = None
    digest: str
    """blake3 over the names and contents of its weight files."""


class ParamGroup(Contract):
    """A group of the optimizer, found again by its name and never by its place."""

    role: str = "model"
    name: str
    tensors: tuple[str, ...]
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """All hyper-parameters: lr, betas, eps, weight_decay, step, ..."""


class TensorRecord(Contract):
    """One tensor and the states that are saved of it."""

    role: str = "model"
    """Which model: `model`, or `actor` and `critic` where a method trains two."""
    name: str
    shape: tuple[Count, ...]
    states: dict[str, str]
    """State -> type of its elements. `param` is the full-precision parameter; the others are the optimizer's."""

    @property
    def numel(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count


class DataState(Contract):
    """Where in the data training stands: the next batch follows from this alone."""

    seed: int
    epoch: Count
    """Passes over the data done."""
    cursor: Count
    """Rows or sequences of the present pass done."""
    digest: str
    """Of the prepared data; other data under the same cursor would be silently wrong. Several, with + between: one that
    is the same is enough."""

    @property
    def digests(self) -> set[str]:
        return set(self.digest.split("+"))


class Parent(Contract):
    """The checkpoint that the attempt resumed from."""

    step: Count
    epoch: Count


class BlobRecord(Contract):
    """A file that several checkpoints share; it lies in `blobs/` under its digest."""

    name: str
    digest: Digest
    bytes: Count


class Intent(Contract):
    """What is being saved."""

    kind: Literal["intent"] = "intent"
    version: Literal[1] = 1
    step: Count
    epoch: Count
    """Of the fence under which it is saved."""
    token: str
    """The fence's: tells two attempts apart where a store let both take one epoch."""
    job: str
    """uid of the job, or the run's name on a laptop."""
    attempt: Count = 0
    created: AwareDatetime
    """For people. Clocks differ, so nothing is decided by it."""
    writer: dict[str, str] = Field(default_factory=dict)
    """Versions of what wrote it: python, torch, deepspeed, ..."""
    world: World
    consumed_samples: Count = 0
    global_batch: Annotated[int, Field(ge=1)] = 1
    base_model: BaseModelPin | None = None
    adapter: dict[str, JsonValue] | None = None
    """Configuration of the adapter, when only an adapter is trained."""
    tensors: tuple[TensorRecord, ...]
    param_groups: tuple[ParamGroup, ...] = ()
    data: DataState | None = None
    lossy: dict[str, str] = Field(default_factory=dict)
    """States that are stored with less precision than they were held, and how."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Figures at this step that retention may choose by."""
    parent: Parent | None = None
    blobs: tuple[BlobRecord, ...] = ()

    @property
    def id(self) -> CheckpointId:
        return CheckpointId(self.epoch, self.step)


class Extent(NamedTuple):
    """A slice in a shard. A row of a long table, hence not a model of its own."""

    tensor: int
    """Index into the intent's tensors."""
    state: str
    start: int
    end: int
    offset: int
    """In the file, in bytes."""
    digest: str
    """blake3 over the digests of its chunks, end to end."""

    def size(self, item: int) -> int:
        """Bytes, of elements of `item` bytes."""
        return (self.end - self.start) * item


class ShardRecord(Contract):
    """One file of slices."""

    file: FileName
    bytes: Count
    chunk_bytes: Annotated[int, Field(ge=4096, multiple_of=4096)]
    """Bytes under one digest, counted from the start of each slice; its last chunk is shorter."""
    table_offset: Count
    """Where the digests of all chunks lie in the file: 32 bytes each, slice by slice."""
    extents: tuple[Extent, ...]
    """In the order of their offsets."""


class AuxRecord(Contract):
    """A small file of one rank."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    file: FileName
    bytes: Count
    digest: Digest


class Receipt(Contract):
    """A rank's word that its files are durable."""

    kind: Literal["receipt"] = "receipt"
    version: Literal[1] = 1
    step: Count
    epoch: Count
    token: str
    rank: Count
    shards: tuple[ShardRecord, ...] = ()
    aux: tuple[AuxRecord, ...] = ()

    def files(self) -> Iterator[tuple[str, int]]:
        """(name, bytes) of every file that the receipt stands for."""
        yield from ((shard.file, shard.bytes) for shard in self.shards)
        yield from ((aux.file, aux.bytes) for aux in self.aux)


class Manifest(Contract):
    """A checkpoint."""

    kind: Literal["checkpoint"] = "checkpoint"
    version: Literal[1] = 1
    intent: Intent
    receipts: tuple[Receipt, ...]
    """By rank: the receipts of all of them, as they are in the receipts' own files."""

    @property
    def id(self) -> CheckpointId:
        return self.intent.id

    @cached_property
    def bytes(self) -> int:
        """Of all files that the checkpoint alone holds, without intent, receipts and manifest."""
        return sum(size for receipt in self.receipts for _, size in receipt.files())

    def key(self, extent: Extent) -> SliceKey:
        tensor = self.intent.tensors[extent.tensor]
        return SliceKey(tensor.role, tensor.name, extent.state)

    def item(self, extent: Extent) -> int:
        return ITEM_BYTES[self.intent.tensors[extent.tensor].states[extent.state]]

    def sources(self) -> Iterator[Source[SliceKey]]:
        """Where all elements are, by the files' full names."""
        folder = layout.folder(self.id)
        for receipt in self.receipts:
            for shard in receipt.shards:
                for extent in shard.extents:
                    yield Source(
                        self.key(extent),
                        extent.start,
                        extent.end,
                        folder + shard.file,
                        extent.offset,
                        self.item(extent),
                        shard.chunk_bytes,
                    )


class Abandoned(Contract):
    """What stands in a manifest's place when the checkpoint will never be one: nobody can create the file any more."""

    kind: Literal["abandoned"] = "abandoned"
    version: Literal[1] = 1
    epoch: Count
    """Of the attempt that says so."""
    reason: str


def parse_manifest(data: bytes) -> Manifest | Abandoned:
    """What a MANIFEST.json says. Raises BadDocumentError."""
    return parse(data, Abandoned) if kind_of(data) == "abandoned" else parse(data, Manifest)
