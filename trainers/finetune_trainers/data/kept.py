"""Arrays that are dear to make, in files beside what the cache holds of their rows: whole, or not there.

Called by methods that ask a model about the data before the first step. A file's name says what it follows from.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import ValidationError

from finetune_trainers.data.cache import FileRecord

__all__ = ["keep", "read_kept"]


def read_kept(file: Path) -> NDArray[Any] | None:
    """What an earlier attempt left in `file` (.npy), if it is whole."""
    try:
        record = FileRecord.model_validate_json(file.with_suffix(".json").read_bytes())
        data = file.read_bytes()
        if len(data) != record.bytes or blake3(data).hexdigest() != record.digest:
            return None
        found: NDArray[Any] = np.load(BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, ValidationError):
        return None
    return found


def keep(file: Path, array: NDArray[Any]) -> None:
    """Leave `array` in `file`. A cache that cannot be written to costs the next attempt some time, and this one
    nothing."""
    stream = BytesIO()
    np.save(stream, array, allow_pickle=False)
    data = stream.getvalue()
    record = FileRecord(bytes=len(data), digest=blake3(data).hexdigest())
    with suppress(OSError):
        _replace(file, data)
        _replace(file.with_suffix(".json"), record.model_dump_json().encode())


def _replace(file: Path, data: bytes) -> None:
    handle, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
    Path(name).chmod(0o644)
    Path(name).replace(file)
