"""Trainings that end themselves with SIGKILL in a phase of their own, or hang. For `test_phase_kills`, `test_hangs`.

Each attempt is a process, or one for each rank, forked from a server that has imported what trainings need: that takes
longer than they do. What is run is the product; around one of its functions lies the hook that leaves a mark and kills.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from finetune_api.plan import RunPlan
from finetune_trainers.context import RayTrainContext, _FileSignals
from tests.trainers.dying_writer import DYING_WRITER, end, hang

__all__ = ["PLACES", "Death", "begin"]

ROOT = Path(__file__).parents[2]


class Place(NamedTuple):
    """A function of the product, and when a process that calls it dies."""

    function: str
    """module:name."""
    told: str
    """What the run says meanwhile that it does."""
    call: int = 1
    """Of the iteration."""
    has_returned: bool = True


PLACES = {
    "the policy writes": Place("finetune_trainers.rollout.in_process:_Writing.advance", "generate", call=5),
    "the reward has answered": Place("finetune_trainers.rewards.functions:_Process._receive", "score"),
    "models are asked": Place("finetune_trainers.online.models:Models.reference_stats", "judge"),
    "the policy's loss is known": Place("finetune_trainers.online.ppo:Ppo._loss_of_policy", "train", call=3),
    "the critic's loss is known": Place("finetune_trainers.online.ppo:Ppo._loss_of_critic", "train", call=3),
    "the policy is updated and the critic is not": Place("torch.optim.adam:adam", "train", call=5),
    "weights are to be taken over": Place(
        "finetune_trainers.rollout.in_process:InProcessEngine.update_weights", "sync", has_returned=False
    ),
    # waking it up and a piece of weights come before the word that there are no more
    "vLLM has some of the weights": Place(
        "finetune_trainers.rollout.vllm_process:VllmProcess.ask", "sync", call=3, has_returned=False
    ),
    "a checkpoint is staged": Place("finetune_trainers.checkpoint.flushes:Flushes.stage", "save"),
}


@dataclass(frozen=True)
class Death:
    """In the iteration of this number."""

    place: str
    """One of PLACES, or "the writer writes", which kills the trainer and itself."""
    iteration: int
    mark: Path
    """A file, written just before it."""
    rank: int = 0
    """Whose."""
    hangs: bool = False
    """It does not die, and does nothing more."""


def begin(plan: RunPlan, workdir: Path, cache: Path, attempt: int, death: Death | None = None) -> list[BaseProcess]:
    """Starts the training, and returns its processes. `workdir` has prepared.json where there are several."""
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "given.json").write_text(plan.model_dump_json(by_alias=True))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.dying_imports"])
    world_size = plan.workers.world_size
    processes: list[BaseProcess] = [
        context.Process(target=_train, args=(workdir, cache, attempt, death, rank, world_size))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def _train(workdir: Path, cache: Path, attempt: int, death: Death | None, rank: int, world_size: int) -> None:
    """One process of an attempt, to its end."""
    os.chdir(workdir)
    output = os.open(workdir / f"output-{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    paths = os.pathsep.join([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))])
    os.environ |= {"FINETUNE_ATTEMPT": str(attempt), "FINETUNE_CACHE": str(cache), "PYTHONPATH": paths}
    plan = RunPlan.model_validate_json((workdir / "given.json").read_bytes())
    if death is not None and death.rank == rank:
        _die(death, plan.method.steps_per_iteration)
    if world_size == 1:
        from finetune_trainers.__main__ import main

        sys.exit(main(["run", "--no-ray", "--plan", "given.json", "--workdir", str(workdir)]))
    from finetune_trainers import worker
    from finetune_trainers.prepared import PreparedRun

    prepared = PreparedRun.model_validate_json((workdir / "prepared.json").read_bytes())
    worker.run(plan, prepared, _Rank(workdir, rank, world_size), workdir)


class _Rank(RayTrainContext):
    """One of several processes on this machine, which meet in a file and not in Ray."""

    def __init__(self, workdir: Path, rank: int, world_size: int) -> None:
        _FileSignals.__init__(self, workdir)
        self.rank = self.local_rank = rank
        self.world_size = self.local_world_size = world_size
        self.device = torch.device("cpu")
        self._preemptions = self._room = None
        where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size}
        os.environ.update({name: str(value) for name, value in where.items()})
        dist.init_process_group("gloo", init_method=f"file://{workdir}/group", rank=rank, world_size=world_size)


def _die(death: Death, steps_per_iteration: int) -> None:
    """Let this process end itself there."""
    now = {"iteration": -1, "calls": 0}
    online, name_of_iterate, iterate = _found("finetune_trainers.online.method:Online._iterate")

    def iterate_and_tell(method: Any, number: int) -> Any:
        now.update(iteration=number, calls=0)
        return iterate(method, number)

    setattr(online, name_of_iterate, iterate_and_tell)
    if death.place == "the writer writes":
        _let_the_writer_die(death.mark, step=(death.iteration + 1) * steps_per_iteration)
        return
    place = PLACES[death.place]
    owner, name, function = _found(place.function)

    def hooked(*arguments: Any, **named: Any) -> Any:
        now["calls"] += 1
        is_time = now["iteration"] == death.iteration and now["calls"] == place.call
        returned = None if is_time and not place.has_returned else function(*arguments, **named)
        if is_time and death.hangs:
            hang(death.mark, death.place)
        elif is_time:
            end(death.mark, death.place)
        return returned

    setattr(owner, name, hooked)


def _let_the_writer_die(mark: Path, step: int) -> None:
    from finetune_trainers.checkpoint import flushes

    flushes.COMMAND = (sys.executable, "-P", "-m", "tests.trainers.dying_writer")
    os.environ[DYING_WRITER] = json.dumps([os.getpid(), step, str(mark)])


def _found(function: str) -> tuple[Any, str, Any]:
    """(where it is, its name there, itself)."""
    module, _, path = function.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for one in owners:
        owner = getattr(owner, one)
    return owner, name, getattr(owner, name)
