"""What one training process does, from the empty process to the artifact. Every rank runs the same function.

Called by `launch`, in a Ray Train worker or in the launcher's own process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from finetune_api.plan import RunPlan
from finetune_api.progress import Artifact, Result, Stage
from finetune_trainers.artifact import write_artifact
from finetune_trainers.artifact_folder import RUN_ARTIFACT
from finetune_trainers.best import BestParameters
from finetune_trainers.context import WorkerContext, threads_per_worker
from finetune_trainers.data.prepare import EvalPrompt, eval_prompts
from finetune_trainers.engine import Engine, build_engine
from finetune_trainers.evaluation import evaluate_generation
from finetune_trainers.loop import Loop, LoopResult
from finetune_trainers.methods import Method
from finetune_trainers.methods.building import build_method
from finetune_trainers.methods.reward import Calibration, Reward
from finetune_trainers.model_card import CardFacts
from finetune_trainers.models import load_model, load_tokenizer
from finetune_trainers.outputs import publish
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.tracking import Trackers, open_trackers
from finetune_trainers.tuning import TunedModel, apply_tuning

if TYPE_CHECKING:
    from finetune_trainers.saving import Checkpoints

__all__ = ["WorkerResult", "artifact_folder", "load", "run"]


@dataclass
class WorkerResult:
    """What a worker hands back to the launcher; rank 0's is used."""

    started_at: float
    """time.time() when the worker began."""
    training: LoopResult
    artifacts: list[Artifact] = field(default_factory=list)
    """The one in the run's folder, or in the storage that is a bucket; and one at each of the job's outputs."""
    seconds: dict[str, float] = field(default_factory=dict)


def artifact_folder(workdir: Path) -> Path:
    return workdir / RUN_ARTIFACT


def run(plan: RunPlan, prepared: PreparedRun, context: WorkerContext, workdir: Path) -> WorkerResult:
    """Load, train, write. Raises TrainerError; other exceptions are faults of ours or of the machine."""
    started_at = time.time()
    torch.set_num_threads(threads_per_worker(plan.workers.cpus_per_process, context.local_world_size))
    torch.manual_seed(plan.optimization.seed)  # new weights are the same on every rank
    context.report(Stage.LOADING_MODEL)
    tuned, engine = load(plan, prepared, context)
    torch.manual_seed(plan.optimization.seed + context.rank)  # dropout is not
    method = build_method(plan, prepared, engine.module, context)  # asks the model before a checkpoint is loaded
    loaded_at = time.time()
    checkpoints = _checkpoints(plan, prepared, tuned, engine, context, workdir)
    trackers = open_trackers(plan, workdir, plan.name) if context.rank == 0 else None
    evaluator = _Evaluator(plan, prepared, method, engine, context, trackers)
    best = None
    if plan.evaluation.early_stopping is not None:
        best = BestParameters(workdir / "best", engine, tuned.exported, context)
    loop = Loop(
        plan,
        prepared,
        engine,
        method,
        context,
        trackers=trackers,
        evaluate=evaluator if prepared.data.eval else None,
        best=best,
        checkpoints=checkpoints,
    )
    result = Result.FAILED
    try:
        if checkpoints is not None:
            if (resumed := checkpoints.resume()) is not None:
                loop.resume(resumed.step, resumed.memory, resumed.checkpoint)
            loop.always_report(rejected_checkpoints=checkpoints.rejected[:4])
        loop.always_report(world_size=context.world_size)
        training = loop.run()
        calibration = _calibrated(method, engine, evaluator, training)
        engine.close()
        exporting_at = time.time()
        artifacts: list[Artifact] = []
        if not training.cancelled:
            context.report(Stage.EXPORTING, step=training.step, total_steps=prepared.total_steps)
            tensors = _tensors(tuned, engine, training, best)
            artifacts = _write(plan, prepared, context, workdir, training, tensors, calibration)
        result = Result.CANCELLED if training.cancelled else Result.SUCCEEDED
    finally:
        if trackers is not None:
            trackers.close(result)
        if checkpoints is not None:
            checkpoints.close()
        method.close()
        engine.close()
    seconds = {
        Stage.LOADING_MODEL: loaded_at - started_at,
        **training.seconds,
        Stage.EXPORTING: time.time() - exporting_at,
    }
    return WorkerResult(started_at, training, artifacts, {str(stage): value for stage, value in seconds.items()})


def load(plan: RunPlan, prepared: PreparedRun, context: WorkerContext) -> tuple[TunedModel, Engine]:
    """The model with its tuning, and the engine around it. Collective."""
    zero3_config = None
    if plan.deepspeed.engine == "deepspeed":
        from finetune_trainers.engine_deepspeed import engine_config, join_group

        join_group(context)
        if plan.deepspeed.zero_stage == 3:
            zero3_config = engine_config(plan)
    model = load_model(prepared.model, plan, context.device, zero3_config)
    model.train()
    tuned = apply_tuning(model, plan)
    if plan.method.ppo is not None:
        from finetune_trainers.online.critic import add_critic

        tuned = add_critic(tuned, plan.method.ppo, plan, prepared, context.device, zero3_config)
    if plan.method.online is not None:
        from finetune_trainers.online.dropout import disable_dropout
        from finetune_trainers.online.judges import add_judges

        disable_dropout(tuned.model, tells=context.rank == 0)
        add_judges(tuned.model, plan, prepared.model, context)
    return tuned, build_engine(tuned, plan, context)


def _checkpoints(
    plan: RunPlan,
    prepared: PreparedRun,
    tuned: TunedModel,
    engine: Engine,
    context: WorkerContext,
    workdir: Path,
) -> Checkpoints | None:
    if plan.checkpoint is None:
        return None
    from finetune_trainers.saving import Checkpoints  # its imports are for jobs that save

    best = workdir / "best" if plan.evaluation.early_stopping is not None else None
    return Checkpoints(plan, plan.checkpoint, prepared, engine, context, workdir, best, tuned.helpers)


class _Evaluator:
    """The method's figures, and answers where they are asked for. Collective."""

    def __init__(
        self,
        plan: RunPlan,
        prepared: PreparedRun,
        method: Method,
        engine: Engine,
        context: WorkerContext,
        trackers: Trackers | None,
    ) -> None:
        self._method, self._engine, self._context, self._trackers = method, engine, context, trackers
        self.by_step: dict[int, dict[str, float]] = {}
        """What each evaluation of this process found, by the number of steps done."""
        self._generation = plan.evaluation.generation
        self._prompts: list[EvalPrompt] = []
        if self._generation is not None:
            self._tokenizer = load_tokenizer(prepared.model, plan.model.trust_remote_code)
            self._prompts = eval_prompts(plan, prepared.model, self._generation.max_rows)

    def __call__(self, step: int) -> dict[str, float]:
        figures = self._method.evaluate(self._engine.module)
        if self._generation is not None:
            answers, samples = evaluate_generation(
                self._engine.module, self._tokenizer, self._prompts, self._generation, self._context
            )
            figures |= answers
        else:
            samples = self._method.samples()
        if self._trackers is not None and samples:
            self._trackers.log_samples(step, samples)
        self.by_step[step] = figures
        return figures


def _calibrated(method: Method, engine: Engine, evaluator: _Evaluator, training: LoopResult) -> Calibration | None:
    """Where a reward model's scores lie; None of other models. Collective.

    Measured on the model of the artifact. When another process evaluated that one, the last evaluation must do.
    """
    if not isinstance(method, Reward) or training.cancelled:
        return None
    step = training.step if training.best_step is None else training.best_step
    evaluated = evaluator.by_step.get(step, training.metrics)
    return method.calibrate(engine.module, evaluated if "eval_rewards/std" in evaluated else None)


def _tensors(
    tuned: TunedModel, engine: Engine, training: LoopResult, best: BestParameters | None
) -> Iterator[tuple[str, Tensor]]:
    """What goes into the artifact: the trained parameters of the best step, or of the last. Frozen ones are the base's.

    Collective: every rank must run it to its end.
    """
    if best is None or training.best_step is None or training.best_step == training.step:
        return engine.parameters(frozenset(tuned.exported))
    return best.read()


def _write(
    plan: RunPlan,
    prepared: PreparedRun,
    context: WorkerContext,
    workdir: Path,
    training: LoopResult,
    tensors: Iterator[tuple[str, Tensor]],
    calibration: Calibration | None,
) -> list[Artifact]:
    """The artifact, written by rank 0 while all ranks gather; then the job's outputs, by the same process: in a cluster
    nobody else may see what it has written."""
    if context.rank != 0:
        for _ in tensors:
            pass
        return []
    rate = prepared.learning_rate.peak
    assert rate is not None
    step = training.step if training.best_step is None else training.best_step
    card = CardFacts(
        data=prepared.data,
        steps=step,
        epochs=step * plan.batch.global_batch_size / prepared.sequences_per_epoch,
        learning_rate=rate,
        eval=training.eval,
        metrics=training.metrics,
    )
    artifact = write_artifact(artifact_folder(workdir), tensors, prepared.model, plan, card, calibration)

    def tell(place: str) -> None:
        context.report(Stage.EXPORTING, step=training.step, message=f"Writing the artifact to {place}")

    return publish(plan, prepared.model, artifact, tell)
