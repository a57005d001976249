"""Checkpoints written for others to open: one function, and a table of the formats that there are.

    hf          Hugging Face: a model folder, or a PEFT adapter folder of a LoRA checkpoint; merged when asked
    dcp         torch.distributed.checkpoint: weights and moments, for any number of ranks
    deepspeed   DeepSpeed's universal checkpoint: weights and moments, for any number of ranks and ZeRO stage

`python -m finetune_trainers` and tests call `export_checkpoint`. A format's module is imported when it is used: hf
needs no torch. Writing a foreign format may make pickles, since that is what its readers expect; none is read here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

from finetune_api.progress import Artifact
from finetune_api.spec import Precision
from finetune_trainers.checkpoint.exports.destination import local_folder
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError

__all__ = ["EXPORTS", "ExportFormat", "ExportOptions", "export_checkpoint"]


@dataclass(frozen=True)
class ExportOptions:
    """What can be chosen. A format takes those that it names, and refuses the others."""

    dtype: Precision | None = None
    """Type of the weights; None: bf16 of a model, fp32 of an adapter."""
    max_shard_bytes: int = 5_000_000_000
    """Largest file of weights, as the Hub has it."""
    base: Path | None = None
    """Folder of the base model; None: where the checkpoint says that it is."""
    merge: bool = False
    """Add a LoRA checkpoint's adapters to the base: a whole model."""
    optimizer: str = "torch"
    """Whose AdamW will read the state: `torch`, or `deepspeed` (FusedAdam, CPUAdam)."""
    role: str = "model"
    """Which model, of a method that trains several."""


@dataclass(frozen=True)
class ExportFormat:
    """A way to leave."""

    name: str
    description: str
    """For `--help`: what is written, and who opens it."""
    options: tuple[str, ...]
    """Fields of ExportOptions."""
    takes_buckets: bool
    """Whether the destination may be s3:// or gs://; otherwise a folder of this machine."""
    write: Callable[[Storage, Manifest, str, ExportOptions], Artifact]


def export_checkpoint(
    storage: Storage, manifest: Manifest, to: str, format_name: str, options: ExportOptions | None = None
) -> Artifact:
    """Write a checkpoint of `storage` to `to`, a new folder or a URI, and describe what was written.

    Raises UserError for what cannot be, DamagedError when the checkpoint is damaged; then nothing is at `to`.
    """
    options = options or ExportOptions()
    chosen = EXPORTS.get(format_name)
    if chosen is None:
        raise UserError(f"--format: there is no format {format_name!r}; use one of {', '.join(EXPORTS)}")
    for field in fields(options):
        default = field.default if field.default is not MISSING else None
        if field.name not in chosen.options and getattr(options, field.name) != default:
            option = field.name.replace("_", "-")
            raise UserError(f"--{option}: the format {format_name} does not have it; leave it out")
    if local_folder(to) is None and not chosen.takes_buckets:
        raise UserError(f"--to: the format {format_name} is written to a folder of this machine, and {to} is none")
    return chosen.write(storage, manifest, to, options)


def _hugging_face(storage: Storage, manifest: Manifest, to: str, options: ExportOptions) -> Artifact:
    from finetune_trainers.checkpoint.exports.hugging_face import write

    return write(storage, manifest, to, options)


def _dcp(storage: Storage, manifest: Manifest, to: str, options: ExportOptions) -> Artifact:
    from finetune_trainers.checkpoint.exports.dcp import write

    return write(storage, manifest, to, options)


def _deepspeed(storage: Storage, manifest: Manifest, to: str, options: ExportOptions) -> Artifact:
    from finetune_trainers.checkpoint.exports.deepspeed import write

    return write(storage, manifest, to, options)


EXPORTS = {
    found.name: found
    for found in (
        ExportFormat(
            "hf",
            "Hugging Face safetensors: a model folder; of a LoRA checkpoint a PEFT adapter folder, or merged a model",
            ("dtype", "max_shard_bytes", "base", "merge", "role"),
            takes_buckets=True,
            write=_hugging_face,
        ),
        ExportFormat(
            "dcp",
            "torch.distributed.checkpoint, weights and optimizer state: torch.distributed.checkpoint.load reads it",
            ("role",),
            takes_buckets=False,
            write=_dcp,
        ),
        ExportFormat(
            "deepspeed",
            "DeepSpeed universal checkpoint, weights and optimizer state: engine.load_checkpoint reads it"
            " with checkpoint.load_universal, at any number of ranks and ZeRO stage 1 to 3",
            ("optimizer", "role"),
            takes_buckets=False,
            write=_deepspeed,
        ),
    )
}
"""By name, for a command's choices and help."""
