"""A data set, and beside it what it was made of and how. Called when all rows are known.

    prefs.jsonl               the rows
    prefs.jsonl.provenance    JSON: sources with digests, settings, counts; its name ends like no data file's, so that a
                              folder of data sets is still one

Each appears whole, by a rename; the rows come last.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finetune_api.preference_data import DataRequest, Written
from finetune_trainers.data.sources import DataFiles
from finetune_trainers.errors import DataError, UserError

__all__ = ["new_file", "write_data_set"]

_SUFFIX = ".provenance"
_BLOCK = 1 << 20


def new_file(asked: DataRequest) -> Path:
    """Where the rows go. Raises UserError where that cannot be."""
    path = Path(asked.to)
    if path.suffix != ".jsonl":
        raise UserError(f"--to: {asked.to} does not end in .jsonl, which is what is written; name such a file")
    if path.exists() and not asked.overwrite:
        raise UserError(f"--to: {asked.to} is there already; name a new file, or say --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_data_set(
    asked: DataRequest, sources: DataFiles, rows: Iterable[Mapping[str, Any]], told: Mapping[str, Any]
) -> Written:
    """Write `rows` to where `asked` wants them; `told` goes into the provenance. Raises DataError without rows."""
    path = new_file(asked)
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    if not lines:
        raise DataError("no row is left to be written; nothing was")
    content = "".join(f"{line}\n" for line in lines).encode()
    written = Written(
        path=str(path),
        rows=len(lines),
        bytes=len(content),
        digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
        provenance=f"{path}{_SUFFIX}",
    )
    document = {
        "version": 1,
        "madeBy": f"finetune data {asked.verb}, finetune-operator {version('finetune-operator')}",
        "madeAt": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": {"file": path.name, "rows": written.rows, "bytes": written.bytes, "digest": written.digest},
        "sources": [
            {"file": str(file), "bytes": file.stat().st_size, "digest": _digest(file)} for file in sources.files
        ],
        "settings": _settings(asked),
        **told,
    }
    _replace(Path(written.provenance), (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())
    _replace(path, content)
    return written


def _settings(asked: DataRequest) -> dict[str, Any]:
    """All but where it went. What stands behind a URL's ? may be a key."""
    settings = asked.model_dump(mode="json", by_alias=True, exclude={"verb", "to", "overwrite"})
    return settings | ({"url": settings["url"].partition("?")[0]} if "url" in settings else {})


def _digest(file: Path) -> str:
    found = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            found.update(block)
    return f"sha256:{found.hexdigest()}"


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
