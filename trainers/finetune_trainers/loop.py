"""The training loop: one for all methods and engines. A method brings batches and a loss, the engine updates.

    evaluate
    for each step:
        micro-batches: loss, backward
        one all-reduce: the loss of the whole global batch, whether a stop was asked for, what ranks know of checkpoints
        not finite? end here, before the update
        update
        log; evaluate when it is time; stop early when it no longer gets better
        save a checkpoint when it is time, of a model that the method confirms; give way when it is whole and a larger
            group waits for it
    asked to stop? save a checkpoint of the steps that no checkpoint has

Runs on every rank, in step. It decides nothing from a rank's own view: what ranks could see differently (a stop
request, a non-finite loss) goes through the all-reduce first.
"""

from __future__ import annotations

import bisect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from finetune_api.base import Contract
from finetune_api.plan import RunPlan
from finetune_api.progress import EvalSummary, SavedCheckpoint, Stage
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.batches import Batch
from finetune_trainers.engine import Engine
from finetune_trainers.errors import NonFiniteLossError
from finetune_trainers.evaluation import EarlyStop
from finetune_trainers.methods import Method
from finetune_trainers.optim import lr_at
from finetune_trainers.prepared import PreparedRun

__all__ = ["Evaluator", "KeepsBest", "Loop", "LoopMemory", "LoopResult", "SaveNews", "SavesCheckpoints", "epoch_ends"]

_SAVING = "Saving"
"""Beside the stages' seconds: for which training stood still because of checkpoints."""

Evaluator = Callable[[int], dict[str, float]]
"""Called with the number of steps done; returns figures, eval_loss among them where it could be had. Collective."""


class KeepsBest(Protocol):
    """Keeps the parameters of the best evaluation so far."""

    def save(self, step: int) -> None: ...


class LoopMemory(Contract):
    """What the loop would need to know if it went on in another process. It is part of a checkpoint."""

    num_trained_tokens: int = 0
    evaluated: bool = False
    """The model as it is has been evaluated, where that is due."""
    eval: EvalSummary | None = None
    best_step: int | None = None
    best_loss: float | None = None
    num_without_improvement: int = 0
    """Evaluations since the best one."""
    metrics: dict[str, float] = Field(default_factory=dict)
    seen_metrics: list[str] = Field(default_factory=list)
    """Names of all figures that there were so far: one may be missing among the newest."""
    method: dict[str, Any] = Field(default_factory=dict)
    """What the method remembers, as it gave it."""
    loss_scale: float | None = None
    """Of fp16; filled in by whoever saves, as what follows."""
    loss_scale_counts: dict[str, int] = Field(default_factory=dict)
    """What its next change depends on."""


class SaveNews(NamedTuple):
    """What became known of checkpoints, on rank 0."""

    checkpoint: SavedCheckpoint | None = None
    """The newest whole one, when there is a newer one than was told before."""
    failure: str | None = None
    """Why there is none of a step for which one was tried."""
    skipped: str | None = None
    """Why none was tried when one was due."""
    gives_way: bool = False
    """All that was trained is in a whole checkpoint, and another group of workers is to go on from it. On all ranks."""


class SavesCheckpoints(Protocol):
    """Makes checkpoints of the engine and of what the loop remembers, while training goes on."""

    def votes(self, step: int) -> Sequence[float]:
        """What this rank knows when `step` steps are nearly done: always as many numbers, to be summed over ranks."""
        ...

    def after_step(self, step: int, sums: Sequence[float], memory: Callable[[], LoopMemory]) -> SaveNews:
        """`step` steps are done, and the ranks' votes add up to `sums`: save now if that is what they say."""
        ...

    def finish(self, step: int, memory: Callable[[], LoopMemory] | None) -> SaveNews:
        """The training ends: save it, if there is a memory, and wait until all is durable or has failed."""
        ...


class TracksMetrics(Protocol):
    """What the loop needs of trackers."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...


@dataclass
class LoopResult:
    """How a training ended."""

    step: int = 0
    """Optimizer steps done."""
    stopped_early: bool = False
    cancelled: bool = False
    """A stop was asked for; the steps done are whole ones."""
    gives_way: bool = False
    """The stop was for another group of workers, which goes on."""
    best_step: int | None = None
    """The step whose parameters were kept as the best; None without early stopping."""
    eval: EvalSummary | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """The last value of every figure."""
    seconds: dict[str, float] = field(default_factory=dict)


def epoch_ends(total_steps: int, sequences_per_epoch: int, global_batch_size: int) -> set[int]:
    """The numbers of steps done at which one more pass over the data is complete."""
    num_epochs = total_steps * global_batch_size // sequences_per_epoch
    ends = {-(-epoch * sequences_per_epoch // global_batch_size) for epoch in range(1, num_epochs + 1)}
    return {step for step in ends if step <= total_steps}


class Loop:
    """One training. `run` may be called once."""

    def __init__(
        self,
        plan: RunPlan,
        prepared: PreparedRun,
        engine: Engine,
        method: Method,
        context: WorkerContext,
        trackers: TracksMetrics | None = None,
        evaluate: Evaluator | None = None,
        best: KeepsBest | None = None,
        checkpoints: SavesCheckpoints | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`trackers` on rank 0 only; `best` exactly when the plan stops early."""
        self._optimization = plan.optimization
        self._rows_per_step = plan.batch.global_batch_size / plan.method.uses_per_row
        self._iteration = plan.method.steps_per_iteration
        self._prepared = prepared
        self._total = prepared.total_steps
        self._engine = engine
        self._method = method
        self._context = context
        self._trackers = trackers
        self._evaluate_model = evaluate
        self._best = best
        stopping = plan.evaluation.early_stopping
        self._early_stop = EarlyStop(stopping.patience, stopping.min_delta) if stopping is not None else None
        self._clock = clock
        self._pace = _Pace()
        self._evaluated_at = self._evaluations(plan) if evaluate is not None else []
        self._checkpoints = checkpoints
        self._save_sums: Sequence[float] = ()
        self._told_of_saving = False
        self._lasting: dict[str, Any] = {}  # what every report says
        self._evaluated = False
        self._seen_metrics: set[str] = set()
        self._confirmed_step: int | None = None
        self._num_trained_tokens = 0
        self._stop_requested = False
        self.result = LoopResult(seconds={Stage.TRAINING: 0.0, Stage.EVALUATING: 0.0})

    def run(self) -> LoopResult:
        result = self.result
        lasting = self._lasting | self._method.lasting()
        self._context.report(Stage.TRAINING, step=result.step, total_steps=self._total, **lasting)
        is_new = result.step == 0
        if (is_new or (self._evaluation_is_due() and not self._evaluated)) and self._evaluate():
            result.stopped_early = result.step < self._total
            return result
        if self._stop_was_requested():
            result.cancelled = True
            return result
        began_at = result.step
        for step in range(began_at, self._total):
            figures = self._timed_step(step)
            if figures is None:
                result.cancelled = True
                if step == began_at:  # there is nothing that no checkpoint has
                    return result
                break
            result.step, self._evaluated = step + 1, False
            self._log(figures)
            if self._stop_requested and self._is_between_iterations and result.step < self._total:
                result.cancelled = True
                break
            if self._evaluation_is_due() and self._evaluate():
                result.stopped_early = result.step < self._total
                break
            if self._save(ended=False):
                result.cancelled = result.gives_way = True
                break
        self._method.wind_down()
        if self._keeps_this_step:
            self._confirm()
        self._save(ended=True)
        return result

    def resume(self, step: int, memory: LoopMemory, checkpoint: SavedCheckpoint | None = None) -> None:
        """Go on after `step` steps of an earlier process, from `checkpoint`. Called before `run`."""
        self.result.step = step
        self.result.best_step, self.result.eval = memory.best_step, memory.eval
        self.result.metrics = dict(memory.metrics)
        self._seen_metrics = {*memory.seen_metrics, *memory.metrics}
        self._num_trained_tokens, self._evaluated = memory.num_trained_tokens, memory.evaluated
        self._confirmed_step = step
        self._method.load_state(memory.method)
        if self._early_stop is not None:
            self._early_stop.num_without_improvement = memory.num_without_improvement
            self._early_stop.best_loss = math.inf if memory.best_loss is None else memory.best_loss
        self.always_report(resumed_from_step=step, checkpoint=checkpoint)

    def always_report(self, **figures: Any) -> None:
        """Fields of Progress that every report shall have."""
        self._lasting |= figures

    def _memory(self) -> LoopMemory:
        stop = self._early_stop
        best_loss = stop.best_loss if stop is not None else math.inf
        return LoopMemory(
            num_trained_tokens=self._num_trained_tokens,
            evaluated=self._evaluated,
            eval=self.result.eval,
            best_step=self.result.best_step,
            best_loss=best_loss if math.isfinite(best_loss) else None,
            num_without_improvement=stop.num_without_improvement if stop is not None else 0,
            metrics={name: value for name, value in self.result.metrics.items() if math.isfinite(value)},
            seen_metrics=sorted(self._seen_metrics),
            method=self._method.state(),
        )

    @property
    def _is_between_iterations(self) -> bool:
        """Where a method that learns several steps from the same rollouts can be left, and gone on with."""
        return self.result.step % self._iteration == 0

    def _save(self, ended: bool) -> bool:
        """What a step's end, or the end of training, has to do with checkpoints; True when others are to go on."""
        if self._checkpoints is None:
            return False
        step, start, self._told_of_saving = self.result.step, self._clock(), False
        if ended:
            self._tell_of_saving()
            news = self._checkpoints.finish(step, self._memory if self.result.cancelled else None)
        else:
            news = self._checkpoints.after_step(step, self._save_sums, self._memory_to_save)
        self.result.seconds[_SAVING] = self.result.seconds.get(_SAVING, 0.0) + self._clock() - start
        if news.checkpoint is not None:
            self.always_report(checkpoint=news.checkpoint, save_failure=None)
        if news.failure is not None:
            self.always_report(save_failure=news.failure)
        if any(news) or (self._told_of_saving and not ended):
            self._report(Stage.TRAINING, urgent=True, message=news.failure or news.skipped)
        return news.gives_way

    @property
    def _keeps_this_step(self) -> bool:
        """Whether the weights as they are at the end go into a checkpoint, or into the artifact."""
        if self.result.cancelled:
            return self._checkpoints is not None
        return self.result.best_step in (None, self.result.step)

    def _memory_to_save(self) -> LoopMemory:
        """Asked for when a checkpoint is about to be made."""
        self._confirm()
        self._tell_of_saving()
        return self._memory()

    def _confirm(self) -> None:
        """Nothing that outlives the process, be it checkpoint, best parameters or artifact, is of weights that the
        method did not confirm."""
        if self._confirmed_step != self.result.step:
            self._method.confirm(self.result.step)
            self._confirmed_step = self.result.step

    def _tell_of_saving(self) -> None:
        self._told_of_saving = True
        self._report(Stage.TRAINING, urgent=True, phase="save", role="the writer of checkpoints")

    def _stop_was_requested(self) -> bool:
        """The same answer on every rank. Within a step, the loss's all-reduce carries the question."""
        request = torch.tensor(float(self._context.should_stop()), device=self._context.device)
        return self._context.all_reduce_sum(request).item() > 0

    def _timed_step(self, step: int) -> dict[str, float] | None:
        start = self._clock()
        found = self._step(step)
        if found is None:
            return None
        figures, num_tokens = found
        seconds = self._clock() - start
        self.result.seconds[Stage.TRAINING] += seconds
        self._pace.add_step(seconds, num_tokens)
        return figures | {"step_seconds": seconds}

    def _step(self, step: int) -> tuple[dict[str, float], int] | None:
        """One optimizer step. Returns its figures and the tokens that went through the model, over all ranks; None
        where the method was asked to stop before it had something to learn from."""
        batches = self._method.step(step)
        if batches is None:
            return None
        rate = lr_at(step, self._total, self._prepared.learning_rate)
        self._engine.begin_step(rate, step / self._total)
        device = self._context.device
        # loss; ranks that saw a stop request; what the method counts; what ranks know of checkpoints
        sums = torch.zeros(2 + self._method.num_sums, dtype=torch.float64, device=device)
        for batch in batches.micro_batches:
            total, counted_here = self._learn(batch.to(device), batches.divisor)
            sums[0] += total
            sums[2:] += counted_here
        sums[1] = float(self._context.should_stop())
        if self._checkpoints is not None:
            sums = torch.cat([sums, sums.new_tensor(self._checkpoints.votes(step + 1))])
        loss_total, num_stops, *rest = self._context.all_reduce_sum(sums).tolist()
        counted, self._save_sums = rest[: self._method.num_sums], rest[self._method.num_sums :]
        loss = loss_total / batches.divisor
        self._stop_requested = num_stops > 0
        if not math.isfinite(loss):
            raise NonFiniteLossError(_non_finite(f"the loss is {loss}", step), step=step)
        try:
            grad_norm = None if batches.is_left_out else self._engine.step()
        except NonFiniteLossError as error:
            raise NonFiniteLossError(_non_finite(error.message, step), step=step) from error
        self._num_trained_tokens += batches.num_trained_tokens
        figures = {"learning_rate": rate, "num_tokens": float(self._num_trained_tokens)}
        if not batches.is_left_out:
            figures = {"loss": loss} | figures
        if grad_norm is not None:
            figures["grad_norm"] = grad_norm
        return figures | self._method.figures(counted), batches.num_tokens

    def _learn(self, batch: Batch, divisor: int) -> tuple[Tensor, Tensor]:
        """Adds a micro-batch's gradient. Returns its summed loss, and what the method counts in it."""
        module = self._engine.module
        parts = self._method.losses(module, batch) if self._engine.takes_parts else [self._method.loss(module, batch)]
        found = []
        for part in parts:
            self._engine.backward(part.total, divisor)
            found.append((part.total.detach(), part.sums))
        totals, counted = zip(*found, strict=True)
        return sum(totals[1:], totals[0]), sum(counted[1:], counted[0])

    def _log(self, figures: dict[str, float]) -> None:
        step = self.result.step
        last = step == self._total
        figures = figures | {"tokens_per_second": self._pace.tokens_per_second, "epoch": self._epoch}
        self._note(figures, of_evaluation=False)
        if self._trackers is not None and (step % self._optimization.log_every_steps == 0 or step == 1 or last):
            self._trackers.log(step, figures)
        self._report(Stage.TRAINING, urgent=last or step == 1)

    def _note(self, figures: Mapping[str, float], of_evaluation: bool) -> None:
        """`figures` take the place of all of their kind: what was not given this time must not pass for new."""
        others = {name: of for name, of in self.result.metrics.items() if name.startswith("eval_") != of_evaluation}
        self.result.metrics = {**others, **figures}
        self._seen_metrics |= {name for name, value in figures.items() if math.isfinite(value)}

    def _report(self, stage: Stage, urgent: bool = False, **figures: object) -> None:
        step = self.result.step
        self._context.report(
            stage,
            urgent=urgent,
            step=step,
            total_steps=self._total,
            epoch=self._epoch,
            percent=100.0 * step / self._total,
            eta_seconds=self._pace.eta_seconds(self._total - step, self._num_evaluations_left()),
            tokens_per_second=self._pace.tokens_per_second or None,
            metrics={name: value for name, value in self.result.metrics.items() if math.isfinite(value)},
            **self._lasting,
            **self._method.lasting(),
            **figures,
        )

    @property
    def _epoch(self) -> float:
        """Passes over the data done. The last step of the last epoch may be a small one: it completes the pass."""
        passes = self.result.step * self._rows_per_step / self._prepared.sequences_per_epoch
        return min(passes, self._optimization.epochs or math.inf)

    def _evaluations(self, plan: RunPlan) -> list[int]:
        """The numbers of steps done at which the model is evaluated, in order; the one before the first is not here."""
        every = plan.evaluation.every_steps or self._total
        uses = self._prepared.sequences_per_epoch * plan.method.uses_per_row
        ends = epoch_ends(self._total, uses, plan.batch.global_batch_size)
        return sorted({*range(every, self._total, every), *ends, self._total})

    def _evaluation_is_due(self) -> bool:
        place = bisect.bisect_left(self._evaluated_at, self.result.step)
        return place < len(self._evaluated_at) and self._evaluated_at[place] == self.result.step

    def _num_evaluations_left(self) -> int:
        return len(self._evaluated_at) - bisect.bisect_right(self._evaluated_at, self.result.step)

    def _evaluate(self) -> bool:
        """Evaluate the model as it is; True when training should stop for want of improvement."""
        if self._evaluate_model is None:
            return False
        step, start = self.result.step, self._clock()
        self._report(Stage.EVALUATING)
        figures = self._evaluate_model(step)
        seconds = self._clock() - start
        self._pace.evaluation_seconds = seconds
        self.result.seconds[Stage.EVALUATING] += seconds
        self._note(figures, of_evaluation=True)
        self._evaluated = True
        if self._trackers is not None:
            self._trackers.log(step, figures)
        self._report(Stage.TRAINING, urgent=True)
        return self._judge(step, figures.get("eval_loss"), figures.get("eval_reward"))

    def _judge(self, step: int, loss: float | None, reward: float | None) -> bool:
        if step == 0:
            self.result.eval = EvalSummary(loss_before=loss, reward_before=reward)
            return False
        before = self.result.eval or EvalSummary()
        after = before.model_copy(update={"loss_after": loss, "reward_after": reward})
        if self._early_stop is None or self._best is None:
            self.result.eval = after
            return False
        if loss is None:
            return False
        verdict = self._early_stop.update(loss)
        if verdict.improved:
            self._confirm()
            self._best.save(step)
            self.result.best_step = step
            self.result.eval = after
        return verdict.stop


def _non_finite(what: str, step: int) -> str:
    return (
        f"{what} at step {step + 1}; the update was not made."
        " Lower spec.training.learningRate, or look for odd rows in the data."
    )


class _Pace:
    """How fast it goes: recent steps count more, so that the first one, which compiles and allocates, is soon gone."""

    def __init__(self) -> None:
        self._step_seconds: float | None = None
        self._tokens = 0.0
        self._seconds = 0.0
        self.evaluation_seconds = 0.0

    def add_step(self, seconds: float, num_tokens: int) -> None:
        old = self._step_seconds
        self._step_seconds = seconds if old is None else 0.8 * old + 0.2 * seconds
        self._tokens = 0.8 * self._tokens + num_tokens
        self._seconds = 0.8 * self._seconds + seconds

    @property
    def tokens_per_second(self) -> float:
        return self._tokens / self._seconds if self._seconds > 0 else 0.0

    def eta_seconds(self, steps: int, evaluations: int) -> float | None:
        if self._step_seconds is None:
            return None
        return steps * self._step_seconds + evaluations * self.evaluation_seconds
