"""Workers as a Ray Train group. Used by `launch`.

On a laptop Ray is started here, in a temporary folder, and ended again; with RAY_ADDRESS set, the cluster is used that
is there. Starting Ray takes seconds, so it begins in the background while the model and the data are looked at.

When a worker dies and the job saves checkpoints, another group takes the place of the whole one, in the same Ray, and
goes on from the newest checkpoint: model, data and cluster are there already. That is bounded, and a failure that has
a reason of its own is never tried again here: the next attempt of the job is its owner's business.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from finetune_api.plan import Device, RunPlan
from finetune_api.uris import in_bucket
from finetune_trainers import ray_warm
from finetune_trainers.context import STOP_FILE
from finetune_trainers.errors import StorageError, TrainerError, first_line
from finetune_trainers.kernel_kills import KernelKills, kernel_kills, kernel_kills_of_nodes
from finetune_trainers.lost_workers import first_cause, is_loss, is_unexplained, killed_by_kernel
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.progress import PROGRESS_FILE, last_report
from finetune_trainers.resizing import Growth, first_size, room_in_ray, tell_of_room
from finetune_trainers.worker_process import train

if TYPE_CHECKING:
    from finetune_trainers.checkpoint.storage.protocol import Storage
    from finetune_trainers.worker import WorkerResult

__all__ = ["RayWorkers"]

START_ATTEMPTS = 3
"""Ray gives its daemons 30 seconds, which is not always enough on a busy machine."""
MOST_REPLACEMENTS = 3
"""Groups that may follow one another without a newer checkpoint than the one before."""
OBJECT_STORE_BYTES = 100 << 20
"""Nothing large passes through Ray's object store."""
OWN_PODS = "FINETUNE_PROGRESS_CONFIGMAP"
"""Set by the operator in pods of a Ray cluster that is there for this attempt alone."""
COORDINATOR = "AutoscalingCoordinator"
"""An actor that Ray Train leaves behind, of that name in a namespace of that name. While it is there the head's node is
not idle, and a head that is told to end would wait for it as long as it may."""
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # how soon the end of the workers is noticed
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
SHORTCUTS_FOR = "2.60."
"""The versions of Ray whose internals `ray_lean` and `ray_warm` know. With any other, starting takes longer."""


class RayWorkers:
    """A Ray to run workers on, from the start to the end of the `with` block.

    One thread starts Ray, trains with it and lives as long as the block; only `Growth` asks Ray from another one.
    Ray's daemons ask the kernel to end with the thread that started them (PR_SET_PDEATHSIG), so that thread must stay;
    and the main thread stays free for signals.
    """

    def __init__(self, plan: RunPlan, function: Callable[[dict[str, str]], WorkerResult] = train) -> None:
        """`function` is what each worker runs; it must be importable there by its name."""
        self._plan = plan
        self._function = function
        self._address = os.environ.get("RAY_ADDRESS")
        self._shortcuts = self._address is None and version("ray").startswith(SHORTCUTS_FOR)
        self._run_id = uuid.uuid4().hex
        self._temporary: Path | None = None
        self._kills: KernelKills  # as soon as Ray has started
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ray")
        self._started: Future[None] | None = None

    def __enter__(self) -> RayWorkers:
        settings = dict(ENVIRONMENT)
        if self._address is None:
            settings["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # a laptop is not preempted
            settings |= ray_warm.SETTINGS if self._shortcuts else {}
        os.environ.update({key: os.environ.get(key, value) for key, value in settings.items()})
        self._started = self._thread.submit(self._start)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.submit(_shut_down)
        self._thread.shutdown(wait=True)
        self._discard()

    def _start(self) -> None:
        for attempt in range(START_ATTEMPTS):
            try:
                self._start_once()
                break
            except Exception as error:
                _end_node(error)
                self._discard()
                if attempt + 1 == START_ATTEMPTS:
                    raise
        if own := self._warm_environment():
            with suppress(Exception):  # it saves seconds, and nothing depends on it
                ray_warm.prestart_group(self._plan.workers.world_size, own)
        count = kernel_kills_of_nodes if self._address else lambda: {"": kernel_kills()}
        self._kills = KernelKills(count, all_are_new=OWN_PODS in os.environ)
        self._trainer_class()  # importing Ray Train is slow too, so it belongs in the background

    def _start_once(self) -> None:
        import ray

        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        if self._address is None:
            self._temporary = Path(tempfile.mkdtemp(prefix="finetune-ray-", dir="/tmp"))  # socket paths are short
            os.environ.update(ray_warm.controller_seat(self._temporary) if self._shortcuts else {})
            workers = self._plan.workers
            options |= {
                "address": "local",
                "num_cpus": workers.world_size,
                "num_gpus": workers.world_size if workers.device is Device.CUDA else 0,
                "include_dashboard": False,
                "_node_ip_address": "127.0.0.1",  # nobody outside this machine can reach a laptop's Ray
                "object_store_memory": OBJECT_STORE_BYTES,
                "_temp_dir": str(self._temporary),
            }
        ray.init(**options)

    def _warm_environment(self) -> dict[str, str]:
        """What workers that are started ahead of time have in their environment; nothing where none are.

        On GPUs none are: a process must not look for them before Ray has given it its own.
        """
        if not self._shortcuts or self._plan.workers.device is Device.CUDA:
            return {}
        modules = ray_warm.warm_modules(self._plan.deepspeed.engine == "deepspeed", self._plan.tuning.lora is not None)
        return {"DS_ACCELERATOR": "cpu", ray_warm.WARM_UP: modules}

    def _trainer_class(self) -> Any:
        if self._shortcuts:
            from finetune_trainers.ray_lean import LeanTorchTrainer

            return LeanTorchTrainer
        from ray.train.torch import TorchTrainer

        return TorchTrainer

    def _discard(self) -> None:
        """Remove what a Ray of our own has left: its folder, and daemons of one that did not get up."""
        if self._temporary is None:
            return
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if any(str(self._temporary) in argument for argument in process.cmdline()):
                    process.kill()
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary = None

    def run(
        self,
        prepared: PreparedRun,
        workdir: Path,
        wait: Callable[[Future[WorkerResult]], WorkerResult],
        tell: Callable[[str], None] = lambda sentence: None,
    ) -> WorkerResult:
        """Train. `wait` is given the future of the result and returns the result, so that the caller decides how its
        own thread waits; `tell` is given sentences for people, from another thread. Raises TrainerError."""
        assert self._started is not None, "run belongs inside the with block"
        try:
            self._started.result()
        except Exception as error:
            raise TrainerError(f"Ray did not start: {first_line(error)}") from error
        try:
            return wait(self._thread.submit(self._fit, prepared, workdir, tell))
        except Exception as error:
            raise first_cause(error) from error

    def _fit(self, prepared: PreparedRun, workdir: Path, tell: Callable[[str], None]) -> WorkerResult:
        """One group after the other, until one trains to its end or fails for a reason."""
        number, left, saved = 0, MOST_REPLACEMENTS, -1
        before = _last_attempt(self._plan)
        wanted = self._plan.workers.replicas
        while True:
            size = self._size(wanted, tell, (workdir / STOP_FILE).exists)
            name = f"{self._plan.name}-{number}"
            number, wanted = number + 1, self._plan.workers.replicas
            try:
                with self._growth(size, name) as growth:
                    result = self._fit_group(self._plan.on(size), prepared, workdir, name)
                if not result.training.gives_way:
                    return result
                assert growth.wanted is not None, "nobody else tells a group of room"
                wanted = growth.wanted
                tell(f"All is saved, and there is room for {wanted} workers instead of {size}.")
            except Exception as error:
                if is_unexplained(error) and self._kills.any_new():
                    raise killed_by_kernel(error) from error
                if (now := _saved_step(self._plan, workdir, before)) > saved:
                    left, saved = MOST_REPLACEMENTS, now
                if not left or not self._resumes or not is_loss(error):
                    raise
                left -= 1
                tell(f"{first_cause(error).message} Other workers start, and go on from the newest checkpoint.")

    def _size(self, wanted: int, tell: Callable[[str], None], stops: Callable[[], bool]) -> int:
        """With how many workers the next group starts. One that must be whole is left to Ray Train, which waits.

        Raises KeyboardInterrupt when it is asked to stop meanwhile: no step is being made whose end it could wait for.
        """
        elastic = self._plan.workers.elastic
        if elastic is None:
            return wanted
        sizes, patience = self._plan.workers.sizes, elastic.resize_after_seconds
        size = first_size(sizes, wanted, patience, partial(self._room_for, stops=stops), stops)
        if size is None:
            raise KeyboardInterrupt
        if size < wanted:
            waited = f"{patience:g} s (spec.cluster.workers.resizeAfterSeconds)"
            all_of_them = self._plan.workers.replicas
            tell(f"Training goes on with {size} of {all_of_them} workers: there is no room for more after {waited}.")
        return size

    def _growth(self, size: int, group: str) -> Growth:
        """What looks for room for a larger group than this."""
        return Growth(
            self._plan.workers.sizes, size, self._room_for, lambda there_is: tell_of_room(self._id(group), there_is)
        )

    def _room_for(self, num_workers: int, seconds: float, stops: Callable[[], bool] = lambda: False) -> bool:
        return room_in_ray(self._resources, num_workers * self._plan.workers.processes_per_worker, seconds, stops)

    def _id(self, group: str) -> str:
        """Of a group of this run, among all that Ray has ever seen."""
        return f"{self._run_id}/{group}"

    @property
    def _resumes(self) -> bool:
        return self._plan.checkpoint is not None and self._plan.checkpoint.resume

    @property
    def _resources(self) -> dict[str, float]:
        """Of one process, as Ray counts them."""
        workers = self._plan.workers
        cpus = 1.0 if self._address is None else workers.cpus_per_process or 1.0
        return {"CPU": cpus} | ({"GPU": 1.0} if workers.device is Device.CUDA else {})

    def _fit_group(self, plan: RunPlan, prepared: PreparedRun, workdir: Path, name: str) -> WorkerResult:
        """`plan` is of the group's size. `name` is new each time: Ray Train would take up what it has noted under an
        old one."""
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig

        workers = plan.workers
        on_gpu = workers.device is Device.CUDA
        # Ray Train would begin again with as many workers, and wait for them without an end.
        retries: Any = {"max_failures": 0, "max_preemption_failures": 0}
        if workers.elastic is not None:
            retries["controller_failure_limit"] = 0
        storage = workdir / "ray"
        trainer = self._trainer_class()(
            self._function,  # what it returns is the result's return_value
            train_loop_config={
                "plan": plan.model_dump_json(by_alias=True),
                "prepared": prepared.model_dump_json(by_alias=True),
                "workdir": str(workdir),
                **({"group": self._id(name)} if workers.elastic is not None else {}),
            },
            torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=workers.world_size, use_gpu=on_gpu, resources_per_worker=self._resources
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(storage),
                failure_config=FailureConfig(**retries),
                worker_runtime_env={"env_vars": self._warm_environment()},  # type: ignore[call-arg]
            ),
        )
        result: Any = trainer.fit()
        shutil.rmtree(storage, ignore_errors=True)  # Ray Train's own notes: it restarts nothing here
        worker_result: WorkerResult = result.return_value  # rank 0's
        return worker_result


def _end_node(error: BaseException) -> None:
    """Have Ray end the daemons of a node that did not get up, and wait for them. Ray forgets it, and its constructor's
    frame is the only one to know it; where there is none, `_discard` finds the daemons by their arguments."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        end = getattr(frame.f_locals.get("self"), "kill_all_processes", None)
        if end is not None:
            with suppress(Exception):
                end(check_alive=False, wait=True)


def _shut_down() -> None:
    ray = sys.modules.get("ray")
    if ray is None:
        return
    if OWN_PODS in os.environ:
        with suppress(Exception):  # it saves a minute, and nothing depends on it
            ray.kill(ray.get_actor(COORDINATOR, namespace=COORDINATOR))
    ray.shutdown()


def _last_attempt(plan: RunPlan) -> int:
    """The last attempt that has begun at the bucket with the checkpoints; 0 for none. What others saved there may be
    another training's."""
    from finetune_trainers.checkpoint.fence import current_epoch

    with suppress(StorageError):
        if (storage := _bucket_of(plan)) is not None:
            return current_epoch(storage)
    return 0


def _saved_step(plan: RunPlan, workdir: Path, before: int) -> int:
    """Optimizer steps in the newest checkpoint since attempt `before`; -1 for none. Where workers share a bucket and no
    disk with this process, their reports lie elsewhere and the bucket is asked."""
    last = last_report(workdir / PROGRESS_FILE)
    if last is not None and last.checkpoint is not None:
        return last.checkpoint.step
    from finetune_trainers.checkpoint.find import find_newest

    with suppress(StorageError):
        if (storage := _bucket_of(plan)) is not None and (newest := find_newest(storage).manifest) is not None:
            return newest.intent.step if newest.intent.epoch > before else -1
    return -1


def _bucket_of(plan: RunPlan) -> Storage | None:
    """Where the checkpoints are, if that is a bucket. Raises StorageError."""
    if plan.checkpoint is None or plan.checkpoint.uri is None or not in_bucket(plan.checkpoint.uri):
        return None
    from finetune_trainers.checkpoint.storage.opening import open_storage

    return open_storage(plan.checkpoint.uri, exclusive=True)
