"""Jobs on a Ray cluster by Ray Client: an actor of nobody's runs the driver there, so a client may come and go.

`DriversBackend` over it is a `Backend`. The cluster imports the actor from here: both sides need the same Ray, the same
Python and the same finetune-operator. Ray Train cannot be driven through Ray Client, and what a client starts ends with
it; a detached actor does neither harm. It keeps what it knows until the job is cancelled. Only this module of the
client imports Ray, and it is imported only when a ray:// address is given.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import urlsplit

import ray

from finetune_client.backends.told import absent, new_folder
from finetune_client.driven import Driven, Told
from finetune_client.errors import Refused, Unreachable
from finetune_client.submission import SUBMISSION_VARIABLE
from finetune_operator.kinds import Key

__all__ = ["DriverActor", "RayClientDrivers"]

T = TypeVar("T")

_ACTORS = "finetune-operator"
"""The namespace, in Ray's sense, of our actors."""
_CONNECT_SECONDS = 10.0
_TRIES = 5


class DriverActor:
    """On the cluster: one job's driver, and what there is to be asked about it."""

    def __init__(self, folder: str, packed: str) -> None:
        """`packed` is the submission; `folder` may begin with ~, which is the home of whoever runs Ray."""
        self._driven = Driven(Path(folder).expanduser())
        self._address = {"RAY_ADDRESS": str(ray.get_runtime_context().gcs_address)}
        self._driven.start({SUBMISSION_VARIABLE: packed, **self._address})

    def told(self) -> Told:
        """How the job stands."""
        return self._driven.told()

    def output(self, start: int) -> bytes:
        """What the driver has printed from byte `start` on."""
        return self._driven.output(start)

    def suspend(self) -> None:
        """Ask the driver to suspend the job."""
        self._driven.suspend()

    def resume(self) -> None:
        """Go on with a job whose driver has ended."""
        if not self._driven.works:
            self._driven.start(self._address)

    def stop(self) -> None:
        """End the driver and what it has started."""
        self._driven.stop()


class RayClientDrivers:
    """Implements `Drivers`. One thread speaks to the cluster: a connection belongs to the thread that made it."""

    def __init__(self, address: str, workdir: str | None) -> None:
        """Made by `open`."""
        self._address = address
        self._workdir = (workdir or "~/.finetune/jobs").rstrip("/")
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray client")
        self._context: Any = None

    @classmethod
    async def open(cls, address: str, workdir: str | None) -> Self:
        """Connects. Raises Unreachable."""
        drivers = cls(address, workdir)
        try:
            await asyncio.get_running_loop().run_in_executor(drivers._thread, drivers._connect)
        except BaseException:
            drivers._thread.shutdown(wait=False)
            raise
        return drivers

    @property
    def place(self) -> str:
        """See Drivers."""
        return f"--ray {shlex.quote(self._address)}"

    async def keys(self) -> Sequence[Key]:
        """See Drivers."""
        named = await self._done(lambda: ray.util.list_named_actors(all_namespaces=True))
        return [Key(*one["name"].split("/", 1)) for one in named if one["namespace"] == _ACTORS]

    async def start(self, key: Key, packed: str) -> None:
        """See Drivers."""

        def create() -> None:
            actor = ray.remote(DriverActor).options(
                name=_actor(key), namespace=_ACTORS, lifetime="detached", num_cpus=0, max_restarts=0
            )
            try:
                handle: Any = actor.remote(new_folder(self._workdir, key), packed)
                ray.get(handle.told.remote())  # a cluster that lacks our package says so here
            except ray.exceptions.ActorAlreadyExistsError as error:
                raise FileExistsError(key.name) from error

        await self._done(create)

    async def told(self, key: Key) -> Told:
        """See Drivers."""
        found: Told = await self._ask(key, "told")
        return found

    async def output(self, key: Key, start: int) -> bytes:
        """See Drivers."""
        found: bytes = await self._ask(key, "output", start)
        return found

    async def suspend(self, key: Key) -> None:
        """See Drivers."""
        await self._ask(key, "suspend")

    async def resume(self, key: Key) -> None:
        """See Drivers."""
        await self._ask(key, "resume")

    async def remove(self, key: Key) -> None:
        """See Drivers."""
        await self._ask(key, "stop")
        await self._done(lambda: ray.kill(ray.get_actor(_actor(key), namespace=_ACTORS)))

    async def close(self) -> None:
        """See Drivers. The actors stay."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._context.disconnect)
        self._thread.shutdown()

    async def _ask(self, key: Key, method: str, *arguments: Any) -> Any:
        """What the job's actor answers."""

        def ask() -> Any:
            try:
                actor = ray.get_actor(_actor(key), namespace=_ACTORS)
            except ValueError as error:
                raise absent(key, self._address, self.place) from error
            return ray.get(getattr(actor, method).remote(*arguments))

        return await self._done(ask)

    async def _done(self, work: Callable[[], T]) -> T:
        """Work on the thread that is connected. Raises Unreachable, or Refused with what Ray says."""

        def within() -> T:
            with self._context:
                return work()

        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, within)
        except ConnectionError as error:
            raise Unreachable(f"{self._address} does not answer any more: {error}") from error
        except ray.exceptions.RayError as error:
            last = str(error).strip().splitlines()[-1]
            raise Refused(
                f"the Ray cluster at {self._address} could not do it: {last}. Its image must have the same Python, Ray "
                "and finetune-operator as this machine"
            ) from error

    def _connect(self) -> None:
        url = urlsplit(self._address)
        try:
            socket.create_connection((url.hostname or "", url.port or 10001), _CONNECT_SECONDS).close()
            if _has_token():
                os.environ.setdefault("RAY_AUTH_MODE", "token")  # Ray Client does not find out by itself
            self._context = self._connected()
        except (OSError, ValueError, RuntimeError, AssertionError) as error:
            raise Unreachable(
                f"{self._address} does not answer: {str(error).strip()}. It must be a Ray Client server, such as "
                "ray://HEAD:10001, of the same Ray and Python as here; one that asks for a token wants "
                "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            ) from error

    def _connected(self) -> Any:
        """A connection. Ray starts a server for each by a fork of a process that speaks gRPC on other threads: about
        one in ten dies of that before it is up ("epoll_wait error: Bad file descriptor" in its log, Ray 2.60)."""
        connect = partial(ray.init, self._address, namespace=_ACTORS, allow_multiple=True)
        for _ in range(_TRIES - 1):
            with suppress(ConnectionAbortedError):
                return connect()
        return connect()


def _actor(key: Key) -> str:
    return f"{key.namespace}/{key.name}"


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or file.is_file()
