"""Jobs on this machine, in the background: `finetune run` for those who do not want to wait for it.

`DriversBackend` over it is a `Backend`. A driver is nobody's child: it goes on when the terminal closes, and what it
tells is on disk.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from finetune_client.backends.told import absent, new_folder
from finetune_client.driven import Driven, Told
from finetune_client.errors import Refused
from finetune_client.folders import SUBMITTED_NAME
from finetune_client.runner import missing_packages
from finetune_client.submission import SUBMISSION_VARIABLE
from finetune_operator.kinds import Key

__all__ = ["LocalDrivers", "names_of"]

_ROOT = "~/.finetune/jobs"


class LocalDrivers:
    """Implements `Drivers`. A job is there while its newest run has a .pid file, whether its process lives or not."""

    def __init__(self, workdir: str | None) -> None:
        """`workdir` is the folder of all runs."""
        self._root = Path(workdir or _ROOT).expanduser()

    @property
    def place(self) -> str:
        """See Drivers. A folder of one's own is for Python; the command knows the usual one."""
        return "--local"

    async def keys(self) -> Sequence[Key]:
        """See Drivers."""
        return _keys(self._root)

    async def start(self, key: Key, packed: str) -> None:
        """See Drivers."""
        if missing := missing_packages():
            raise Refused(
                f"training needs packages that are not installed ({', '.join(missing)}); "
                "install the trainers extra: pip install 'finetune-operator[trainers]'"
            )
        await asyncio.to_thread(self._start, key, packed)

    async def told(self, key: Key) -> Told:
        """See Drivers."""
        return self._driven(key).told()

    async def output(self, key: Key, start: int) -> bytes:
        """See Drivers."""
        return self._driven(key).output(start)

    async def suspend(self, key: Key) -> None:
        """See Drivers."""
        self._driven(key).suspend()

    async def resume(self, key: Key) -> None:
        """See Drivers."""
        await asyncio.to_thread(self._resume, key)

    async def remove(self, key: Key) -> None:
        """See Drivers."""
        await asyncio.to_thread(self._remove, key)

    async def close(self) -> None:
        """See Drivers."""

    def _start(self, key: Key, packed: str) -> None:
        with self._alone(key):
            if self._runs(key):
                raise FileExistsError(key.name)
            Driven(Path(new_folder(str(self._root), key))).start({SUBMISSION_VARIABLE: packed})

    def _resume(self, key: Key) -> None:
        with self._alone(key):
            driven = self._driven(key)
            if not driven.works:
                driven.start({})

    def _remove(self, key: Key) -> None:
        with self._alone(key):
            driven = self._driven(key)
            driven.stop()
            driven.forget()

    def _driven(self, key: Key) -> Driven:
        runs = self._runs(key)
        if not runs:
            raise absent(key, str(self._root), self.place)
        return Driven(max(runs).with_suffix(""))

    def _runs(self, key: Key) -> list[Path]:
        """Their .pid files."""
        return [file for file in self._folder(key).glob("*.pid") if SUBMITTED_NAME.fullmatch(file.stem)]

    def _folder(self, key: Key) -> Path:
        return self._root / key.namespace / key.name

    @contextmanager
    def _alone(self, key: Key) -> Iterator[None]:
        """Nobody else starts or ends a driver of this name meanwhile. Whoever dies lets go."""
        folder = self._folder(key)
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX)
            yield
        finally:
            os.close(held)


def names_of(namespace: str | None) -> list[str]:
    """Of the jobs that are in the usual folder."""
    return [key.name for key in _keys(Path(_ROOT).expanduser()) if key.namespace == (namespace or "default")]


def _keys(root: Path) -> list[Key]:
    return sorted({Key(file.parent.parent.name, file.parent.name) for file in root.glob("*/*/*.pid")})
