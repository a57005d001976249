"""The loop with an engine that only counts: what happens when, and what ends a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from finetune_api.plan import RunPlan
from finetune_api.progress import SavedCheckpoint, Stage
from finetune_trainers.data.batches import Batch, StepBatches
from finetune_trainers.errors import KLDivergedError, NonFiniteLossError
from finetune_trainers.loop import Loop, LoopMemory, LoopResult, SaveNews, epoch_ends
from finetune_trainers.methods import BatchLoss, Method
from finetune_trainers.prepared import PreparedData, PreparedModel, PreparedRun
from tests.trainers.factories import tiny_plan

TOKENS_PER_STEP = 10


class CountingEngine:
    """Loss of step s is what the method says; the model is the number of updates."""

    takes_parts = True

    def __init__(self) -> None:
        self.module: nn.Module = nn.Identity()
        self.device = torch.device("cpu")
        self.num_updates = 0
        self.num_backwards = 0
        self.rates: list[float] = []
        self.done: list[float] = []
        self.norm = 1.0

    def begin_step(self, learning_rate: float, done: float) -> None:
        self.rates.append(learning_rate)
        self.done.append(done)

    def backward(self, loss_sum: Tensor, divisor: int) -> None:
        assert divisor == TOKENS_PER_STEP
        self.num_backwards += 1

    def step(self) -> float | None:
        if not math.isfinite(self.norm):
            raise NonFiniteLossError(f"the norm of the gradient is {self.norm}")
        self.num_updates += 1
        return self.norm

    def parameters(self, names: Collection[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        yield "updates", torch.tensor(self.num_updates)

    def close(self) -> None:
        return None


class Losses(Method):
    """A method whose steps have two micro-batches and the given mean losses."""

    num_sums = 1

    def __init__(self, losses: Mapping[int, float]) -> None:
        self._losses = losses
        self._step = 0

    def step(self, step: int) -> StepBatches:
        self._step = step
        one = torch.zeros((1, 1), dtype=torch.int64)
        batch = Batch(one, one, one, torch.tensor([0, 1], dtype=torch.int32), 1, TOKENS_PER_STEP // 2)
        return StepBatches([batch, batch], TOKENS_PER_STEP, 2 * TOKENS_PER_STEP)

    def loss(self, module: nn.Module, batch: Batch) -> BatchLoss:
        total = torch.tensor(self._losses.get(self._step, 1.0) * TOKENS_PER_STEP / 2)
        return BatchLoss(total, torch.tensor([float(self._step)]))

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        return {"steps_seen_twice": sums[0]}

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        raise AssertionError("the loop is given what evaluates")


class Doubtful(Losses):
    """Remembers what it confirmed, and confirms nothing of steps after `last`."""

    def __init__(self, last: int) -> None:
        super().__init__({})
        self.asked: list[int] = []
        self._last = last

    def confirm(self, step: int) -> None:
        self.asked.append(step)
        if step > self._last:
            raise KLDivergedError("too far", step=step)


class Alone:
    """A context of one that remembers its reports and can be told to stop after a step."""

    rank = local_rank = 0
    world_size = local_world_size = 1
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.stop_asked = False

    def all_reduce_sum(self, tensor: Tensor) -> Tensor:
        return tensor

    def barrier(self) -> None:
        return None

    def broadcast_object(self, value: Any) -> Any:
        return value

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def report(self, stage: Stage, urgent: bool = False, **figures: Any) -> None:
        self.reports.append({"stage": stage, **figures})

    def should_stop(self) -> bool:
        return self.stop_asked

    def preemption(self) -> object | None:
        return None

    def has_room(self) -> bool:
        return False


class Kept:
    """Remembers at which steps the parameters were kept."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def save(self, step: int) -> None:
        self.steps.append(step)


class Saved:
    """Remembers the checkpoints that were due, and what a stop saved; `news` is what it has to tell of each."""

    def __init__(self, every_steps: int | None = None) -> None:
        self.every_steps = every_steps
        self.memories: dict[int, LoopMemory] = {}
        self.news = SaveNews()
        self.finished_at: int | None = None

    def votes(self, step: int) -> Sequence[float]:
        return [float(step), float(self.every_steps is not None and step % self.every_steps == 0)]

    def after_step(self, step: int, sums: Sequence[float], memory: Callable[[], LoopMemory]) -> SaveNews:
        voted_at, due = sums
        assert voted_at == step
        assert self.finished_at is None
        return self._save(step, memory()) if due else SaveNews()

    def finish(self, step: int, memory: Callable[[], LoopMemory] | None) -> SaveNews:
        assert self.finished_at is None
        self.finished_at = step
        return self._save(step, memory()) if memory is not None and step not in self.memories else SaveNews()

    def _save(self, step: int, memory: LoopMemory) -> SaveNews:
        self.memories[step] = memory
        return self.news


class Figures:
    """A tracker that keeps everything."""

    def __init__(self) -> None:
        self.by_step: dict[int, dict[str, float]] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.by_step.setdefault(step, {}).update(metrics)


def plan_of(changes: dict[str, Any] | None = None, evaluated: bool = True) -> RunPlan:
    rows = Path("/rows.jsonl")
    return tiny_plan(Path("/model"), rows, changes, eval_rows=rows if evaluated else None)


def prepared_of(plan: RunPlan, total_steps: int, sequences_per_epoch: int = 8) -> PreparedRun:
    model = PreparedModel(
        folder="",
        tokenizer_folder="",
        chat_template=None,
        num_parameters=1,
        vocabulary_size=1,
        max_positions=1,
        digest="",
    )
    return PreparedRun(
        model=model,
        data=PreparedData(train=[]),
        sequences_per_epoch=sequences_per_epoch,
        total_steps=total_steps,
        learning_rate=plan.optimization.learning_rate,
    )


class World:
    """One loop and everything around it. Global batch 4, so an epoch of 8 sequences is two steps."""

    def __init__(
        self,
        total_steps: int,
        changes: dict[str, Any] | None = None,
        losses: Mapping[int, float] | None = None,
        eval_losses: Sequence[float | None] | None = None,
        saved: Saved | None = None,
        method: Method | None = None,
    ) -> None:
        self.plan = plan_of(changes)
        self.engine, self.context, self.kept, self.figures = CountingEngine(), Alone(), Kept(), Figures()
        self.evaluated_at: list[int] = []
        self._eval_losses = list(eval_losses or [])

        def evaluate(step: int) -> dict[str, float]:
            self.evaluated_at.append(step)
            loss = self._eval_losses.pop(0) if self._eval_losses else 1.0
            return {} if loss is None else {"eval_loss": loss}

        self.loop = Loop(
            self.plan,
            prepared_of(self.plan, total_steps),
            self.engine,
            method or Losses(losses or {}),
            self.context,
            trackers=self.figures,
            evaluate=evaluate,
            best=self.kept if self.plan.evaluation.early_stopping else None,
            checkpoints=saved,
        )

    def run(self) -> LoopResult:
        return self.loop.run()


def stop_in_step(world: World, step: int) -> None:
    begin = world.engine.begin_step

    def ask(learning_rate: float, done: float) -> None:
        begin(learning_rate, done)
        world.context.stop_asked = len(world.engine.rates) == step

    world.engine.begin_step = ask  # type: ignore[method-assign]


def test_every_step_passes_its_micro_batches_and_updates_once() -> None:
    world = World(3)
    result = world.run()
    assert (result.step, world.engine.num_updates, world.engine.num_backwards) == (3, 3, 6)


def test_the_logged_loss_is_the_mean_over_the_tokens_of_the_global_batch() -> None:
    world = World(2, losses={0: 2.5, 1: 2.0})
    world.run()
    assert [world.figures.by_step[step]["loss"] for step in (1, 2)] == pytest.approx([2.5, 2.0])


def test_trained_tokens_add_up_over_the_steps() -> None:
    world = World(3)
    world.run()
    assert [world.figures.by_step[step]["num_tokens"] for step in (1, 2, 3)] == [10, 20, 30]


def test_only_every_nth_step_is_logged_and_always_the_first_and_the_last() -> None:
    world = World(5, {"training.logEverySteps": 3, "data.eval": [], "training.maxSteps": 5})
    world.loop._evaluate_model = None
    world.loop._evaluated_at = []
    world.run()
    assert sorted(world.figures.by_step) == [1, 3, 5]


def test_evaluation_comes_before_the_first_step_after_each_epoch_and_at_the_end() -> None:
    world = World(5)
    world.run()
    assert world.evaluated_at == [0, 2, 4, 5]


def test_a_step_that_is_due_for_two_reasons_is_evaluated_once() -> None:
    world = World(4, {"training.evalEverySteps": 1})
    world.run()
    assert world.evaluated_at == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("total", "sequences", "batch", "ends"),
    [
        (4, 8, 4, {2, 4}),
        (3, 8, 4, {2}),
        (6, 10, 4, {3, 5}),  # 2.5 steps an epoch: the epoch is over within the third step
        (2, 2, 4, {1, 2}),
        (1, 100, 4, set()),
    ],
)
def test_an_epoch_ends_at_the_step_that_completes_it(total: int, sequences: int, batch: int, ends: set[int]) -> None:
    assert epoch_ends(total, sequences, batch) == ends


def test_a_loss_that_is_not_finite_ends_before_the_update() -> None:
    world = World(5, losses={2: math.nan})
    with pytest.raises(NonFiniteLossError, match="the loss is nan at step 3; the update was not made") as caught:
        world.run()
    assert (caught.value.step, world.engine.num_updates) == (2, 2)


def test_a_gradient_that_is_not_finite_ends_before_the_update() -> None:
    world = World(5)
    world.engine.norm = math.inf
    with pytest.raises(NonFiniteLossError, match="norm of the gradient is inf at step 1") as caught:
        world.run()
    assert (caught.value.step, world.engine.num_updates) == (0, 0)


def test_the_learning_rate_follows_the_schedule() -> None:
    world = World(4, {"training.schedule": "linear", "training.warmupFraction": 0.0, "training.learningRate": 0.1})
    world.run()
    assert world.engine.rates == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert world.engine.done == [0.0, 0.25, 0.5, 0.75]


def test_a_stop_request_ends_after_the_step_and_says_so() -> None:
    world = World(10)
    world.context.stop_asked = True
    result = world.run()
    assert (result.cancelled, result.step, world.engine.num_updates) == (True, 0, 0)


def test_a_stop_request_during_a_step_lets_it_finish() -> None:
    world = World(10)
    stop_in_step(world, 3)
    result = world.run()
    assert (result.cancelled, result.step, world.engine.num_updates) == (True, 3, 3)


def test_a_method_that_stops_before_a_step_leaves_the_steps_that_were_done() -> None:
    saved = Saved()
    world = World(5, saved=saved)
    plain = world.loop._method.step
    world.loop._method.step = lambda step: None if step == 3 else plain(step)  # type: ignore[method-assign]
    result = world.run()
    assert (result.cancelled, result.step, world.engine.num_updates) == (True, 3, 3)
    assert len(world.engine.rates) == 3
    assert list(saved.memories) == [3]


def test_a_method_that_stops_before_its_first_step_leaves_nothing_to_save() -> None:
    saved = Saved()
    world = World(5, saved=saved)
    world.loop._method.step = lambda step: None  # type: ignore[method-assign]
    result = world.run()
    assert (result.cancelled, result.step, saved.memories) == (True, 0, {})


def test_a_step_that_is_left_out_leaves_no_figures_of_the_one_before() -> None:
    world = World(3)
    plain = world.loop._method.step
    left_out = StepBatches([], num_trained_tokens=0, num_tokens=0, is_left_out=True)
    world.loop._method.step = lambda step: left_out if step == 2 else plain(step)  # type: ignore[method-assign]
    result = world.run()
    assert (result.step, world.engine.num_updates) == (3, 2)
    assert "loss" not in result.metrics
    assert "learning_rate" in result.metrics


EARLY = {"training.earlyStopping": {"patience": 2}, "training.evalEverySteps": 1, "training.maxSteps": 10}


def test_without_improvement_training_stops_and_the_best_is_kept() -> None:
    world = World(10, EARLY, eval_losses=[9.0, 5.0, 4.0, 4.5, 4.1, 1.0])
    result = world.run()
    assert (result.step, result.stopped_early, result.best_step) == (4, True, 2)
    assert world.kept.steps == [1, 2]
    assert result.eval is not None
    assert (result.eval.loss_before, result.eval.loss_after) == (9.0, 4.0)


def test_an_evaluation_without_a_figure_is_neither_the_best_nor_a_disappointment() -> None:
    world = World(10, EARLY, eval_losses=[9.0, 5.0, None, 5.5, None, 4.0, 4.1, 4.2])
    result = world.run()
    assert (result.step, result.best_step, world.kept.steps) == (7, 5, [1, 5])


def test_a_figure_that_the_last_evaluation_could_not_give_is_not_told() -> None:
    world = World(2, {"training.evalEverySteps": 1}, eval_losses=[3.0, 1.0, None])
    result = world.run()
    assert result.eval is not None
    assert (result.eval.loss_before, result.eval.loss_after) == (3.0, None)
    assert "eval_loss" not in result.metrics


def test_a_fall_below_min_delta_does_not_count() -> None:
    changes = EARLY | {"training.earlyStopping": {"patience": 2, "minDelta": 0.5}}
    world = World(10, changes, eval_losses=[9.0, 5.0, 4.8, 4.6, 0.0])
    assert (world.run().step, world.kept.steps) == (3, [1])


def test_the_loss_before_training_is_no_candidate() -> None:
    world = World(2, EARLY | {"training.maxSteps": 2}, eval_losses=[1.0, 5.0, 4.0])
    result = world.run()
    assert (result.best_step, world.kept.steps) == (2, [1, 2])


def test_running_out_of_patience_at_the_last_step_is_not_early() -> None:
    world = World(3, EARLY | {"training.maxSteps": 3}, eval_losses=[9.0, 1.0, 2.0, 3.0])
    result = world.run()
    assert (result.step, result.stopped_early) == (3, False)


def test_without_early_stopping_the_loss_after_is_the_last_one() -> None:
    world = World(2, {"training.evalEverySteps": 1}, eval_losses=[3.0, 1.0, 2.0])
    result = world.run()
    assert result.eval is not None
    assert (result.eval.loss_before, result.eval.loss_after, result.best_step) == (3.0, 2.0, None)


def test_the_time_left_counts_evaluations_too() -> None:
    world = World(4)
    ticks = iter(range(1000))
    world.loop._clock = lambda: float(next(ticks))  # every step and every evaluation takes a second
    world.run()
    left = [report["eta_seconds"] for report in world.context.reports if "eta_seconds" in report]
    assert left[-1] == 0.0
    first_step = next(r for r in world.context.reports if r.get("step") == 1)
    assert first_step["eta_seconds"] == pytest.approx(3 + 2)  # three steps, evaluations at 2 and 4


def test_progress_says_how_far_and_how_fast() -> None:
    world = World(4)
    world.run()
    last = world.context.reports[-1]
    assert (last["step"], last["total_steps"], last["percent"], last["epoch"]) == (4, 4, 100.0, 2.0)
    assert last["tokens_per_second"] > 0


def stopped_at(world: World, step: int) -> World:
    """A stop is asked for during this step."""
    begin = world.engine.begin_step

    def ask(learning_rate: float, done: float) -> None:
        begin(learning_rate, done)
        world.context.stop_asked = len(world.engine.rates) == step

    world.engine.begin_step = ask  # type: ignore[method-assign]
    return world


def test_a_checkpoint_is_made_every_n_steps() -> None:
    saved = Saved(every_steps=2)
    World(5, saved=saved).run()
    assert list(saved.memories) == [2, 4]


def test_a_stop_makes_a_checkpoint_of_the_steps_that_none_has() -> None:
    often, seldom = Saved(every_steps=1), Saved()
    stopped_at(World(9, saved=often), 3).run()
    stopped_at(World(9, saved=seldom), 3).run()
    assert (list(often.memories), list(seldom.memories)) == ([1, 2, 3], [3])


def test_a_stop_before_the_first_step_saves_nothing() -> None:
    saved = Saved()
    world = World(9, saved=saved)
    world.context.stop_asked = True
    world.run()
    assert saved.memories == {}


def test_a_loop_that_goes_on_makes_only_the_steps_that_are_left() -> None:
    world = World(5)
    world.loop.resume(3, LoopMemory(num_trained_tokens=30, evaluated=True))
    result = world.run()
    assert (result.step, world.engine.num_updates, world.evaluated_at) == (5, 2, [4, 5])
    assert [world.figures.by_step[step]["num_tokens"] for step in (4, 5)] == [40, 50]
    assert {report["resumed_from_step"] for report in world.context.reports} == {3}


def test_an_evaluation_that_the_stop_came_before_is_made_up_for() -> None:
    saved = Saved()
    stopped_at(World(5, saved=saved), 2).run()
    assert not saved.memories[2].evaluated
    world = World(5)
    world.loop.resume(2, saved.memories[2])
    world.run()
    assert world.evaluated_at == [2, 4, 5]


def test_a_figure_that_is_missing_among_the_newest_is_remembered_also_after_going_on() -> None:
    saved = Saved(every_steps=1)
    stopped_at(World(5, eval_losses=[1.0, None], saved=saved), 3).run()
    assert "eval_loss" in saved.memories[1].metrics
    assert "eval_loss" not in saved.memories[3].metrics
    assert {"eval_loss", "loss"} <= set(saved.memories[3].seen_metrics)
    rest = Saved(every_steps=1)
    world = World(5, eval_losses=[None], saved=rest)
    world.loop.resume(3, saved.memories[3])
    world.run()
    assert "eval_loss" not in rest.memories[4].metrics
    assert "eval_loss" in rest.memories[4].seen_metrics


def test_patience_and_the_best_step_survive_a_checkpoint() -> None:
    saved = Saved(every_steps=3)
    stopped_at(World(10, EARLY, eval_losses=[9.0, 5.0, 4.0, 4.5, 4.1], saved=saved), 4).run()
    world = World(10, EARLY, eval_losses=[4.1, 1.0])
    world.loop.resume(3, saved.memories[3])
    result = world.run()
    assert (result.step, result.stopped_early, result.best_step) == (4, True, 2)
    assert result.eval is not None
    assert (result.eval.loss_before, result.eval.loss_after) == (9.0, 4.0)


def test_a_checkpoint_that_failed_is_told() -> None:
    saved = Saved(every_steps=2)
    saved.news = SaveNews(failure="no space")
    world = stopped_at(World(9, saved=saved), 3)
    world.run()
    assert list(saved.memories) == [2, 3]
    assert [report["message"] for report in world.context.reports if report.get("message")] == ["no space"] * 2
    assert not any(report.get("checkpoint") for report in world.context.reports)
    assert world.context.reports[-1]["save_failure"] == "no space"


def test_a_checkpoint_that_is_whole_is_in_every_later_report() -> None:
    saved = Saved(every_steps=2)
    whole = SavedCheckpoint(uri="file:///c", step=2, saved_at=datetime(2026, 1, 1, tzinfo=UTC), world_size=1, bytes=9)
    saved.news = SaveNews(whole)
    world = World(3, saved=saved)
    world.run()
    told = [report for report in world.context.reports if report.get("checkpoint") and "phase" not in report]
    assert [report["step"] for report in told] == [2, 3, 3, 3]
    assert {report["checkpoint"].step for report in told} == {2}
    assert {report["save_failure"] for report in told} == {None}


def test_while_a_checkpoint_is_made_the_last_report_says_so_and_afterwards_no_longer() -> None:
    saved = Saved(every_steps=2)
    world = World(5, saved=saved)
    world.run()
    phases = [(report["step"], report.get("phase")) for report in world.context.reports if report.get("step")]
    for step in saved.memories:
        place = phases.index((step, "save"))
        assert phases[place + 1] == (step, None)
    assert phases[-1] == (5, "save"), "the end waits for what is being written"


@pytest.mark.parametrize("total_steps", [4, 5])
def test_the_end_of_training_waits_for_what_is_being_written_and_saves_no_more(total_steps: int) -> None:
    saved = Saved(every_steps=2)
    World(total_steps, saved=saved).run()
    assert (list(saved.memories), saved.finished_at) == ([2, 4], total_steps)


def test_whatever_is_kept_was_confirmed_and_once_is_enough() -> None:
    method, saved = Doubtful(last=6), Saved(every_steps=3)
    World(6, {"training.maxSteps": 6}, saved=saved, method=method).run()
    assert method.asked == [3, 6]
    assert sorted(saved.memories) == [3, 6]


def test_a_checkpoint_is_not_made_of_what_is_not_confirmed() -> None:
    saved = Saved(every_steps=1)
    with pytest.raises(KLDivergedError):
        World(6, {"training.maxSteps": 6}, saved=saved, method=Doubtful(last=2)).run()
    assert sorted(saved.memories) == [1, 2]


def test_a_stop_saves_nothing_that_is_not_confirmed() -> None:
    saved = Saved()
    world = World(6, {"training.maxSteps": 6}, saved=saved, method=Doubtful(last=0))
    stop_in_step(world, 2)
    with pytest.raises(KLDivergedError):
        world.run()
    assert not saved.memories


def test_what_is_not_confirmed_is_never_the_best() -> None:
    world = World(10, EARLY, eval_losses=[9.0, 5.0, 4.0], method=Doubtful(last=1))
    with pytest.raises(KLDivergedError):
        world.run()
    assert world.kept.steps == [1]


def test_what_is_not_confirmed_ends_no_training_well() -> None:
    with pytest.raises(KLDivergedError):
        World(6, {"training.maxSteps": 6}, method=Doubtful(last=5)).run()


def test_what_comes_after_the_best_is_kept_nowhere_and_not_confirmed() -> None:
    world = World(10, EARLY, eval_losses=[9.0, 5.0, 6.0, 7.0], method=Doubtful(last=1))
    result = world.run()
    assert (result.stopped_early, result.best_step, result.step) == (True, 1, 3)


def test_a_stop_without_checkpoints_keeps_nothing_and_asks_nothing() -> None:
    method = Doubtful(last=0)
    world = World(6, {"training.maxSteps": 6}, method=method)
    stop_in_step(world, 2)
    assert world.run().cancelled
    assert not method.asked


def test_what_was_gone_on_from_is_not_confirmed_anew() -> None:
    method = Doubtful(last=6)
    world = World(6, {"training.maxSteps": 6}, saved=Saved(), method=method)
    world.loop.resume(6, LoopMemory(evaluated=True))
    world.run()
    assert not method.asked
