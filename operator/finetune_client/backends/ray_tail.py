"""What a Ray job prints, as it comes: the WebSocket of Ray's Jobs API.

Used by the backend for Ray jobs. It begins with the first line each time and ends when the job does, or is cut; which
of both it was is not told.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping

import aiohttp

from finetune_client.errors import Unreachable

__all__ = ["tail"]

_HANDSHAKE_SECONDS = 30.0
_HEARTBEAT_SECONDS = 30.0
_FAREWELL_SECONDS = 2.0


async def tail(url: str, headers: Mapping[str, str]) -> AsyncGenerator[str]:
    """Pieces of the output, which end anywhere. Raises Unreachable where nobody answers."""
    timeout = aiohttp.ClientWSTimeout(ws_close=_FAREWELL_SECONDS)
    try:
        async with aiohttp.ClientSession(trust_env=True) as session:
            async with asyncio.timeout(_HANDSHAKE_SECONDS):
                socket = await session.ws_connect(
                    url, headers=headers, heartbeat=_HEARTBEAT_SECONDS, max_msg_size=0, timeout=timeout
                )
            async with socket:
                async for message in socket:
                    if message.type is aiohttp.WSMsgType.TEXT:
                        yield message.data
    except (aiohttp.ClientError, OSError) as error:
        raise Unreachable(f"{url} does not answer: {str(error) or 'not in time'}") from error
