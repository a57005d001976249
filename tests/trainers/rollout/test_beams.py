"""Beam search by the trained weights: what transformers finds, with the probabilities of the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from finetune_trainers.rollout import Completion, Request, Sampling
from tests.trainers.foreign_warnings import PEFT_ASKS_TRANSFORMERS
from tests.trainers.rollout.writers import PAD, PROMPTS, engine_for, policy

# PEFT and we ask transformers by names that are going to change
pytestmark = PEFT_ASKS_TRANSFORMERS

BEAMS = 4
SEARCHED = Sampling(max_new_tokens=12, temperature=0.0, num_beams=BEAMS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return policy(tmp_path_factory.mktemp("policy"))


def every_place(prompts: list[list[int]]) -> list[Request]:
    return [Request(prompt, seed=0, place=place) for prompt in prompts for place in range(BEAMS)]


def by_transformers(model: Any, prompt: list[int], end_ids: list[int]) -> list[list[int]]:
    settings = GenerationConfig(
        max_new_tokens=SEARCHED.max_new_tokens,
        num_beams=BEAMS,
        num_return_sequences=BEAMS,
        do_sample=False,
        early_stopping=True,
        pad_token_id=PAD,
        eos_token_id=end_ids or None,
        use_cache=True,
    )
    with torch.no_grad():
        found = model.eval().generate(input_ids=torch.tensor([prompt]), generation_config=settings).tolist()
    return [_upto_end(whole[len(prompt) :], end_ids) for whole in found]


def _upto_end(ids: list[int], end_ids: list[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in end_ids), None)
    return ids if end is None else ids[: end + 1]


def end_tokens(model: Any) -> list[int]:
    """Some that good answers come to: then some end early, and some do not."""
    answers = [by_transformers(model, prompt, [])[0] for prompt in PROMPTS[:4]]
    return sorted({answer[5] for answer in answers})[:2]


@pytest.mark.parametrize("batch_size", [1, 9, 64])
def test_beams_are_those_of_transformers_the_best_one_first(model: Any, batch_size: int) -> None:
    end_ids = end_tokens(model)
    found = engine_for(model, end_ids, batch_size=batch_size).generate(every_place(PROMPTS), SEARCHED)
    assert {one.ended for one in found} == {True, False}
    for number, prompt in enumerate(PROMPTS):
        answers = [one.ids for one in found[number * BEAMS : (number + 1) * BEAMS]]
        assert answers == by_transformers(model, prompt, end_ids)
    assert all(one.ended == (one.ids[-1] in end_ids) for one in found)


def test_searches_go_on_when_that_of_the_longest_prompt_is_over(model: Any) -> None:
    prompts = [PROMPTS[place] for place in (4, 1, 3, 0)]
    end_ids = sorted({answer[2] for answer in by_transformers(model, prompts[0], [])})
    found = engine_for(model, end_ids, batch_size=64).generate(every_place(prompts), SEARCHED)
    answers = [[one.ids for one in found[start : start + BEAMS]] for start in range(0, len(found), BEAMS)]
    longest = [max(map(len, some)) for some in answers]
    assert longest[0] < min(longest[1:])
    assert answers == [by_transformers(model, prompt, end_ids) for prompt in prompts]


def test_each_token_has_the_probability_that_the_policy_gives_it_at_the_temperature(model: Any) -> None:
    sampling = Sampling(max_new_tokens=8, temperature=0.7, num_beams=BEAMS)
    prompts = PROMPTS[:3]
    found = engine_for(model, end_tokens(model)).generate(every_place(prompts), sampling)
    for prompt, answers in zip(prompts, (found[i : i + BEAMS] for i in range(0, len(found), BEAMS)), strict=True):
        for one in answers:
            with torch.no_grad():
                logits = model.eval()(torch.tensor([[*prompt, *one.ids]])).logits[0, len(prompt) - 1 : -1]
            wanted = (logits / 0.7).log_softmax(-1)[range(len(one.ids)), one.ids]
            torch.testing.assert_close(torch.tensor(one.log_probs), wanted, atol=1e-4, rtol=1e-4)
        means = [sum(one.log_probs) / len(one.ids) for one in answers]
        assert means == sorted(means, reverse=True)


def test_whoever_has_a_part_of_a_group_finds_the_same_answers(model: Any) -> None:
    requests = every_place(PROMPTS[:3])
    alone: list[Completion] = engine_for(model).generate(requests, SEARCHED)
    assert engine_for(model).generate(requests[1::2], SEARCHED) == alone[1::2]
    assert len({tuple(one.ids) for one in alone[:BEAMS]}) == BEAMS


def test_progress_counts_the_answers(model: Any) -> None:
    told: list[tuple[int, int]] = []
    engine_for(model).generate(every_place(PROMPTS[:3]), SEARCHED, lambda done, total: told.append((done, total)))
    assert told[-1] == (12, 12)
    assert len(told) == 3


def test_a_longer_answer_is_preferred_as_the_length_penalty_says(model: Any, tmp_path: Path) -> None:
    end_ids = end_tokens(model)

    def length(penalty: float) -> float:
        sampling = Sampling(12, temperature=0.0, num_beams=BEAMS, length_penalty=penalty)
        found = engine_for(model, end_ids).generate([Request(prompt, 0) for prompt in PROMPTS], sampling)
        return sum(len(one.ids) for one in found) / len(found)

    assert length(-2.0) < length(4.0)
