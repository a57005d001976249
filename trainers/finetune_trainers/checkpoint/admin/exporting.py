"""`finetune ckpt export`: a checkpoint in a format that others open.

The formats are the table of `exports`: what is added there can be chosen here.
"""

from __future__ import annotations

from pathlib import Path

from finetune_api.checkpoint_requests import ToExport
from finetune_api.checkpoints import Exported
from finetune_api.spec import Precision
from finetune_trainers.checkpoint.exports import ExportOptions, export_checkpoint
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.protocol import Storage

__all__ = ["exported"]


def exported(storage: Storage, manifest: Manifest, asked: ToExport) -> Exported:
    """Write `manifest` to a new folder or URI. Raises UserError, and DamagedError when the checkpoint is damaged."""
    defaults = ExportOptions()
    options = ExportOptions(
        dtype=None if asked.dtype is None else Precision(asked.dtype),
        max_shard_bytes=asked.max_shard_bytes or defaults.max_shard_bytes,
        base=None if asked.base is None else Path(asked.base),
        merge=asked.merge,
        role=asked.role or defaults.role,
    )
    written = export_checkpoint(storage, manifest, asked.to, asked.format, options)
    return Exported(
        id=str(manifest.id),
        to=written.uri,
        format=asked.format,
        kind=written.kind,
        digest=written.digest,
        bytes=written.bytes,
    )
