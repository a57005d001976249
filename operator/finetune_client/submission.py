"""A job on its way to a machine that shares no disk with this one: as text that fits into an environment variable.

Written by the backends for Ray, read by `driver` on the other side.
"""

from __future__ import annotations

import base64
import json
import zlib
from dataclasses import dataclass, field
from typing import Any, Self

from finetune_api.failures import Problem
from finetune_api.job import FineTuneJob
from finetune_api.problems import InvalidManifest
from finetune_api.runtime import FineTuneRuntime
from finetune_client.documents import document_of
from finetune_operator.kinds import Key

__all__ = ["SUBMISSION_VARIABLE", "Submitted"]

SUBMISSION_VARIABLE = "FINETUNE_SUBMISSION"
_LONGEST = 120_000
"""Linux takes 128 KiB for one variable."""


@dataclass(frozen=True)
class Submitted:
    """One job and the runtimes that came with it."""

    job: dict[str, Any]
    runtimes: list[dict[str, Any]] = field(default_factory=list)
    use_ray: bool = True

    @classmethod
    def of(cls, job: FineTuneJob, namespace: str, runtimes: list[FineTuneRuntime], use_ray: bool = True) -> Self:
        """The job as its author wrote it, in the namespace that it will be in."""
        document = document_of(job)
        document["metadata"].setdefault("namespace", namespace)
        return cls(document, [runtime.to_document() for runtime in runtimes], use_ray)

    @property
    def key(self) -> Key:
        """Which job it is."""
        return Key(self.job["metadata"]["namespace"], self.job["metadata"]["name"])

    def packed(self) -> str:
        """As text. Raises InvalidManifest for a job that is too large to travel so."""
        text = json.dumps(vars(self), separators=(",", ":")).encode()
        packed = base64.b64encode(zlib.compress(text, 9)).decode()
        if len(packed) > _LONGEST:
            message = f"is too large to be handed over: {len(packed)} bytes, packed, of at most {_LONGEST}"
            raise InvalidManifest([Problem(path="spec", message=message)])
        return packed

    @classmethod
    def unpacked(cls, text: str) -> Self:
        """The same on the other side. Raises ValueError for text that is not ours."""
        try:
            return cls(**json.loads(zlib.decompress(base64.b64decode(text))))
        except (zlib.error, TypeError) as error:
            raise ValueError(f"{SUBMISSION_VARIABLE} holds no job: {error}") from error
