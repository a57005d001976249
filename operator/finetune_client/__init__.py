"""Submitting fine-tuning jobs and following them: `Client`, `AsyncClient`, and the `finetune` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from finetune_client.client import AsyncClient, AsyncJob, Client, Job
    from finetune_client.history import Moment
    from finetune_client.views import JobEvent, JobView, LogLine

__all__ = ["AsyncClient", "AsyncJob", "Client", "Job", "JobEvent", "JobView", "LogLine", "Moment"]

_HOMES = {
    **dict.fromkeys(("AsyncClient", "AsyncJob", "Client", "Job"), "finetune_client.client"),
    "Moment": "finetune_client.history",
    **dict.fromkeys(("JobEvent", "JobView", "LogLine"), "finetune_client.views"),
}


def __getattr__(name: str) -> Any:
    """Public names are imported when they are used: the `finetune` command, which is here too, needs few of them."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
