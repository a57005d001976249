"""Answers by the trained weights: the same as transformers', and the same whatever shares the batch."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finetune_trainers.attention import forward_kwargs
from finetune_trainers.data.batches import Batch
from finetune_trainers.engine import checkpoint_activations
from finetune_trainers.lean_peft import peft
from finetune_trainers.rollout import Completion, Request, Sampling, row_cache
from finetune_trainers.rollout import in_process as in_process_module
from tests.trainers.foreign_warnings import PEFT_ASKS_TRANSFORMERS
from tests.trainers.rollout.writers import GREEDY, PROMPTS, engine_for, greedy_by_transformers, policy, requests_for
from tests.trainers.tiny import VOCABULARY

# PEFT and we ask transformers by names that are going to change
pytestmark = PEFT_ASKS_TRANSFORMERS

DRAWN = Sampling(max_new_tokens=20, temperature=0.9, top_p=0.95, top_k=200)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return policy(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def model(shared: Any) -> Any:
    return copy.deepcopy(shared).train()


def frequent_tokens(model: Any, count: int) -> list[int]:
    """Tokens of greedy answers, so that some answers end early and others do not."""
    answers = greedy_by_transformers(model, PROMPTS)
    seen = Counter(token for answer in answers for token in set(answer.ids))
    some = [token for token, in_answers in seen.items() if 1 < in_answers < len(PROMPTS)]
    assert len(some) >= count
    return some[:count]


@pytest.mark.parametrize("batch_size", [1, 3, 4, 32])
def test_greedy_answers_are_those_of_transformers_for_every_row(model: Any, batch_size: int) -> None:
    end_ids = frequent_tokens(model, 3)
    wanted = greedy_by_transformers(model, PROMPTS, end_ids)
    assert {answer.ended for answer in wanted} == {True, False}
    assert len({len(answer.ids) for answer in wanted}) > 2
    found = engine_for(model, end_ids, batch_size=batch_size).generate(requests_for(PROMPTS), GREEDY)
    assert [(answer.ids, answer.ended) for answer in found] == [(answer.ids, answer.ended) for answer in wanted]
    assert all(len(answer.log_probs) == len(answer.ids) for answer in found)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        pytest.param("Mistral", {"sliding_window": 8}, id="a window that is shorter than the prompts"),
        pytest.param(
            "Gemma2", {"sliding_window": 8, "head_dim": 8}, id="capped scores, and a window in half of the layers"
        ),
        pytest.param("Qwen2", {}, id="biases"),
        pytest.param("GPT2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}, id="learned positions"),
    ],
)
def test_other_architectures_write_what_transformers_has_them_write(
    architecture: str, config: dict[str, Any], tmp_path: Path
) -> None:
    module = policy(tmp_path, architecture, **config)
    wanted = greedy_by_transformers(module, PROMPTS)
    found = engine_for(module).generate(requests_for(PROMPTS), GREEDY)
    assert [answer.ids for answer in found] == [answer.ids for answer in wanted]


def assert_same(found: list[Completion], wanted: list[Completion]) -> None:
    assert [(answer.ids, answer.ended) for answer in found] == [(answer.ids, answer.ended) for answer in wanted]
    for one, other in zip(found, wanted, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)


def test_the_answer_of_a_seed_depends_on_nothing_that_shares_its_batch(model: Any) -> None:
    end_ids = list(range(10, 30))
    requests = requests_for([*PROMPTS, *PROMPTS[:4], PROMPTS[0]])
    wanted = [engine_for(model, end_ids).generate([request], DRAWN)[0] for request in requests]
    assert len({tuple(answer.ids) for answer in wanted}) == len(requests), "each seed has an answer of its own"
    assert {answer.ended for answer in wanted} == {True, False}
    for batch_size in (2, 5, 64):
        assert_same(engine_for(model, end_ids, batch_size=batch_size).generate(requests, DRAWN), wanted)
    backwards = engine_for(model, end_ids).generate(requests[::-1], DRAWN)
    assert_same(backwards[::-1], wanted)


def test_equal_seeds_give_equal_answers_to_one_prompt(model: Any) -> None:
    first, second, other = engine_for(model).generate([Request(PROMPTS[3], seed) for seed in (5, 5, 6)], DRAWN)
    assert_same([first], [second])
    assert first.ids != other.ids


def packed(prompt: list[int], answer: list[int]) -> Batch:
    ids = prompt + answer
    labels = [-100] * (len(prompt) - 1) + answer + [-100]
    return Batch(
        input_ids=torch.tensor([ids]),
        labels=torch.tensor([labels]),
        position_ids=torch.arange(len(ids))[None],
        cu_seqlens=torch.tensor([0, len(ids)], dtype=torch.int32),
        max_seqlen=len(ids),
        num_trained_tokens=len(answer),
    )


@pytest.mark.parametrize("temperature", [0.0, 0.6, 1.0])
def test_log_probabilities_are_those_of_a_packed_pass_over_the_answer(model: Any, temperature: float) -> None:
    sampling = Sampling(max_new_tokens=16, temperature=temperature, top_p=0.8)
    answers = engine_for(model, list(range(10, 25))).generate(requests_for(PROMPTS), sampling)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        batch = packed(prompt, answer.ids)
        with torch.no_grad():
            logits = model.eval()(input_ids=batch.input_ids, **forward_kwargs(batch)).logits[0]
        log_probs = torch.log_softmax(logits / (temperature or 1.0), dim=-1)
        wanted = log_probs.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(answer.log_probs), wanted, atol=1e-5, rtol=0)


def test_an_answer_ends_with_its_end_token_or_is_cut(model: Any) -> None:
    end_ids = set(range(3, 60))
    sampling = Sampling(max_new_tokens=6, temperature=1.5)
    answers = engine_for(model, list(end_ids)).generate(requests_for(PROMPTS * 4), sampling)
    assert {answer.ended for answer in answers} == {True, False}
    for answer in answers:
        assert answer.ended == (answer.ids[-1] in end_ids)
        assert not end_ids & set(answer.ids[:-1])
        assert answer.ended or len(answer.ids) == 6
    one_each = engine_for(model).generate(requests_for(PROMPTS), Sampling(max_new_tokens=1))
    assert [len(answer.ids) for answer in one_each] == [1] * len(PROMPTS)


class Passes:
    """Shapes [rows, tokens] of the forward passes of a module, and how many positions reached its head."""

    def __init__(self, module: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        self.head_positions: set[int] = set()
        module.get_input_embeddings().register_forward_hook(self._embedded)
        module.lm_head.register_forward_hook(self._scored)

    def _embedded(self, _module: nn.Module, inputs: Any, _output: Any) -> None:
        rows, tokens = inputs[0].shape
        self.shapes.append((rows, tokens))

    def _scored(self, _module: nn.Module, inputs: Any, _output: Any) -> None:
        self.head_positions.add(inputs[0].shape[1])


def test_rows_that_have_ended_leave_and_prompts_that_wait_take_their_places(model: Any) -> None:
    end_ids = list(range(3, 40))
    sampling = Sampling(max_new_tokens=40)
    passes = Passes(model)
    answers = engine_for(model, end_ids, batch_size=8).generate(requests_for(PROMPTS * 3), sampling)
    entering = [shape for shape in passes.shapes if shape[1] > 1]
    steps = [rows for rows, tokens in passes.shapes if tokens == 1]
    assert passes.head_positions == {1}
    assert len(entering) > 2
    assert all(rows <= 8 for rows in steps)
    useful = sum(len(answer.ids) for answer in answers) - len(answers)  # the first token comes with the prompt
    assert useful <= sum(steps) < useful * 1.4
    in_batches_of_eight = 8 * sum(
        max(len(answer.ids) for answer in answers[start : start + 8]) for start in range(0, len(answers), 8)
    )
    assert sum(steps) < 0.7 * in_batches_of_eight, "the same answers in batches that wait for their last row"


def test_answers_that_use_up_the_room_of_the_cache_are_the_same(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = engine_for(model).generate(requests_for(PROMPTS), GREEDY)
    monkeypatch.setattr(row_cache, "ROOM", 5)
    found = engine_for(model).generate(requests_for(PROMPTS), GREEDY)
    assert [answer.ids for answer in found] == [answer.ids for answer in wanted]


def test_equal_prompts_enter_as_one(model: Any) -> None:
    passes = Passes(model)
    engine_for(model, batch_size=16).generate(requests_for([PROMPTS[4]] * 6 + [PROMPTS[1]] * 6), DRAWN)
    assert passes.shapes[0] == (2, 30)
    assert passes.shapes[1] == (12, 1)


def test_long_prompts_enter_some_at_a_time(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = engine_for(model, batch_size=16).generate(requests_for(PROMPTS), GREEDY)
    monkeypatch.setattr(in_process_module, "PROMPT_TOKENS", 60)
    passes = Passes(model)
    assert_same(engine_for(model, batch_size=16).generate(requests_for(PROMPTS), GREEDY), wanted)
    assert max(rows * tokens for rows, tokens in passes.shapes) <= 60


def test_adapters_write_the_answers_where_there_are_any(model: Any) -> None:
    base = greedy_by_transformers(model, PROMPTS)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    wanted = greedy_by_transformers(adapted, PROMPTS)
    assert [answer.ids for answer in wanted] != [answer.ids for answer in base]
    found = engine_for(adapted).generate(requests_for(PROMPTS), GREEDY)
    assert [answer.ids for answer in found] == [answer.ids for answer in wanted]


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_activations_do_not_keep_the_cache_from_working(model: Any, reentrant: bool) -> None:
    wanted = engine_for(model).generate(requests_for(PROMPTS), DRAWN)
    checkpoint_activations(model, reentrant)
    model.train()
    passes = Passes(model)
    assert engine_for(model).generate(requests_for(PROMPTS), DRAWN) == wanted
    num_prompt_tokens = sum(tokens > 1 for _, tokens in passes.shapes)
    assert num_prompt_tokens < len(passes.shapes) / 4, "after a prompt it is one token at a time"


def test_every_part_stays_in_its_mode_and_no_gradient_is_kept(model: Any) -> None:
    model.model.layers[1].eval()
    before = [part.training for part in model.modules()]
    seen: list[tuple[bool, bool]] = []
    model.lm_head.register_forward_hook(lambda part, *_: seen.append((torch.is_grad_enabled(), part.training)))
    engine_for(model).generate(requests_for(PROMPTS), DRAWN)
    assert set(seen) == {(False, False)}
    assert [part.training for part in model.modules()] == before
    assert torch.is_grad_enabled()


def test_without_requests_nothing_is_computed(model: Any) -> None:
    passes = Passes(model)
    assert engine_for(model).generate([], DRAWN) == []
    assert passes.shapes == []


def test_progress_tells_how_many_answers_are_whole(model: Any) -> None:
    told: list[tuple[int, int]] = []
    requests = requests_for(PROMPTS)
    engine_for(model, list(range(3, 60))).generate(requests, DRAWN, lambda *progress: told.append(progress))
    done = [number for number, _ in told]
    assert done == sorted(set(done))
    assert told[-1] == (len(requests), len(requests))
    assert len(told) > 2


def test_weights_that_changed_are_used_at_once(model: Any) -> None:
    engine = engine_for(model)
    before = engine.generate(requests_for(PROMPTS), GREEDY)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight[torch.randperm(VOCABULARY, generator=torch.Generator())])
    engine.update_weights()
    after = engine.generate(requests_for(PROMPTS), GREEDY)
    assert [answer.ids for answer in after] != [answer.ids for answer in before]
    assert [answer.ids for answer in after] == [answer.ids for answer in greedy_by_transformers(model, PROMPTS)]


def test_under_autocast_each_weight_is_rounded_once_and_answers_are_those_of_the_rounded_pass(model: Any) -> None:
    wanted_module = copy.deepcopy(model)
    wanted_module.forward = torch.autocast("cpu", torch.bfloat16)(wanted_module.forward)
    wanted = engine_for(wanted_module).generate(requests_for(PROMPTS), DRAWN)
    found = engine_for(wanted_module, autocast=torch.bfloat16).generate(requests_for(PROMPTS), DRAWN)
    assert found == wanted
    assert not torch.is_autocast_enabled("cpu")
    exact = engine_for(model).generate(requests_for(PROMPTS), DRAWN)
    assert found[0].log_probs[0] != exact[0].log_probs[0]
    assert found[0].log_probs[0] == pytest.approx(exact[0].log_probs[0], abs=0.5)


def test_a_device_without_memory_for_so_many_rows_writes_the_same_answers_fewer_at_a_time(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = engine_for(model, batch_size=16).generate(requests_for(PROMPTS), DRAWN)
    engine, tried = engine_for(model, batch_size=16), []
    forward = engine._forward

    def limited(ids: Any, paddings: Any, cache: Any) -> torch.Tensor:
        tried.append(len(ids))
        if len(ids) > most:
            raise torch.OutOfMemoryError("no room")
        return forward(ids, paddings, cache)

    monkeypatch.setattr(engine, "_forward", limited)
    most = 3
    assert_same(engine.generate(requests_for(PROMPTS), DRAWN), wanted)
    tried.clear()
    assert_same(engine.generate(requests_for(PROMPTS), DRAWN), wanted)
    assert max(tried) == 2, "what there is no room for is not tried at each call"
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        engine.generate(requests_for(PROMPTS), DRAWN)


@pytest.mark.parametrize("sampling", [DRAWN, Sampling(max_new_tokens=8, temperature=0.0, num_beams=2)])
def test_answers_that_are_whole_when_the_device_has_no_more_room_are_kept(
    model: Any, sampling: Sampling, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts enter some at a time, and the device has room until the last of them enters."""
    requests = requests_for(PROMPTS)
    wanted = engine_for(model, batch_size=4).generate(requests, sampling)
    engine, written, told = engine_for(model, batch_size=4), [], []
    forward = engine._forward

    def limited(ids: Any, paddings: Any, cache: Any) -> torch.Tensor:
        prompts = [tuple(row[padding:]) for row, padding in zip(ids, paddings, strict=True)]
        if cache.get_seq_length() == 0:
            if tuple(PROMPTS[2]) in prompts and len(ids) > 1:  # the shortest
                raise torch.OutOfMemoryError("no room")
            written.extend(prompts)
        return forward(ids, paddings, cache)

    monkeypatch.setattr(engine, "_forward", limited)
    assert_same(engine.generate(requests, sampling, lambda done, _: told.append(done)), wanted)
    assert written.count(tuple(PROMPTS[4])) == 1, "the longest was whole"
    assert told == sorted(told)
    assert told[-1] == len(requests)


@pytest.mark.parametrize(("most_tokens", "rows"), [(None, 8), (4 * 50, 4), (4 * 50 - 1, 3), (49, 1)])
def test_rows_are_as_many_as_there_are_tokens_for(
    model: Any, most_tokens: int | None, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest prompt has 30, and each answer may have 20."""
    assert max(map(len, PROMPTS)) + DRAWN.max_new_tokens == 50
    engine, seen = engine_for(model, batch_size=8, most_tokens=most_tokens), []
    forward = engine._forward

    def noted(ids: Any, paddings: Any, cache: Any) -> torch.Tensor:
        seen.append(len(ids))
        return forward(ids, paddings, cache)

    monkeypatch.setattr(engine, "_forward", noted)
    engine.generate(requests_for(PROMPTS), DRAWN)
    assert max(seen) == rows
