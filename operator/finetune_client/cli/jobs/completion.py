"""Names of jobs for a shell that completes them. Imported when one asks."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from finetune_client.client import AsyncClient

__all__ = ["names_in_cluster"]

_SECONDS = 2.0


def names_in_cluster(namespace: str | None, context: str | None, kubeconfig: Path | None) -> list[str]:
    """Of the jobs of a Kubernetes cluster, if it answers soon; else none, without a word: somebody is typing."""
    logging.disable()
    try:
        return asyncio.run(_names(namespace, context, kubeconfig))
    except Exception:  # whatever it is, the command itself will say it
        return []
    finally:
        logging.disable(logging.NOTSET)


async def _names(namespace: str | None, context: str | None, kubeconfig: Path | None) -> list[str]:
    async with (
        AsyncClient(namespace=namespace, context=context, kubeconfig=kubeconfig) as client,
        asyncio.timeout(_SECONDS),
    ):
        return [view.name for view in await client.list()]
