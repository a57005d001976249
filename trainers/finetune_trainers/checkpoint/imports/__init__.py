"""Checkpoints of others made checkpoints of ours, which a training then resumes from.

    dcp         torch.distributed.checkpoint: its own files, or its Hugging Face safetensors
    deepspeed   DeepSpeed: a folder of save_checkpoint (ZeRO 1 to 3), or a universal checkpoint

`finetune ckpt import` calls `import_checkpoint`. A pickle can run any program when it is read. Formats
that consist of pickles are read only when that is allowed in so many words, and then by readers that build the few
harmless classes on a list and refuse every other one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError

__all__ = ["IMPORTS", "ImportFormat", "ImportOptions", "format_of", "import_checkpoint"]


@dataclass(frozen=True)
class ImportOptions:
    """What a foreign checkpoint does not say itself. A training resumes from the import only when it agrees."""

    job: str = "imported"
    """uid of the job, or namespace/name on a laptop."""
    base: Path | None = None
    """Folder of the base model: names and shapes are compared with it, and its digest is recorded."""
    step: int | None = None
    """Optimizer steps done; None: as the checkpoint says, 0 where it does not."""
    global_batch: int = 1
    """Sequences in a step."""
    adapter: dict[str, Any] | None = None
    """spec.tuning.lora, of a checkpoint of adapters."""
    weight_decay: float = 0.0
    """Of parameters with two dimensions or more: it groups them as the training will."""
    prefix: str = ""
    """What stands before the parameters' own names, such as `model.`; removed."""
    allow_pickle: bool = False
    owner: str = "import"
    """Whose fence it is published under."""


@dataclass(frozen=True)
class ImportFormat:
    """A way to come."""

    name: str
    description: str
    signs: tuple[str, ...]
    """Files and folders, of which one tells that a folder holds it."""
    read: Callable[[Path, Storage, ImportOptions, datetime], Manifest]


def format_of(source: Path) -> str:
    """The format that the files of a folder are of. Raises UserError when they are of none."""
    for found in IMPORTS.values():
        if any(next(source.glob(sign), None) for sign in found.signs):
            return found.name
    signs = "; ".join(f"{found.name}: {', '.join(found.signs)}" for found in IMPORTS.values())
    raise UserError(
        f"--from: {source} is no folder with a checkpoint of a known format, which would hold one of {signs}"
    )


def import_checkpoint(
    source: Path, storage: Storage, format_name: str, options: ImportOptions, now: datetime
) -> Manifest:
    """Make a published checkpoint in `storage` of the foreign one in the folder `source`: from then on the newest.

    It takes a fence: an attempt that is running publishes nothing any more.

    Raises UserError for what cannot be read, and for pickles without `allow_pickle`. `now` is put on record only.
    """
    chosen = IMPORTS.get(format_name)
    if chosen is None:
        raise UserError(f"--format: there is no format {format_name!r}; use one of {', '.join(IMPORTS)}")
    if not source.is_dir():
        raise UserError(f"--from: {source} is no folder; name the checkpoint's folder")
    return chosen.read(source, storage, options, now)


def _dcp(source: Path, storage: Storage, options: ImportOptions, now: datetime) -> Manifest:
    from finetune_trainers.checkpoint.imports.dcp import read

    return read(source, storage, options, now)


def _deepspeed(source: Path, storage: Storage, options: ImportOptions, now: datetime) -> Manifest:
    from finetune_trainers.checkpoint.imports.deepspeed import read

    return read(source, storage, options, now)


IMPORTS = {
    found.name: found
    for found in (
        ImportFormat(
            "dcp",
            "torch.distributed.checkpoint: .distcp files (a pickle lists them: --allow-pickle), or its safetensors",
            (".metadata", "*.safetensors"),
            _dcp,
        ),
        ImportFormat(
            "deepspeed",
            "DeepSpeed: a folder of save_checkpoint with ZeRO 1 to 3, or a universal one (pickles: --allow-pickle)",
            ("latest", "latest_universal", "zero", "*optim_states.pt"),
            _deepspeed,
        ),
    )
}
"""By name, for a command's choices and help."""
