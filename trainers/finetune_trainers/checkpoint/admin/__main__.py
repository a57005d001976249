"""Answers one request about the checkpoints at a place. `finetune ckpt` starts it.

    python -m finetune_trainers.checkpoint.admin '{"verb": "ls", "uri": "file:///runs/a/checkpoints"}'

Each line on stdout is a `Told`: how far it has come, then the report or why there is none. The exit code is 0, that of
a failure's class (finetune_api.failures.EXIT_CODES), 20 when a checkpoint is damaged, 21 when a run seems to be at
work, 130 after a stop request. Imports neither torch nor Ray, except for formats of theirs.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_api.answers import Refusal
from finetune_api.base import Contract
from finetune_api.checkpoint_requests import (
    Request,
    Rules,
    ToCollect,
    ToCompare,
    ToExport,
    ToImport,
    ToInspect,
    ToList,
    ToPin,
    ToPlan,
    ToRepair,
    ToUnpin,
    ToVerify,
    parse_request,
)
from finetune_api.checkpoints import DAMAGED, IN_USE, Verification
from finetune_api.failures import EXIT_CODES
from finetune_trainers.answering import answered, tell_step
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.activity import InUseError
from finetune_trainers.checkpoint.admin.choosing import (
    NEWEST,
    UnknownCheckpointError,
    chosen,
    manifest_of,
    published,
    unless_deleted,
)
from finetune_trainers.checkpoint.fence import SupersededError
from finetune_trainers.checkpoint.find import read_manifest
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.manifest import Abandoned
from finetune_trainers.checkpoint.reading import DamagedError
from finetune_trainers.checkpoint.retention import Retention
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.storage.resilient import Patience
from finetune_trainers.errors import UserError, classified

__all__ = ["main"]

_BUCKET = {
    "retry_config": {
        "max_retries": 3,
        "retry_timeout": timedelta(seconds=30),
        "backoff": {
            "init_backoff": timedelta(milliseconds=200),
            "max_backoff": timedelta(seconds=5),
            "base": 2,
        },
    }
}
_PATIENCE = Patience(num_tries=2, longest_pause_seconds=1.0)
"""A person waits for the answer; a run has more patience."""
_SECRET = re.compile(r"SECRET|TOKEN|PASSWORD|CREDENTIAL", re.IGNORECASE)


def main(arguments: Sequence[str]) -> int:
    """Answer the request in `arguments` on stdout -> the exit code."""
    report = answered(arguments, parse_request, _answer, _refusal)
    if isinstance(report, int):
        return report
    return DAMAGED if isinstance(report, Verification) and not report.whole else 0


def _answer(request: Request) -> Contract:
    return _VERBS[type(request)](request)


def _list(asked: ToList) -> Contract:
    from finetune_trainers.checkpoint.admin.looking import listing_of

    return listing_of(_open(asked.uri), _retention(asked.keep), _now())


def _inspect(asked: ToInspect) -> Contract:
    from finetune_trainers.checkpoint.admin.looking import details

    storage = _open(asked.uri)
    return details(storage, chosen(storage, asked.id), asked.tensors)


def _verify(asked: ToVerify) -> Contract:
    from finetune_trainers.checkpoint.admin.verifying import verification

    storage = _open(asked.uri)
    return verification(storage, _to_verify(storage, asked), asked.deep, tell_step())


def _to_verify(storage: Storage, asked: ToVerify) -> list[CheckpointId]:
    """What was given up never was a checkpoint."""
    if asked.id not in (None, NEWEST):
        checkpoint = chosen(storage, asked.id or NEWEST)
        if checkpoint not in published(storage):
            manifest_of(storage, checkpoint)  # says why it is none
        return [checkpoint]
    known = [one for one in published(storage) if not isinstance(read_manifest(storage, one), Abandoned)]
    if not known:
        raise UnknownCheckpointError(f"there is no checkpoint at {storage.uri}")
    return known if asked.all else known[:1]


def _compare(asked: ToCompare) -> Contract:
    from finetune_trainers.checkpoint.admin.comparing import Side, comparison

    storage = _open(asked.uri)
    other = storage if asked.uri_of_b is None else _open(asked.uri_of_b)
    a = Side(storage, manifest_of(storage, chosen(storage, asked.a)))
    b = Side(other, manifest_of(other, chosen(other, asked.b)))
    with unless_deleted(storage, a.manifest.id), unless_deleted(other, b.manifest.id):
        return comparison(a, b, asked.states, tell_step())


def _plan(asked: ToPlan) -> Contract:
    from finetune_trainers.checkpoint.admin.costs import costs_of

    storage = _open(asked.uri)
    manifest = manifest_of(storage, chosen(storage, asked.id))
    return costs_of(storage, manifest, asked.world, asked.zero_stage, asked.memory)


def _export(asked: ToExport) -> Contract:
    from finetune_trainers.checkpoint.admin.exporting import exported

    storage = _open(asked.uri)
    manifest = manifest_of(storage, chosen(storage, asked.id))
    with unless_deleted(storage, manifest.id):
        return exported(storage, manifest, asked)


def _import(asked: ToImport) -> Contract:
    from finetune_trainers.checkpoint.admin.importing import imported
    from finetune_trainers.checkpoint.admin.upkeep import Mandate

    try:
        storage = _open(asked.uri, writes=True)
    except UnknownCheckpointError:
        storage = _storage(asked.uri, writes=True)  # the first one there
    return imported(storage, asked, Mandate(asked.by, _now(), dry_run=False, take_over=asked.take_over))


def _collect(asked: ToCollect) -> Contract:
    from finetune_trainers.checkpoint.admin.upkeep import Mandate, collected

    mandate = Mandate(asked.by, _now(), asked.dry_run, asked.take_over)
    return collected(_open(asked.uri, writes=not asked.dry_run), _retention(asked.keep), mandate)


def _repair(asked: ToRepair) -> Contract:
    from finetune_trainers.checkpoint.admin.mending import repaired
    from finetune_trainers.checkpoint.admin.upkeep import Mandate

    mandate = Mandate(asked.by, _now(), asked.dry_run, asked.take_over)
    return repaired(_open(asked.uri, writes=not asked.dry_run), mandate)


def _pin(asked: ToPin) -> Contract:
    from finetune_trainers.checkpoint.admin.pinning import pinned

    storage = _open(asked.uri, writes=True)
    return pinned(storage, chosen(storage, asked.id), asked.by, asked.reason, _now())


def _unpin(asked: ToUnpin) -> Contract:
    from finetune_trainers.checkpoint.admin.pinning import to_unpin, unpinned

    storage = _open(asked.uri, writes=True)
    return unpinned(storage, to_unpin(storage, asked.id))


_VERBS: dict[type[Contract], Callable[[Any], Contract]] = {
    ToList: _list,
    ToInspect: _inspect,
    ToVerify: _verify,
    ToCompare: _compare,
    ToPlan: _plan,
    ToExport: _export,
    ToImport: _import,
    ToCollect: _collect,
    ToRepair: _repair,
    ToPin: _pin,
    ToUnpin: _unpin,
}


def _open(uri: str, writes: bool = False) -> Storage:
    """The place with checkpoints that a URI names: itself, or a folder `checkpoints` in it. UnknownCheckpointError when
    neither has any."""
    roots = (uri, f"{uri.rstrip('/')}/checkpoints")
    for root in roots:
        storage = _storage(root, writes=False)
        if any(next(iter(storage.list(prefix)), None) for prefix in (layout.FENCES, layout.CHECKPOINTS)):
            return _storage(root, writes=True) if writes else storage
    raise UnknownCheckpointError(f"there are no checkpoints at {uri}, nor at {roots[1]}")


def _storage(uri: str, writes: bool) -> Storage:
    options = _BUCKET if uri.startswith(("s3://", "gs://")) else None
    try:
        root = os.environ.get("FINETUNE_PVC_ROOT", "/mnt/pvc")
        return open_storage(uri, root, options, exclusive=None if writes else True, patience=_PATIENCE)
    except ValueError as error:
        raise UserError(f"{uri} {error}") from None


def _retention(rules: Rules) -> Retention:
    return Retention.model_validate(rules.model_dump(by_alias=True))


def _now() -> datetime:
    return datetime.now(UTC)


def _refusal(error: Exception) -> Refusal:
    failure = classified(error)
    if isinstance(error, DamagedError):
        code = DAMAGED
    elif isinstance(error, InUseError | SupersededError):
        code = IN_USE
    else:
        code = EXIT_CODES[failure.failure_class]
    known = error.known if isinstance(error, UnknownCheckpointError) else []
    return Refusal(message=_without_secrets(failure.message), known=known, exit_code=code)


def _without_secrets(text: str) -> str:
    """Libraries quote what they were given; keys have no place in a message."""
    for name, value in os.environ.items():
        if _SECRET.search(name) and len(value) >= 8:
            text = text.replace(value, "...")
    return re.sub(r"://[^/@\s]+@", "://...@", text)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    sys.exit(main(sys.argv[1:]))
