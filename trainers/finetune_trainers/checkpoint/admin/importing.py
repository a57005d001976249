"""`finetune ckpt import`: a checkpoint of another program becomes one of ours, for a training to go on from.

The formats are the table of `imports`. Publishing takes the fence, as every attempt does, so a run that seems to be at
work at the place is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from finetune_api.checkpoint_requests import ToImport
from finetune_api.checkpoints import Imported
from finetune_trainers.checkpoint.admin.activity import activity_at, demand_quiet
from finetune_trainers.checkpoint.admin.upkeep import Mandate
from finetune_trainers.checkpoint.imports import ImportOptions, format_of, import_checkpoint
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError
from finetune_trainers.model_sources import locate_model

__all__ = ["imported"]


def imported(storage: Storage, asked: ToImport, mandate: Mandate) -> Imported:
    """Publish what is in the folder `asked.source`. Raises UserError, InUseError, StorageError."""
    source = Path(asked.source)
    if not mandate.take_over:
        demand_quiet(activity_at(storage, mandate.now), mandate.now)
    defaults = ImportOptions()
    options = ImportOptions(
        job=asked.job or defaults.job,
        base=None if asked.base is None else _base_folder(asked.base, asked.base_revision),
        step=asked.step,
        global_batch=asked.global_batch or defaults.global_batch,
        adapter=asked.adapter,
        weight_decay=defaults.weight_decay if asked.weight_decay is None else asked.weight_decay,
        prefix=asked.prefix,
        allow_pickle=asked.allow_pickle,
        owner=mandate.owner,
    )
    format_name = asked.format or format_of(source)
    made = import_checkpoint(source, storage, format_name, options, mandate.now)
    return Imported(
        id=str(made.id),
        uri=storage.uri,
        source=str(source),
        format=format_name,
        step=made.id.step,
        job=made.intent.job,
        global_batch=made.intent.global_batch,
        num_tensors=len(made.intent.tensors),
        num_parameters=sum(tensor.numel for tensor in made.intent.tensors),
        num_with_moments=sum(len(tensor.states) > 1 for tensor in made.intent.tensors),
        bytes=made.bytes,
        notes=list(_notes(asked, made)),
    )


def _base_folder(text: str, revision: str | None) -> Path:
    found = locate_model(text, "--base", revision) if "://" in text else Path(text)
    if not found.is_dir():
        raise UserError(f"--base: {found} is no folder; name the folder with the base model's config.json and weights")
    return found


def _notes(asked: ToImport, made: Manifest) -> Iterator[str]:
    """What a training will not take up, or not as before."""
    unsaid = [
        name
        for name, value in (("job", asked.job), ("base model", asked.base), ("global batch", asked.global_batch))
        if value is None
    ]
    if unsaid:
        yield (
            f"it is good for export; a training goes on from one of its own job, base model and global batch only, and"
            f" {', '.join(unsaid)} were not named: --for with the job's plan names them all"
        )
    if not any(len(tensor.states) > 1 for tensor in made.intent.tensors):
        yield "no optimizer state was found: AdamW's moments begin at zero"
