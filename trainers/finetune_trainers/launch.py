"""The launcher: one run from a plan to its outcome, in the order in which things can go wrong.

    try the buckets      that the run will write to
    check the model      no weights loaded, no worker started
    prepare the data     every row read
    count the steps, settle the learning rate, write prepared.json
    start the workers    Ray Train, or this process; they write the artifact and the job's outputs

Called by `__main__`. A run that fails still has an outcome: nothing but a stop request leaves `run` as an exception.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, TypeVar

from finetune_api.failures import Failure, FailureClass, Problem
from finetune_api.learning_rate import auto_learning_rate
from finetune_api.plan import RunPlan
from finetune_api.progress import Outcome, Result, Stage
from finetune_trainers.artifact_folder import RUN_ARTIFACT
from finetune_trainers.context import STOP_FILE
from finetune_trainers.errors import UserError, classified
from finetune_trainers.prepared import PreparedData, PreparedModel, PreparedRun
from finetune_trainers.progress import PROGRESS_FILE, FileSink
from finetune_trainers.worker_process import LOG_FILE

if TYPE_CHECKING:
    from finetune_trainers.ray_workers import RayWorkers
    from finetune_trainers.rewards.columns import Needed
    from finetune_trainers.worker import WorkerResult

__all__ = ["check", "count_steps", "run"]

SAID_RAY = "FINETUNE_RAY_VERSION"
"""Set by the operator."""

T = TypeVar("T")
logger = logging.getLogger(__name__)


def run(plan: RunPlan, workdir: Path, cache: Path, *, use_ray: bool | None = None) -> Outcome:
    """Train as `plan` says, in `workdir`. `cache` holds unpacked models and tokenized data from run to run.

    `use_ray` None: a single process on one machine needs no Ray, whose start costs more than its imports; several
    processes, or a Ray cluster named by RAY_ADDRESS, do.

    Writes plan.json, prepared.json, progress.jsonl, metrics.jsonl, artifact/ and, at the very end, outcome.json.
    Ctrl-C and SIGTERM stop it after the current step, or at once when no step is being made.
    """
    return _concluded(_Launch(plan, workdir.absolute(), cache), lambda launch: launch.run(use_ray))


def check(plan: RunPlan, workdir: Path, cache: Path) -> Outcome:
    """All that can be known without training: the model's files, every row of the data, steps and learning rate.

    Writes prepared.json, progress.jsonl and outcome.json into `workdir`.
    """
    return _concluded(_Launch(plan, workdir.absolute(), cache), lambda launch: launch.check())


def count_steps(plan: RunPlan, sequences_per_epoch: int) -> int:
    """Optimizer steps of the whole run. The last step of the last epoch may be a small one; the last iteration of
    rollouts is a whole one, and goes on with the first prompts of another epoch."""
    if plan.optimization.max_steps is not None:
        return plan.optimization.max_steps
    uses = (plan.optimization.epochs or 1) * sequences_per_epoch * plan.method.uses_per_row
    iteration = plan.method.steps_per_iteration
    return max(1, math.ceil(uses / (plan.batch.global_batch_size * iteration))) * iteration


def _check_ray() -> None:
    """The RayJob was built for the Ray that job, runtime or chart say is in the image: its settings and its tokens."""
    said = os.environ.get(SAID_RAY)
    if said is None or said == (there := version("ray")):
        return
    message = f"the image has Ray {there}: set that, in the job or in the runtime, where the image is named"
    problem = Problem(path="spec.cluster.rayVersion", value=said, message=message)
    raise UserError(str(problem), [problem])


def _concluded(launch: _Launch, work: Callable[[_Launch], Outcome]) -> Outcome:
    """The outcome of `work`, however it ends, written down as the last thing that the run does."""
    launch.begin()
    try:
        outcome = work(launch)
    except KeyboardInterrupt:
        outcome = Outcome(result=Result.CANCELLED, seconds=launch.seconds)
    except Exception as error:
        outcome = _failed(error, launch.seconds)
    launch.report(Stage.DONE)
    unfinished = launch.workdir / ".outcome.json"
    unfinished.write_text(outcome.model_dump_json(by_alias=True, exclude_none=True, indent=2) + "\n")
    unfinished.replace(launch.workdir / "outcome.json")
    launch.sink.finish(outcome)
    return outcome


class _Launch:
    """One run, with the time that each stage took."""

    def __init__(self, plan: RunPlan, workdir: Path, cache: Path) -> None:
        self.plan = plan
        self.workdir = workdir
        self.cache = cache
        self.seconds: dict[str, float] = {}
        self.sink = FileSink(workdir / PROGRESS_FILE)

    def begin(self) -> None:
        self.workdir.mkdir(parents=True, exist_ok=True)
        (self.workdir / STOP_FILE).unlink(missing_ok=True)
        self.sink.begin()
        (self.workdir / "plan.json").write_text(self.plan.model_dump_json(by_alias=True, indent=2) + "\n")

    def report(self, stage: Stage, percent: float = 0.0, message: str | None = None) -> None:
        self.sink.report(stage, percent=percent, message=message)

    def run(self, use_ray: bool | None) -> Outcome:
        _check_ray()
        world_size = self.plan.workers.world_size
        if use_ray is None:
            use_ray = world_size > 1 or "RAY_ADDRESS" in os.environ
        if not use_ray and world_size > 1:
            raise UserError(f"--no-ray trains in one process, and the plan has {world_size}; leave --no-ray out")
        with _ray(self.plan) if use_ray else nullcontext() as ray, _StopRequests(self.workdir) as stops:
            self._try_buckets()
            prepared = self.prepare()
            self._set_aside()
            asked_at = time.time()
            self.report(Stage.STARTING_WORKERS)
            with stops.at_step_boundaries():
                if ray is None:
                    result = _train_here(self.plan, prepared, self.workdir)
                else:
                    result = ray.run(prepared, self.workdir, stops.wait, self._tell_of_workers)
            self.seconds[Stage.STARTING_WORKERS] = result.started_at - asked_at
            self.seconds |= result.seconds
        training = result.training
        return Outcome(
            result=Result.CANCELLED if training.cancelled else Result.SUCCEEDED,
            step=training.step,
            total_steps=prepared.total_steps,
            stopped_early=training.stopped_early,
            eval=training.eval,
            artifacts=result.artifacts,
            metrics={name: value for name, value in training.metrics.items() if math.isfinite(value)},
            seconds=self.seconds,
        )

    def _try_buckets(self) -> None:
        """Not a part of `check`, which writes nowhere but here."""
        from finetune_trainers.outputs import check_buckets

        check_buckets(self.plan)

    def _set_aside(self) -> None:
        """An artifact that lies here already stays, under another name: on a claim it may be that of a job of the same
        name, which was deleted."""
        found = self.workdir / RUN_ARTIFACT
        if found.exists():
            aside = f"{RUN_ARTIFACT}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime(found.stat().st_mtime))}"
            found.rename(self.workdir / aside)
            logger.warning("%s holds an earlier artifact, which is now called %s", self.workdir, aside)

    def _tell_of_workers(self, sentence: str) -> None:
        logger.warning(sentence)
        self.report(Stage.STARTING_WORKERS, message=sentence)

    def check(self) -> Outcome:
        prepared = self.prepare()
        return Outcome(result=Result.SUCCEEDED, total_steps=prepared.total_steps, seconds=self.seconds)

    def prepare(self) -> PreparedRun:
        """Everything before the first worker."""
        from finetune_trainers.outputs import check_outputs
        from finetune_trainers.tracking import check_trackers

        check_outputs(self.plan)
        check_trackers(self.plan)
        columns = self._check_rewards()
        self._check_rollout()
        with self._timed(Stage.CHECKING_MODEL):
            model = self._check_model()
            teacher = self._check_teacher(model)
            self._check_critic(model)
        with self._timed(Stage.PREPARING_DATA):
            data = self._prepare_data(model)
            self._check_columns(columns, data)
        prepared = self._settle(model, data, teacher)
        self._check_warmup(prepared.total_steps)
        (self.workdir / "prepared.json").write_text(prepared.model_dump_json(by_alias=True, indent=2) + "\n")
        return prepared

    def _check_rewards(self) -> Sequence[Needed]:
        """What they need of the rows."""
        method = self.plan.method
        if method.online is None:
            return ()
        from finetune_trainers.rewards.building import check_rewards

        return check_rewards(method.online.rewards, f"spec.method.{method.chosen}.rewards")

    def _check_columns(self, needed: Sequence[Needed], data: PreparedData) -> None:
        if not needed:
            return
        from finetune_trainers.rewards.columns import check_columns

        if problems := check_columns(needed, data):
            raise UserError("; ".join(str(problem) for problem in problems), problems)

    def _check_rollout(self) -> None:
        from finetune_trainers.rollout.vllm_process import check_vllm

        problems = check_vllm(self.plan)
        if problems:
            raise UserError("; ".join(str(problem) for problem in problems), problems)
        online = self.plan.method.online
        if online is not None and online.sampling.bias is not None:
            logger.warning("spec.method.%s.sampling: %s", self.plan.method.chosen, online.sampling.bias)

    def _check_model(self) -> PreparedModel:
        from finetune_trainers.models import prepare_model  # brings torch and transformers

        return prepare_model(
            self.plan, self.cache, lambda percent, text: self.report(Stage.CHECKING_MODEL, percent, text)
        )

    def _check_critic(self, model: PreparedModel) -> None:
        if self.plan.method.ppo is not None:
            from finetune_trainers.online.critic_beginning import check_beginning

            check_beginning(self.plan, model)

    def _check_warmup(self, total_steps: int) -> None:
        ppo = self.plan.method.ppo
        if ppo is None or ppo.critic.warmup_iterations * ppo.steps_per_iteration < total_steps:
            return
        problem = Problem(
            path="spec.method.ppo.critic.warmupIterations",
            value=str(ppo.critic.warmup_iterations),
            message=f"leaves the model itself none of {-(-total_steps // ppo.steps_per_iteration)} iterations to learn"
            " in; lower it, or raise spec.training.maxSteps or epochs",
        )
        raise UserError(str(problem), [problem])

    def _check_teacher(self, model: PreparedModel) -> PreparedModel | None:
        if self.plan.method.distill is None:
            return None
        from finetune_trainers.teacher import prepare_teacher

        return prepare_teacher(
            self.plan, model, self.cache, lambda percent, text: self.report(Stage.CHECKING_MODEL, percent, text)
        )

    def _prepare_data(self, model: PreparedModel) -> PreparedData:
        from finetune_trainers.data.prepare import eval_prompts, prepare_data

        data = prepare_data(
            self.plan, model, self.cache, lambda percent, text: self.report(Stage.PREPARING_DATA, percent, text)
        )
        if self.plan.evaluation.generation is not None:
            eval_prompts(self.plan, model, limit=1)  # refuses data without questions before a worker starts
        return data

    def _settle(self, model: PreparedModel, data: PreparedData, teacher: PreparedModel | None) -> PreparedRun:
        from finetune_trainers.data.order import sequences_per_epoch_of

        rate = self.plan.optimization.learning_rate
        if rate.peak is None:
            peak, reason = auto_learning_rate(model.num_parameters, self.plan.tuning, self.plan.method)
            rate = rate.model_copy(update={"peak": peak, "reason": reason})
        sequences = sum(sequences_per_epoch_of(source) for source in data.train)
        return PreparedRun(
            model=model,
            data=data,
            sequences_per_epoch=sequences,
            total_steps=count_steps(self.plan, sequences),
            learning_rate=rate,
            teacher=teacher,
        )

    @contextmanager
    def _timed(self, stage: Stage) -> Iterator[None]:
        start = time.perf_counter()
        self.report(stage)
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def _ray(plan: RunPlan) -> AbstractContextManager[RayWorkers]:
    from finetune_trainers.ray_workers import RayWorkers

    return RayWorkers(plan)


def _train_here(plan: RunPlan, prepared: PreparedRun, workdir: Path) -> WorkerResult:
    from finetune_trainers import worker
    from finetune_trainers.context import SingleProcessContext

    return worker.run(plan, prepared, SingleProcessContext(plan, workdir), workdir)


def _failed(error: Exception, seconds: dict[str, float]) -> Outcome:
    typed = classified(error)
    failure = typed.to_failure()
    if failure.failure_class is FailureClass.UNKNOWN:
        logger.error("The run failed", exc_info=error)
        failure = Failure(
            failure_class=failure.failure_class,
            message=f"{failure.message[:4000]} (the traceback is in {LOG_FILE})",
            step=failure.step,
        )
    return Outcome(result=Result.FAILED, failure=failure, step=failure.step or 0, seconds=seconds)


class _StopRequests:
    """SIGINT and SIGTERM while the block runs: an exception at once, or a request that workers obey between steps.

    A second signal never waits. Outside the main thread (notebooks, tests) signals are somebody else's.
    """

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, workdir: Path) -> None:
        self._stop_file = workdir / STOP_FILE
        self._waits_for_step = False
        self._num_received = 0

    def __enter__(self) -> _StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._received) for number in self._SIGNALS}
        else:
            self._before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _received(self, number: int, frame: FrameType | None) -> None:
        self._num_received += 1
        if not self._waits_for_step or self._num_received > 1:
            raise KeyboardInterrupt
        self._stop_file.touch()

    @contextmanager
    def at_step_boundaries(self) -> Iterator[None]:
        self._waits_for_step = True
        try:
            yield
        finally:
            self._waits_for_step = False

    @staticmethod
    def wait(future: Future[T]) -> T:
        """The result of `future`; a signal is handled within a fifth of a second."""
        while True:
            with suppress(TimeoutError):
                return future.result(timeout=0.2)
