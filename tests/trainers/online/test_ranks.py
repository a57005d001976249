"""What follows from rewards that fail is the same for any number of workers: what is learned, told and ends a run."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from finetune_api.plan import BatchPlan
from finetune_api.spec import Grpo as GrpoSettings
from finetune_trainers.data.questions import Question
from finetune_trainers.errors import KLDivergedError, UserError
from finetune_trainers.online.episodes import Experience, Rollout
from finetune_trainers.online.grpo import Grpo
from finetune_trainers.online.method import Parts
from finetune_trainers.rewards import Episode, Scored
from finetune_trainers.rewards.weighted import NamedScorer, WeightedRewards
from finetune_trainers.rollout import Completion, OnProgress, Request, Sampling

Outage = Callable[[str], bool]
"""Of which answers a reward knows nothing."""
SOME: Outage = lambda text: int(text) % 3 == 0  # noqa: E731
ALL: Outage = lambda text: True  # noqa: E731
NONE: Outage = lambda text: False  # noqa: E731


class Ranks:
    """Workers as threads of this process, which meet where they gather."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._boxes: list[Any] = [None] * world_size
        self.stops: Callable[[], bool] = lambda: False
        """Whether rank 0 is told to stop."""
        self.sampling: dict[str, Any] = {}
        self.asked: list[list[Request]] = [[] for _ in range(world_size)]
        """Of each rank."""

    def gather(self, rank: int, value: Any) -> list[Any]:
        self._boxes[rank] = value
        self._barrier.wait()
        found = list(self._boxes)
        self._barrier.wait()
        return found

    def each(self, do: Callable[[Grpo], Any], outage: Outage) -> list[Any]:
        """What `do` gives on every rank. An answer's reward is its own number, unless there is an outage of it."""
        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(lambda rank: do(self._method(rank, outage)), range(self.world_size)))

    def _method(self, rank: int, outage: Outage) -> Grpo:
        context = SimpleNamespace(
            rank=rank,
            world_size=self.world_size,
            device=torch.device("cpu"),
            report=lambda *stage, **figures: None,
            should_stop=lambda: rank == 0 and self.stops(),
            all_gather_object=lambda value: self.gather(rank, value),
        )
        parts = Parts(
            models=cast(Any, None),
            engine=cast(Any, Echo(self.asked[rank])),
            is_exact=False,
            rewards=WeightedRewards([NamedScorer("number", "spec.method.grpo.rewards[0]", 1.0, Numbers(outage))]),
            questions=cast(Any, SimpleNamespace(at=question)),
            num_iterations=9,
            eval_questions=[question(number) for number in range(8)],
            tokenizer=cast(Any, SimpleNamespace(decode=lambda ids, skip_special_tokens: str(ids[0]))),
            batch=BatchPlan(
                global_batch_size=8,
                micro_batch_size=8 // self.world_size,
                gradient_accumulation_steps=1,
                world_size=self.world_size,
            ),
            seed=0,
            context=cast(Any, context),
        )
        rewards = [{"metric": {"kind": "exact-match"}}]
        settings = {"maxSeqLength": 1024, "groupSize": 4, "rewards": rewards, "sampling": self.sampling}
        return Grpo(GrpoSettings.model_validate(settings), parts)


class Echo:
    """Writes one token, which follows from the seed."""

    is_policy = True

    def __init__(self, asked: list[Request]) -> None:
        self._asked = asked

    def generate(self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress) -> list[Completion]:
        self._asked += requests
        on_progress(1, len(requests))
        return [Completion([1 + request.seed % 97], [0.0], True) for request in requests]

    def update_weights(self) -> None: ...

    def sleep(self) -> None: ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


class Numbers:
    def __init__(self, outage: Outage) -> None:
        self._outage = outage

    def score(self, episodes: Sequence[Episode]) -> Scored:
        texts = [one.completion for one in episodes]
        faults = {place: "away" for place, text in enumerate(texts) if self._outage(text)}
        return Scored([None if place in faults else -float(text) for place, text in enumerate(texts)], faults)

    def close(self) -> None: ...


def question(position: int) -> Question:
    return Question([5, 6 + position], [{"role": "user", "content": str(position)}], {}, 0, position)


def learned(method: Grpo) -> tuple[list[tuple[int, float]], dict[str, float], bool]:
    """Of the first step: this rank's tokens with their advantages, figures without durations, and whether it is left
    out."""
    batches = method.step(0)
    assert batches is not None
    pairs: list[tuple[int, float]] = []
    for batch in batches.micro_batches:
        assert isinstance(batch, Experience)
        assert batch.advantages is not None
        pairs += zip(batch.labels[batch.labels >= 0].tolist(), batch.advantages.tolist(), strict=True)
    figures = method.figures([0.0] * method.num_sums)
    return pairs, {name: value for name, value in figures.items() if "seconds" not in name}, batches.is_left_out


@pytest.mark.parametrize("outage", [NONE, SOME, ALL], ids=["none", "some", "all"])
def test_two_workers_learn_what_one_learns_whatever_fails(outage: Outage) -> None:
    [one], two = (Ranks(size).each(learned, outage) for size in (1, 2))
    for _, figures, is_left_out in two:
        assert figures == one[1]
        assert is_left_out == one[2] == (outage is ALL)
    assert sorted(pair for pairs, *_ in two for pair in pairs) == sorted(one[0])
    assert len(one[0]) == (0 if outage is ALL else 8)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_each_prompt_that_is_searched_is_searched_by_one_worker(num_beams: int) -> None:
    one, two = Ranks(1), Ranks(2)
    for ranks in (one, two):
        ranks.sampling = {"numBeams": num_beams}
    [alone], shared = (ranks.each(learned, NONE) for ranks in (one, two))
    assert sorted(pair for pairs, *_ in shared for pair in pairs) == sorted(alone[0])
    prompts = [{tuple(request.prompt_ids) for request in asked} for asked in two.asked]
    assert [len(asked) for asked in two.asked] == [4, 4]
    assert len(prompts[0] & prompts[1]) == (0 if num_beams > 1 else 2)


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_evaluation_without_any_score_gives_no_figure_that_could_be_the_best(world_size: int) -> None:
    for figures in Ranks(world_size).each(lambda method: method.evaluate(nn.Identity()), ALL):
        assert not {"eval_loss", "eval_reward"} & figures.keys()
        assert figures["eval_reward_errors/number"] == 1
    for figures in Ranks(world_size).each(lambda method: method.evaluate(nn.Identity()), SOME):
        assert figures["eval_loss"] == -figures["eval_reward"] > 0
        assert 0 < figures["eval_reward_errors/number"] < 1


def test_a_reward_that_failed_before_a_checkpoint_keeps_its_curve_after_it() -> None:
    [state] = Ranks(1).each(lambda method: (method.step(0), method.state())[1], SOME)

    def goes_on(method: Grpo) -> dict[str, float]:
        method.load_state(json.loads(json.dumps(state)))
        return learned(method)[1]

    [figures] = Ranks(1).each(goes_on, NONE)
    assert figures["reward_errors/number"] == 0


@pytest.mark.parametrize("world_size", [1, 2])
def test_as_many_outages_in_a_row_end_the_run_on_every_worker(world_size: int) -> None:
    def calls_until_the_end(method: Grpo) -> int:
        for number in range(9):
            try:
                method.step(number)
            except UserError:
                return number
        return math.inf  # type: ignore[return-value]

    assert Ranks(world_size).each(calls_until_the_end, ALL) == [2] * world_size


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_stop_while_answers_are_written_leaves_every_worker_as_it_was(world_size: int) -> None:
    """Only rank 0 hears of it."""
    ranks = Ranks(world_size)

    def stopped(method: Grpo) -> tuple[Any, ...]:
        first, state = method.step(0), method.state()
        ranks.gather(method._context.rank, None)
        ranks.stops = lambda: True
        second, after = method.step(1), method.state()
        ranks.gather(method._context.rank, None)
        ranks.stops = lambda: False
        return first is not None, second, state == after, method.step(1) is not None, method.state() == after

    assert ranks.each(stopped, NONE) == [(True, None, True, True, False)] * world_size


def test_a_worker_without_others_stops_in_the_middle_of_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = Ranks(1)
    ranks.stops = lambda: True
    monkeypatch.setattr(Numbers, "score", lambda *_: pytest.fail("what is not learned from is not scored"))
    assert ranks.each(lambda method: method.step(0), NONE) == [None]


def test_an_evaluation_asks_for_the_likeliest_answers_whatever_rollouts_are_drawn_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[Sampling] = []
    generate = Echo.generate

    def noted(engine: Echo, requests: Any, sampling: Sampling, on_progress: OnProgress) -> list[Completion]:
        asked.append(sampling)
        return generate(engine, requests, sampling, on_progress)

    monkeypatch.setattr(Echo, "generate", noted)
    Ranks(1).each(lambda method: [method.step(0), method.evaluate(nn.Identity())], NONE)
    drawn, likeliest = asked
    assert drawn.temperature == 1.0
    assert likeliest == Sampling(drawn.max_new_tokens, temperature=0.0)


def test_an_evaluation_is_not_left_before_its_end() -> None:
    ranks = Ranks(2)
    ranks.stops = lambda: True
    for figures in ranks.each(lambda method: method.evaluate(nn.Identity()), NONE):
        assert figures["eval_reward"] < 0


def test_how_far_a_model_is_from_its_reference_is_measured_over_the_rollouts_of_all_ranks() -> None:
    """Each token of rank 1 is 4 nats away and no token of rank 0: whoever looked at its own alone would go on."""
    ranks = Ranks(2)

    def confirmed(method: Grpo) -> str:
        context: Any = method._context
        context.all_reduce_sum = lambda sums: sum(ranks.gather(context.rank, sums))
        far = 4.0 * context.rank
        models = SimpleNamespace(
            policy=nn.Identity(),
            reference_at_work=nullcontext,
            distances=lambda batch: torch.full((batch.num_trained_tokens,), far),
        )
        method._parts = replace(method._parts, models=cast(Any, models))
        method._settings = method._settings.model_copy(update={"max_kl": 1.5})
        answer = Rollout(question(0), 0, [7], True, "", 0.0, {})
        method._learned_from = [answer, answer]
        with pytest.raises(KLDivergedError) as caught:
            method.confirm(6)
        return str(caught.value)

    for said in ranks.each(confirmed, NONE):
        assert "2 nats a token from its reference after 6 steps, and maxKl allows 1.5" in said
