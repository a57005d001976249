"""Ranks that share one vLLM, which computes on the devices of all of them. Built by `vllm_engine`.

They are neighbours by rank and on one machine. The first of them, who leads, has vLLM and speaks for the others, over a
gloo group of their own: what is said is small, and the trainers' devices have other things to do.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from finetune_api.failures import Problem
from finetune_trainers.context import WorkerContext
from finetune_trainers.errors import TrainerError, UserError
from finetune_trainers.rollout import AheadEngine, Completion, OnProgress, Request, Sampling

__all__ = ["Team", "TeamEngine", "device_name", "release_device"]

T = TypeVar("T")

LONGEST_WAIT = timedelta(days=1)
"""For the one who leads, who gives up sooner on a vLLM that says nothing; one that writes may write for long."""


class Team:
    """This rank's. All methods are collective in the team, and the making of it among all ranks."""

    def __init__(self, context: WorkerContext, size: int, path: str) -> None:
        """`size` divides the number of ranks. Raises UserError about `path` on every rank when a team would span
        machines."""
        self._size = size
        self._first = context.rank - context.rank % size
        self.place = context.rank - self._first
        """Among the team's ranks; 0 leads."""
        firsts = range(0, context.world_size, size)
        seats = context.all_gather_object((socket.gethostname(), device_name(context.device)))
        for first in firsts:
            if len({machine for machine, _ in seats[first : first + size]}) > 1:
                message = f"{size}: processes {first} to {first + size - 1} are not on one machine; remove it"
                problem = Problem(path=path, message=message)
                raise UserError(str(problem), [problem])
        self.devices = [device for _, device in seats[self._first : self._first + size]]
        """Of its ranks, as `device_name` has them."""
        groups = [
            dist.new_group(list(range(first, first + size)), timeout=LONGEST_WAIT, backend="gloo") for first in firsts
        ]
        self._group = groups[self._first // size]

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` for the one who leads; nothing for the others."""
        boxes: list[Any] | None = None if self.place else [None] * self._size
        dist.gather_object(value, boxes, dst=self._first, group=self._group)
        return boxes or []

    def lead(self, action: Callable[[], T]) -> T:
        """What `action` gives to the one who leads, and calls it, on every rank; an error of it too."""
        box: list[Any] = [None]
        if not self.place:
            try:
                box = [action()]
            except TrainerError as error:
                box = [error]
        dist.broadcast_object_list(box, src=self._first, group=self._group)
        if isinstance(box[0], TrainerError):
            raise box[0]
        found: T = box[0]
        return found


class TeamEngine:
    """What one rank of a team sees of the vLLM that it shares."""

    is_policy = False

    def __init__(self, team: Team, make: Callable[[], AheadEngine], follow: Callable[[], None]) -> None:
        """`make` starts vLLM, where the team is led; elsewhere `follow` takes part in the gathering of weights. Raises
        TrainerError, on every rank of the team."""
        self._team, self._follow = team, follow
        self._engine: AheadEngine | None = None
        self._counts: list[int] = []
        """How many answers each rank waits for, where the team is led."""
        team.lead(lambda: self._start(make))

    @property
    def _own(self) -> AheadEngine:
        assert self._engine is not None, "only who leads is asked"
        return self._engine

    def _start(self, make: Callable[[], AheadEngine]) -> None:
        self._engine = make()

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None = None
    ) -> list[Completion]:
        self.start(requests, sampling)
        return self.collect(on_progress)

    def start(self, requests: Sequence[Request], sampling: Sampling) -> None:
        asked = self._team.gather(list(requests))
        self._counts = [len(of_rank) for of_rank in asked]
        if self._engine is not None:
            self._engine.start([request for of_rank in asked for request in of_rank], sampling)

    def collect(self, on_progress: OnProgress | None = None) -> list[Completion]:
        of_ranks = self._team.lead(lambda: self._collected(on_progress))
        return of_ranks[self._team.place]

    def _collected(self, on_progress: OnProgress | None) -> list[list[Completion]]:
        """The answers of each rank."""
        own = self._counts[0]

        def tell(num_done: int, num: int) -> None:
            if on_progress is not None:
                on_progress(num_done * own // num, own)

        answers = iter(self._own.collect(tell))
        return [list(islice(answers, count)) for count in self._counts]

    def update_weights(self) -> None:
        if self._engine is None:
            self._follow()
        else:
            self._engine.update_weights()

    def sleep(self) -> None:
        self._team.lead(lambda: self._own.sleep())  # nobody goes on while the GPU is taken

    def wake(self) -> None:
        release_device()
        self._team.gather(None)  # and all the others have
        self._team.lead(lambda: self._own.wake())

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


def release_device() -> None:
    """Give back what torch keeps of the GPU for itself, of what was freed: vLLM wants its memory again."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def device_name(device: torch.device) -> str:
    """As CUDA_VISIBLE_DEVICES takes it: torch numbers the devices that it sees alone. Nothing of a CPU."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.type == "cuda" else ""
