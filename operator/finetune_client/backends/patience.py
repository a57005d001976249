"""How long those who follow something go on asking when there is no answer. Used by the backends that read logs."""

from __future__ import annotations

import asyncio

from finetune_client.errors import ClientError, Refused, Unreachable

__all__ = ["Patience"]

_PATIENCE_SECONDS = 60.0


class Patience:
    """How long what does not answer, or cannot be read, is asked again."""

    def __init__(self) -> None:
        self._since: float | None = None

    def renew(self) -> None:
        """There was an answer."""
        self._since = None

    def spend(self, error: ClientError) -> None:
        """There was none. Raises the error when that has gone on for a minute, or where waiting does not help."""
        now = asyncio.get_running_loop().time()
        self._since = now if self._since is None else self._since
        if not isinstance(error, Unreachable | Refused) or now >= self._since + _PATIENCE_SECONDS:
            raise error
