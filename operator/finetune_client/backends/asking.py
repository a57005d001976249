"""What is common to places that do not tell of changes and are asked: handing a job over, and watching one.

Used by the backends for Ray and for this machine.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

from finetune_api.job import FineTuneJob
from finetune_api.runtime import FineTuneRuntime
from finetune_client.checks import check_plan
from finetune_client.submission import Submitted
from finetune_client.views import JobView

__all__ = ["LOOK_SECONDS", "changes", "planned"]

LOOK_SECONDS = 1.0
"""Between two looks."""


def planned(job: FineTuneJob, runtimes: Sequence[FineTuneRuntime], namespace: str, is_here: bool = False) -> Submitted:
    """What is handed over. Planned here first, so that a mistake is told at once: raises InvalidManifest."""
    check_plan(job, runtimes, is_here)
    return Submitted.of(job, namespace, list(runtimes))


async def changes(look: Callable[[], Awaitable[JobView]]) -> AsyncGenerator[JobView]:
    """What `look` sees now, and whenever it sees something else."""
    last: JobView | None = None
    while True:
        view = await look()
        if view != last:
            last = view
            yield view
        await asyncio.sleep(LOOK_SECONDS)
