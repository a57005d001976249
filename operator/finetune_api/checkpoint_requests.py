"""What `finetune ckpt` asks of `python -m finetune_trainers.checkpoint.admin`: one request a process, as JSON.

The answers are in `checkpoints`. `uri` names the place: file:///, pvc://, s3:// or gs://. A checkpoint is named by
`newest`, a step (`200`), a step of an attempt (`200-e1`) or its whole name.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, TypeAdapter

from finetune_api.base import Contract

__all__ = [
    "KeepBest",
    "Request",
    "Rules",
    "ToCollect",
    "ToCompare",
    "ToExport",
    "ToImport",
    "ToInspect",
    "ToList",
    "ToPin",
    "ToPlan",
    "ToRepair",
    "ToUnpin",
    "ToVerify",
    "parse_request",
]

Positive = Annotated[int, Field(ge=1)]
ZeroStage = Annotated[int, Field(ge=0, le=3)]


class KeepBest(Contract):
    """Keep the checkpoints at which a metric was best."""

    metric: str
    mode: Literal["min", "max"] = "min"
    count: Positive = 1


class Rules(Contract):
    """Which checkpoints of each training stay, beside its newest whole one and pinned ones."""

    keep_last: Positive | None = None
    """null: all, but for what a quota takes away."""
    keep_every: Positive | None = None
    keep_best: KeepBest | None = None
    quota_bytes: Positive | None = None
    drop_others: bool = False
    """Of trainings other than that of the newest checkpoint only pinned ones stay."""


class ToList(Contract):
    verb: Literal["ls"] = "ls"
    uri: str
    keep: Rules = Rules()


class ToInspect(Contract):
    verb: Literal["inspect"] = "inspect"
    uri: str
    id: str
    tensors: bool = False


class ToVerify(Contract):
    verb: Literal["verify"] = "verify"
    uri: str
    id: str | None = None
    """null: the newest that was published, damaged or not."""
    all: bool = False
    deep: bool = False


class ToCompare(Contract):
    verb: Literal["diff"] = "diff"
    uri: str
    a: str
    b: str
    uri_of_b: str | None = None
    """null: the same place."""
    states: list[str] | None = None
    """Whose values are compared too; null: none are read."""


class ToPlan(Contract):
    verb: Literal["plan"] = "plan"
    uri: str
    id: str
    world: Annotated[int, Field(ge=1, le=100_000)]
    zero_stage: ZeroStage | None = None
    memory: Positive | None = None
    """Bytes that a process has for restoring."""


class ToExport(Contract):
    verb: Literal["export"] = "export"
    uri: str
    id: str
    to: str
    format: str
    dtype: Literal["bf16", "fp16", "fp32"] | None = None
    max_shard_bytes: Positive | None = None
    base: str | None = None
    merge: bool = False
    role: str | None = None


class ToImport(Contract):
    verb: Literal["import"] = "import"
    uri: str
    """Where it goes; there need be nothing yet."""
    source: str
    """The foreign checkpoint's folder on this machine."""
    format: str | None = None
    """null: told by its files."""
    job: str | None = None
    """Whose checkpoint it becomes: the job's uid, or namespace/name where it has none."""
    base: str | None = None
    """Folder or URI of the base model."""
    base_revision: str | None = None
    step: Annotated[int, Field(ge=0)] | None = None
    global_batch: Positive | None = None
    adapter: dict[str, JsonValue] | None = None
    """spec.tuning.lora, every field of it; null: it is not of adapters."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] | None = None
    prefix: str = ""
    allow_pickle: bool = False
    by: str
    take_over: bool = False


class ToCollect(Contract):
    verb: Literal["gc"] = "gc"
    uri: str
    keep: Rules
    by: str
    dry_run: bool = False
    take_over: bool = False


class ToRepair(Contract):
    verb: Literal["repair"] = "repair"
    uri: str
    by: str
    dry_run: bool = False
    take_over: bool = False


class ToPin(Contract):
    verb: Literal["pin"] = "pin"
    uri: str
    id: str
    by: str
    reason: str = ""


class ToUnpin(Contract):
    verb: Literal["unpin"] = "unpin"
    uri: str
    id: str


Request = (
    ToList | ToInspect | ToVerify | ToCompare | ToPlan | ToExport | ToImport | ToCollect | ToRepair | ToPin | ToUnpin
)
_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="verb")])


def parse_request(text: str) -> Request:
    """The request in a JSON text. Raises pydantic's ValidationError."""
    return _REQUEST.validate_json(text)
