"""What PPO and GRPO have in common: an iteration, and the optimizer steps that learn from it.

    ask         the next prompts of the stream
    write       rollouts, shared out over the ranks, then known to all of them
    score       their rewards
    judge       what policy, reference and critic say of every token
    weigh       advantages: the part in which the methods differ
    learn       miniBatches × passes optimizer steps

All of it happens when the loop asks for the first step of an iteration. With a `maxStaleness` of 1 the next prompts are
asked before the policy learns, and their rollouts, written meanwhile by weights of one iteration before, are waited for
in the next iteration. They are no part of a checkpoint: whoever goes on from one asks these prompts anew.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from finetune_api.plan import BatchPlan
from finetune_api.progress import Lesson, RolloutGap, Stage
from finetune_api.spec import OnlineMethod, reward_names
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.batches import StepBatches
from finetune_trainers.data.questions import Question, Questions
from finetune_trainers.errors import DataError, KLDivergedError, NonFiniteLossError
from finetune_trainers.evaluation import evaluating
from finetune_trainers.methods import Method
from finetune_trainers.online.correction import GAP, corrections
from finetune_trainers.online.episodes import (
    Experience,
    Rollout,
    Said,
    dealt,
    in_forward_passes,
    own_parts,
    packed,
    shuffled,
)
from finetune_trainers.online.memory import give_back
from finetune_trainers.online.models import Models
from finetune_trainers.rewards import Fault, Rewards
from finetune_trainers.rl.rewards import penalise_missing_eos
from finetune_trainers.rollout import AheadEngine, Completion, Request, RolloutEngine, Sampling
from finetune_trainers.rollout.sampling import seed_of

__all__ = ["Asked", "Judged", "Online", "Parts"]

_log = logging.getLogger(__name__)
_OTHERS = "other workers"
_LONGEST_ROLE = 200
_AFTER = "after {} steps. Lower spec.training.learningRate, or set spec.training.precision to bf16 or fp32"
_POOR_ITERATIONS = 3
"""That teach nothing, one after the other, before anybody is told: one or two are chance."""
_SAME = 1e-8
"""Rewards are no farther apart; rounding may leave a little."""
_SAMPLES = 16
"""Answers of an evaluation that are kept for people to read."""


class Asked(NamedTuple):
    """Which models an iteration asks about its tokens, beside the reward."""

    policy: bool
    reference: bool
    critic: bool


class Judged(NamedTuple):
    """What models say of an answer's tokens: fp32 [n] each, on the CPU; None where they were not asked."""

    log_probs: Tensor | None
    reference: Tensor | None
    values: Tensor | None


@dataclass(frozen=True)
class Parts:
    """What a method is made of, on one rank."""

    models: Models
    engine: RolloutEngine
    is_exact: bool
    """What the engine says of its tokens the policy would say too, up to rounding in fp32: it need not be asked."""
    rewards: Rewards
    questions: Questions
    """The training prompts, an endless stream."""
    num_iterations: int
    """Of the whole run."""
    eval_questions: Sequence[Question]
    tokenizer: PreTrainedTokenizerBase
    batch: BatchPlan
    seed: int
    context: WorkerContext


T = TypeVar("T")

Asking = tuple[Question, int, int]
"""A prompt, its place in the stream, and which of its answers is wanted."""


class _StoppedError(Exception):
    """A stop was asked for before anything of an iteration was learned."""


@dataclass(frozen=True)
class _Iteration:
    number: int
    rollouts: list[Rollout]
    """Empty: no answer could be given a reward, and there is nothing to learn."""
    said: list[Said]
    figures: dict[str, float]


class Online(Method):
    """A method of which `weigh`, `loss` and `_figures` are left to be said."""

    def __init__(self, settings: OnlineMethod, parts: Parts, asked: Asked) -> None:
        self._settings, self._parts, self._asked = settings, parts, asked
        self._context = parts.context
        self._sampling = Sampling(
            max_new_tokens=settings.sampling.max_new_tokens,
            temperature=settings.sampling.temperature,
            top_p=settings.sampling.top_p,
            top_k=settings.sampling.top_k,
            num_beams=settings.sampling.num_beams,
        )
        self._iteration: _Iteration | None = None
        self._learned_from: list[Rollout] = []
        """The rollouts of the newest iteration that had a step."""
        self._cursor = 0
        """Prompts of the stream that were asked."""
        self._ahead: AheadEngine | None = None
        """The engine, where it writes while the policy learns."""
        if settings.vllm is not None and settings.vllm.max_staleness:
            assert isinstance(parts.engine, AheadEngine), "it is a process of its own"
            self._ahead = parts.engine
        self._is_writing_ahead = False
        self._written_ahead: list[Completion] | None = None
        """This rank's answers to the next prompts of the stream, by weights of one iteration before."""
        self._is_left_out = False
        """Nothing is learned in this step."""
        self._num_left_out = 0
        """Such steps of this iteration so far."""
        self._seconds: dict[str, float] = {}
        self._train_began: float | None = None
        self._phase: str | None = None
        self._stage = Stage.TRAINING
        self._roles = _roles(settings, asked)
        self._troubles: set[str] = set()
        """Figures of rewards that failed or had no opinion, once they did."""
        self._samples: list[dict[str, Any]] = []
        self._gap: RolloutGap | None = None
        """Of the newest iteration, where another engine writes."""
        self._told_of_gap = False
        self._lesson: Lesson | None = None
        self._num_poor = 0
        """Iterations in a row that taught nothing, up to the newest."""

    @property
    def num_rollouts(self) -> int:
        """Of an iteration."""
        return self._parts.batch.global_batch_size * self._settings.mini_batches

    # ---- the loop's questions

    def step(self, step: int) -> StepBatches | None:
        number, within = divmod(step, self._settings.steps_per_iteration)
        if self._iteration is None or self._iteration.number != number:
            self._iteration = None  # its memory is wanted
            cursor = self._cursor
            try:
                self._iteration = self._iterate(number)
            except _StoppedError:
                self._cursor = cursor
                return None
        part, mini_batch = divmod(within, self._settings.mini_batches)
        give_back()
        self._phase = None  # told anew: the loop has reported the step before, and of no part
        self._enter("train")
        self._train_began = time.perf_counter()
        self._is_left_out = not self._iteration.rollouts or (within > 0 and self._is_to_stop())
        self._num_left_out = (self._num_left_out if within else 0) + self._is_left_out
        if self._is_left_out:
            return StepBatches([], num_trained_tokens=0, num_tokens=0, is_left_out=True)
        self._learned_from = self._iteration.rollouts
        return self._batches(self._iteration, part, mini_batch)

    def _batches(self, iteration: _Iteration, part: int, mini_batch: int) -> StepBatches:
        size = self._parts.batch.global_batch_size
        order = shuffled(len(iteration.rollouts), self._parts.seed, iteration.number, part)
        chosen = order[mini_batch * size : (mini_batch + 1) * size]
        rollouts, said = iteration.rollouts, iteration.said
        return StepBatches(
            micro_batches=[
                packed([rollouts[index] for index in mine], [said[index] for index in mine])
                for mine in own_parts(chosen, self._parts.batch, self._context.rank)
            ],
            num_trained_tokens=sum(len(rollouts[index].ids) for index in chosen),
            num_tokens=sum(rollouts[index].num_tokens for index in chosen),
            num_sequences=None if self._counts_tokens else len(chosen),
        )

    def figures(self, sums: Sequence[float]) -> dict[str, float]:
        of_iteration = self._iteration.figures if self._iteration is not None else {}
        of_step = {} if self._is_left_out else self._figures(sums)
        left_out = {"steps_left_out": float(self._num_left_out)}
        seconds = {} if self._train_began is None else {"seconds/train": time.perf_counter() - self._train_began}
        return {**of_iteration, **of_step, **left_out, **seconds}

    def confirm(self, step: int) -> None:
        """By the rollouts that were learned from last. Another policy drew them, so all words are asked about at each
        token: a ruined model would find the drawn ones unlikely, and by them alone look near to its reference."""
        if not (self._settings.kl_limit and self._learned_from):
            return
        self._enter("judge", "policy, reference")
        sums = torch.zeros(2, dtype=torch.float64, device=self._context.device)  # nats, tokens

        def add(mine: list[int], batch: Experience) -> None:
            nats = self._parts.models.distances(batch)
            sums.add_(torch.stack([nats.double().sum(), nats.new_tensor(nats.numel(), dtype=torch.float64)]))

        self._ask_models(self._learned_from, add)
        total, num_tokens = self._context.all_reduce_sum(sums).tolist()
        self._check_distance(total / max(num_tokens, 1.0), step)

    def evaluate(self, module: nn.Module) -> dict[str, float]:
        greedy = Sampling(max_new_tokens=self._sampling.max_new_tokens, temperature=0.0)
        asked = [(question, index, 0) for index, question in enumerate(self._parts.eval_questions)]
        if not asked:
            raise DataError("the evaluation data has no rows")
        with self._during(Stage.EVALUATING), self._writing():
            rollouts = self._rollouts(asked, greedy)
        self._samples = [_for_people(rollout) for rollout in rollouts[:_SAMPLES]]
        figures = {f"eval_{name}": value for name, value in self._reward_figures(rollouts).items()}
        reward = figures.get("eval_reward")
        return figures if reward is None else {"eval_loss": -reward, **figures}

    def samples(self) -> list[dict[str, Any]]:
        return self._samples

    def lasting(self) -> dict[str, Any]:
        lasting = {"rollout_gap": self._gap, "lesson": self._lesson}
        return {name: said for name, said in lasting.items() if said is not None}

    def state(self) -> dict[str, Any]:
        return {
            "cursor": self._cursor,
            "lesson": self._lesson,
            "num_poor": self._num_poor,
            "troubles": sorted(self._troubles),
            "told_of_gap": self._told_of_gap,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._cursor = int(state.get("cursor", 0))
        lesson = state.get("lesson")
        self._lesson = None if lesson is None else Lesson(lesson)
        self._num_poor = int(state.get("num_poor", 0))
        self._troubles = set(state.get("troubles", ()))
        self._told_of_gap = bool(state.get("told_of_gap", False))

    def wind_down(self) -> None:
        self._parts.engine.close()  # in the middle of writing ahead too, of which nothing will be learned

    def close(self) -> None:
        self._parts.rewards.close()
        self._parts.engine.close()

    # ---- what the methods say

    _counts_tokens = True
    """The loss is a mean over tokens; otherwise over rollouts."""

    @abstractmethod
    def _weigh(self, rollouts: list[Rollout], judged: list[Judged]) -> tuple[list[Said], dict[str, float]]:
        """What is learned from each token, and figures of the iteration. The same on every rank."""

    @abstractmethod
    def _figures(self, sums: Sequence[float]) -> dict[str, float]:
        """Of one optimizer step, of what `loss` counted."""

    def _is_to_stop(self) -> bool:
        """Whether the rest of the iteration's steps is to be left out. The same on every rank."""
        return False

    def _is_worth_learning(self, group: Sequence[Rollout]) -> bool:
        """Whether a prompt's rollouts teach anything; prompts are asked until enough do."""
        return True

    _more_rounds = 0
    """How often prompts are asked anew for want of some that are worth learning."""

    # ---- an iteration

    def _iterate(self, number: int) -> _Iteration:
        self._seconds = {}
        with self._writing():
            staleness = {} if self._ahead is None else {"staleness": float(self._written_ahead is not None)}
            rollouts, kept = self._collected()
        if self._ahead is not None and number + 1 < self._parts.num_iterations:
            self._ahead.start(self._requests(self._next_prompts(), self._sampling), self._sampling)
            self._is_writing_ahead = True
        figures = {**self._reward_figures(rollouts), **kept, **staleness}
        if "reward" not in figures:
            return _Iteration(number, [], [], figures | self._phase_seconds())
        with self._timed("judge"):
            judged = self._judged(rollouts)
        first_step = number * self._settings.steps_per_iteration
        _check_finite(judged, first_step)
        weights, gap = corrections(rollouts, [one.log_probs for one in judged])
        figures |= {**_distance(rollouts, judged), **gap}
        if "kl" in figures:
            self._check_distance(figures["kl"], first_step)
        self._tell_of_gap(figures)
        said, of_method = self._weigh(rollouts, judged)
        self._tell_of_lesson(figures | of_method)
        said = [replace(one, importance=weight) for one, weight in zip(said, weights, strict=True)]
        return _Iteration(number, rollouts, said, {**figures, **of_method, **self._phase_seconds()})

    def _reward_figures(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Means over `rollouts`, of the rewards that could be had; and the share of those that could not, from the
        first one on: a failure is seen in a curve."""
        figures: dict[str, float] = {}
        known = [rollout.reward for rollout in rollouts if not math.isnan(rollout.reward)]
        if known:
            figures = {"reward": statistics.fmean(known), "reward_std": statistics.stdev(known) if known[1:] else 0.0}
        figures |= {
            "response_length": statistics.fmean(len(rollout.ids) for rollout in rollouts),
            "cut_off": statistics.fmean(not rollout.ended for rollout in rollouts),
        }
        names = rollouts[0].opinions
        for name in names:
            said = [rollout.opinions[name] for rollout in rollouts]
            values = [one for one in said if isinstance(one, float)]
            if values and len(names) > 1:
                figures[f"reward/{name}"] = statistics.fmean(values)
            failed, silent = sum(isinstance(one, Fault) for one in said), said.count(None)
            for trouble, num in ((f"reward_errors/{name}", failed), (f"reward_no_opinion/{name}", silent)):
                if num or trouble in self._troubles:
                    self._troubles.add(trouble)
                    figures[trouble] = num / len(said)
        return figures

    def _phase_seconds(self) -> dict[str, float]:
        return {f"seconds/{phase}": value for phase, value in self._seconds.items()}

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Inside, the engine answers with the policy as it is now, what it was at being done. After it, it keeps no
        memory that it can spare, unless it is to write on."""
        engine = self._parts.engine
        if self._ahead is not None and self._is_writing_ahead:
            with self._timed("generate"):
                self._written_ahead = self._ahead.collect(self._tell_of_writing)
            self._is_writing_ahead = False
        with self._timed("sync"):
            if self._ahead is None:
                engine.wake()
            engine.update_weights()
        yield
        if self._ahead is None:
            with self._timed("sync"):
                engine.sleep()

    def _collected(self) -> tuple[list[Rollout], dict[str, float]]:
        """The rollouts of an iteration, in whole groups; and how many groups were asked for each that is kept."""
        wanted = self._num_prompts
        good: list[list[Rollout]] = []
        others: list[list[Rollout]] = []
        num_asked = 0
        for _ in range(1 + self._more_rounds):
            groups = self._groups()
            num_asked += wanted
            good += [group for group in groups if self._is_worth_learning(group)]
            others += [group for group in groups if not self._is_worth_learning(group)]
            if len(good) >= wanted:
                break
        kept = [*good, *others][:wanted]
        rollouts = [rollout for group in kept for rollout in group]
        figures = {"prompts_asked": float(num_asked)} if self._more_rounds else {}
        return rollouts, figures

    @property
    def _num_prompts(self) -> int:
        """That are asked together, as many as an iteration learns from."""
        return self.num_rollouts // self._settings.rollouts_per_prompt

    def _next_prompts(self) -> list[Asking]:
        """Of the stream, each as often as answers are wanted."""
        return [
            (self._parts.questions.at(position), position, sample)
            for position in range(self._cursor, self._cursor + self._num_prompts)
            for sample in range(self._settings.rollouts_per_prompt)
        ]

    def _groups(self) -> list[list[Rollout]]:
        """The answers to the next prompts."""
        asked, each = self._next_prompts(), self._settings.rollouts_per_prompt
        self._cursor += self._num_prompts
        written, self._written_ahead = self._written_ahead, None
        rollouts = self._rollouts(asked, self._sampling, written)
        return [rollouts[start : start + each] for start in range(0, len(rollouts), each)]

    def _dealt(self, asked: Sequence[Asking], sampling: Sampling) -> list[list[int]]:
        """Which of `asked` each rank answers."""
        prompts = [question.ids for question, _, _ in asked]
        return dealt(prompts, self._context.world_size, whole=sampling.num_beams > 1)

    def _requests(self, asked: Sequence[Asking], sampling: Sampling) -> list[Request]:
        """This rank's."""
        mine = [asked[index] for index in self._dealt(asked, sampling)[self._context.rank]]
        return [
            Request(question.ids, seed_of(self._parts.seed, place, sample), place=sample)
            for question, place, sample in mine
        ]

    def _rollouts(
        self, asked: Sequence[Asking], sampling: Sampling, written: list[Completion] | None = None
    ) -> list[Rollout]:
        """The answers in the order of `asked`; `written` are this rank's where it has them. Collective."""
        parts, completions = self._dealt(asked, sampling), written
        if completions is None:
            with self._timed("generate"):
                requests = self._requests(asked, sampling)
                completions = self._parts.engine.generate(requests, sampling, self._tell_of_writing)
        texts = [str(self._parts.tokenizer.decode(one.ids, skip_special_tokens=True)) for one in completions]
        written_here = [
            Rollout(
                question=asked[index][0],
                group=asked[index][1],
                ids=one.ids,
                ended=one.ended,
                text=text,
                reward=math.nan,  # until all are known
                opinions={},
                engine_log_probs=None if self._parts.engine.is_policy else one.log_probs,
                policy_log_probs=one.log_probs if self._parts.is_exact else None,
            )
            for index, one, text in zip(parts[self._context.rank], completions, texts, strict=True)
        ]
        with self._timed("score"):
            opinions = self._parts.rewards.score([rollout.episode for rollout in written_here])
        if self._context.world_size > 1:
            self._enter("score", _OTHERS)
        everybodys = self._gathered(
            [replace(rollout, opinions=said) for rollout, said in zip(written_here, opinions, strict=True)]
        )
        found = dict(zip(chain(*parts), chain(*everybodys), strict=True))
        return self._rewarded([found[index] for index in range(len(asked))])

    def _gathered(self, value: T) -> list[T]:
        """Every rank's. Raises _StoppedError on all ranks where one was asked to stop while an iteration is made."""
        found = self._context.all_gather_object((value, self._context.should_stop()))
        if self._stage is Stage.TRAINING and any(is_to_stop for _, is_to_stop in found):
            raise _StoppedError
        return [value for value, _ in found]

    def _rewarded(self, rollouts: list[Rollout]) -> list[Rollout]:
        """Those of all ranks, so that the same follows from the same rewards whatever the number of ranks."""
        totals = self._parts.rewards.totals(
            [rollout.episode for rollout in rollouts], [rollout.opinions for rollout in rollouts]
        )
        ended = torch.tensor([rollout.ended for rollout in rollouts])
        scores = torch.tensor(totals, dtype=torch.float64)
        rewards = penalise_missing_eos(scores, ended, self._settings.missing_eos_penalty).tolist()
        return [replace(rollout, reward=reward) for rollout, reward in zip(rollouts, rewards, strict=True)]

    def _judged(self, rollouts: list[Rollout]) -> list[Judged]:
        """What the models say of every token. Each rank asks about its part."""
        asked = self._asked._replace(policy=self._asked.policy and not self._parts.is_exact)
        if not any(asked):
            return [self._with_known(Judged(None, None, None), rollout) for rollout in rollouts]
        found: dict[int, Judged] = {}
        models = self._parts.models

        def judge(mine: list[int], batch: Experience) -> None:
            lengths = [len(rollouts[index].ids) for index in mine]
            of_policy = models.stats(batch).log_probs if asked.policy else None
            of_reference = models.reference_stats(batch).log_probs if asked.reference else None
            of_critic = models.values(batch) if asked.critic else None
            parts = zip(*(_split(said, lengths) for said in (of_policy, of_reference, of_critic)), strict=True)
            found.update({index: Judged(*part) for index, part in zip(mine, parts, strict=True)})

        self._ask_models(rollouts, judge)
        for others in self._gathered(found):
            found.update(others)
        return [self._with_known(found[index], rollout) for index, rollout in enumerate(rollouts)]

    def _ask_models(self, rollouts: Sequence[Rollout], ask: Callable[[list[int], Experience], None]) -> None:
        """Forward passes over this rank's part of `rollouts`: `ask` is given which ones, and the batch that they are.
        As many on every rank."""
        models, context = self._parts.models, self._context
        size = self._parts.batch.micro_batch_size
        with evaluating(models.policy), models.reference_at_work(), torch.no_grad():
            for mine in in_forward_passes(rollouts, context.rank, context.world_size, size):
                ask(mine, packed([rollouts[index] for index in mine]).to(context.device))

    def _with_known(self, judged: Judged, rollout: Rollout) -> Judged:
        """With what the policy said when it wrote, where it would have been asked for that."""
        if rollout.policy_log_probs is None or not self._asked.policy:
            return judged
        return judged._replace(log_probs=torch.tensor(rollout.policy_log_probs))

    def _check_distance(self, kl: float, step: int) -> None:
        """Of the model after `step` steps. Before anything is learned from it, and before it is kept."""
        limit = self._settings.kl_limit
        if not math.isfinite(kl):
            raise NonFiniteLossError(
                f"the model is {kl} nats a token from its reference {_AFTER.format(step)}", step=step
            )
        if limit and kl > limit:
            raise KLDivergedError(
                f"the model is {kl:.4g} nats a token from its reference after {step} steps, and maxKl allows"
                f" {limit:g}; what was saved was within that. Lower spec.training.learningRate, raise the"
                " coefficient of the distance, or raise maxKl",
                step=step,
            )

    def _tell_of_gap(self, figures: Mapping[str, float]) -> None:
        """In every report from now on, and once in a run by a sentence."""
        vllm = self._settings.vllm
        if vllm is None or GAP not in figures:
            return
        nats, before = figures[GAP], self._gap
        self._gap = gap = RolloutGap(nats=nats if math.isfinite(nats) else None, limit=vllm.gap_limit)
        is_first = gap.is_over and not self._told_of_gap
        self._told_of_gap |= gap.is_over
        if is_first and self._context.rank == 0:
            _log.warning(gap.sentence)
        is_news = before is None or before.is_over != gap.is_over
        message = gap.sentence if is_first else None
        self._context.report(Stage.TRAINING, urgent=is_news, message=message, **self.lasting())

    def _tell_of_lesson(self, figures: Mapping[str, float]) -> None:
        """In every report from the time that it is known; by a sentence when nothing more is learned."""
        lesson = Lesson.REWARDS_DIFFER
        spread = figures["reward_std"] if self.num_rollouts > 1 else math.inf  # one alone differs from none
        if figures.get("informative_groups", spread) < _SAME:
            lesson = Lesson.EQUAL_REWARDS
        elif figures["cut_off"] == 1:
            lesson = Lesson.ALL_CUT_OFF
        self._num_poor = 0 if lesson.teaches else self._num_poor + 1
        if 0 < self._num_poor < _POOR_ITERATIONS or lesson is self._lesson:
            return
        is_worse = not lesson.teaches and (self._lesson is None or self._lesson.teaches)
        self._lesson = lesson
        if is_worse and self._context.rank == 0:
            _log.warning(lesson.sentence)
        message = lesson.sentence if is_worse else None
        self._context.report(Stage.TRAINING, urgent=True, message=message, **self.lasting())

    def _tell_of_writing(self, num_done: int, num: int) -> None:
        if self._context.world_size == 1:  # others would wait for this one, and have not been asked
            self._gathered(None)
        role = _OTHERS if num_done == num and self._context.world_size > 1 else self._roles["generate"]
        message = f"writing rollouts: {num_done} of {num}"
        self._context.report(self._stage, urgent=num_done == num, phase="generate", role=role, message=message)

    def _enter(self, phase: str, role: str | None = None) -> None:
        """Tell what is done from now on: whoever hears nothing more knows what is stuck."""
        if role is not None or phase != self._phase:
            self._phase = phase
            self._context.report(self._stage, urgent=True, phase=phase, role=role or self._roles[phase])

    @contextmanager
    def _during(self, stage: Stage) -> Iterator[None]:
        self._stage, self._phase = stage, None
        try:
            yield
        finally:
            self._stage, self._phase = Stage.TRAINING, None

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        self._enter(phase)
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] = self._seconds.get(phase, 0.0) + time.perf_counter() - started


def _roles(settings: OnlineMethod, asked: Asked) -> dict[str, str]:
    """Who does what."""
    names = reward_names(settings.rewards)
    rewards = f"reward{'s' if len(names) > 1 else ''} {', '.join(names)}"
    models = [name for name, is_asked in asked._asdict().items() if is_asked]
    writer = "policy" if settings.vllm is None else "vLLM"
    return {
        "generate": writer,
        "score": rewards[:_LONGEST_ROLE],
        "judge": ", ".join(models) or "policy",
        "train": "policy and critic" if asked.critic else "policy",
        "sync": writer,
    }


def _check_finite(judged: Sequence[Judged], step: int) -> None:
    """Numbers that are none would be learned from, or counted, in one place or the other."""
    for name, said in zip(("policy", "reference", "critic"), zip(*judged, strict=True), strict=True):
        if any(of is not None and not of.isfinite().all() for of in said):
            raise NonFiniteLossError(
                f"what the {name} says of rollouts is no finite number {_AFTER.format(step)}", step=step
            )


def _split(said: Tensor | None, lengths: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(lengths) if said is None else torch.split(said.float().cpu(), lengths)


def _distance(rollouts: Sequence[Rollout], judged: Sequence[Judged]) -> dict[str, float]:
    """Mean of log p - log p_ref over all tokens, where both were asked: an estimate of the KL divergence."""
    totals = [
        float((one.log_probs - one.reference).double().sum())
        for one in judged
        if one.log_probs is not None and one.reference is not None
    ]
    return {"kl": math.fsum(totals) / max(sum(len(rollout.ids) for rollout in rollouts), 1)} if totals else {}


def _for_people(rollout: Rollout) -> dict[str, Any]:
    prompt = "\n".join(f"{message['role']}: {message['content']}" for message in rollout.question.messages)
    reward = rollout.reward if math.isfinite(rollout.reward) else None  # JSON has no NaN
    return {"prompt": prompt, "answer": rollout.text, "reward": reward, "ended": rollout.ended}
