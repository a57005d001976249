"""Evaluation against the plain formula, one document and one token at a time."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from finetune_api.spec import GenerationEval
from finetune_trainers.attention import PACKED_ATTENTION
from finetune_trainers.data.batches import IGNORED, Batch
from finetune_trainers.data.prompts import EvalPrompt
from finetune_trainers.errors import DataError, NonFiniteLossError
from finetune_trainers.evaluation import EarlyStop, evaluate, evaluate_generation

VOCABULARY = 64
END = 1
SETTINGS = GenerationEval(max_new_tokens=12)


class Ranks:
    """Threads that stand for the ranks of a group: what one contributes, all of them see."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._barrier = threading.Barrier(world_size, timeout=60)
        self._values: list[Any] = [None] * world_size

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()
        return values

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        """work(context) on every rank; the results by rank."""
        with ThreadPoolExecutor(self.world_size) as pool:
            return list(pool.map(work, [Context(self, rank) for rank in range(self.world_size)]))


class Context:
    """The part of WorkerContext that evaluation uses."""

    device = torch.device("cpu")

    def __init__(self, group: Ranks, rank: int) -> None:
        self._group, self.rank, self.world_size = group, rank, group.world_size

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.copy_(torch.stack(self._group.exchange(self.rank, tensor.clone())).sum(dim=0))

    def all_gather_object(self, value: Any) -> list[Any]:
        return self._group.exchange(self.rank, value)


@pytest.fixture
def alone() -> Any:
    return Context(Ranks(1), 0)


@pytest.fixture
def model() -> Any:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=END,
        initializer_range=0.3,  # far from uniform, so that the likeliest token is clear
    )
    config._attn_implementation = PACKED_ATTENTION
    return LlamaForCausalLM(config).train()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<end>": END} | {f"w{i}": i for i in range(2, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")


Document = tuple[list[int], int]
"""Tokens, and the position of the first one that is trained on."""

DOCUMENTS: list[Document] = [
    ([5, 9, 2, 33, 7, 1], 3),
    ([8, 8, 41, 1], 2),
    ([60, 3, 17, 22, 9, 30, 2, 11, 1], 1),
    ([4, 50, 1], 2),
]


def batch_of(*documents: Document) -> Batch:
    ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    ends = [0]
    for tokens, first_trained in documents:
        shifted = [token if i >= first_trained else IGNORED for i, token in enumerate(tokens)][1:]
        ids += tokens
        labels += [*shifted, IGNORED]
        positions += range(len(tokens))
        ends.append(len(ids))
    return Batch(
        input_ids=torch.tensor([ids]),
        labels=torch.tensor([labels]),
        position_ids=torch.tensor([positions]),
        cu_seqlens=torch.tensor(ends, dtype=torch.int32),
        max_seqlen=max(len(tokens) for tokens, _ in documents),
        num_trained_tokens=sum(label != IGNORED for label in labels),
    )


EMPTY = batch_of(([0], 1))
"""One token and nothing to learn: what a rank brings when it has no more rows."""


@torch.no_grad()
def losses_and_hits(model: nn.Module, documents: list[Document]) -> tuple[list[float], list[bool]]:
    """Of every trained token: its loss, and whether it was the likeliest; each predicted from its own prefix."""
    losses, hits = [], []
    for tokens, first_trained in documents:
        for position in range(max(first_trained, 1), len(tokens)):
            logits = model(input_ids=torch.tensor([tokens[:position]])).logits[0, -1]
            losses.append(-logits.log_softmax(dim=-1)[tokens[position]].item())
            hits.append(int(logits.argmax()) == tokens[position])
    return losses, hits


# evaluate


def test_the_figures_are_means_over_trained_tokens_and_not_over_batches(model: Any, alone: Any) -> None:
    losses, hits = losses_and_hits(model, DOCUMENTS)
    batches = [
        batch_of(*DOCUMENTS[:3]),
        batch_of(DOCUMENTS[3]),
    ]  # 13 trained tokens and 1
    figures = evaluate(model, batches, alone)
    assert figures["eval_loss"] == pytest.approx(sum(losses) / len(losses), abs=1e-5)
    assert figures["eval_perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-4)
    assert figures["eval_token_accuracy"] == sum(hits) / len(hits)
    assert figures["eval_tokens"] == len(losses) == 14


def test_token_accuracy_counts_the_likeliest_token(model: Any, alone: Any) -> None:
    tokens = [5]
    for _ in range(4):  # the model's own greedy continuation, then one token that it is not
        with torch.no_grad():
            tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
    with torch.no_grad():
        likeliest = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
    document = ([*tokens, (likeliest + 1) % VOCABULARY], 1)
    assert evaluate(model, [batch_of(document)], alone)["eval_token_accuracy"] == 4 / 5


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_with_different_rows_agree_with_one_rank_that_has_all(model: Any, alone: Any, world_size: int) -> None:
    expected = evaluate(model, [batch_of(*DOCUMENTS)], alone)
    shares = [[batch_of(*DOCUMENTS[:2])], [batch_of(*DOCUMENTS[2:])], [EMPTY]]
    per_rank = Ranks(world_size).run(lambda c: evaluate(copy.deepcopy(model), shares[c.rank], c))
    for figures in per_rank:
        assert figures == pytest.approx(expected, rel=1e-5)


def test_long_answers_are_summed_in_pieces(model: Any, alone: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(model, [batch_of(*DOCUMENTS)], alone)
    monkeypatch.setattr("finetune_trainers.evaluation.LOGITS_ROWS", 3)
    assert evaluate(model, [batch_of(*DOCUMENTS)], alone) == pytest.approx(whole, rel=1e-6)


def test_evaluation_uses_no_dropout_and_leaves_every_part_in_its_mode(model: Any, alone: Any) -> None:
    model.model.layers[0].mlp = nn.Sequential(model.model.layers[0].mlp, nn.Dropout(0.5))
    model.model.layers[1].eval()  # as a frozen part may be
    before = [part.training for part in model.modules()]
    first = evaluate(model, [batch_of(*DOCUMENTS)], alone)
    assert evaluate(model, [batch_of(*DOCUMENTS)], alone) == first
    assert [part.training for part in model.modules()] == before
    assert any(before)
    assert not all(before)


def test_evaluation_keeps_no_gradients(model: Any, alone: Any) -> None:
    saw_gradients = []
    model.lm_head.register_forward_hook(lambda *_: saw_gradients.append(torch.is_grad_enabled()))
    evaluate(model, [batch_of(*DOCUMENTS)], alone)
    assert saw_gradients == [False]


def test_only_trained_positions_reach_the_head(model: Any, alone: Any) -> None:
    rows = []
    model.lm_head.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[1]))
    evaluate(model, [batch_of(DOCUMENTS[0])], alone)
    assert rows == [3]


def test_a_loss_that_is_not_finite_is_an_error_of_its_own(model: Any, alone: Any) -> None:
    nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(NonFiniteLossError, match="nan"):
        evaluate(model, [batch_of(*DOCUMENTS)], alone)


def test_a_loss_too_large_for_a_perplexity_still_has_one(model: Any, alone: Any) -> None:
    nn.init.constant_(model.lm_head.weight, 0.0)
    with torch.no_grad():
        model.lm_head.weight[3], model.lm_head.weight[4] = 1e4, -1e4
    figures = evaluate(model, [batch_of(([5, 1], 1), ([9, 1], 1), ([60, 1], 1))], alone)
    assert figures["eval_loss"] > 1000
    assert math.isfinite(figures["eval_perplexity"])


def test_nothing_to_measure_is_an_error_and_not_a_division_by_zero(model: Any, alone: Any) -> None:
    with pytest.raises(DataError, match="no row of the evaluation data"):
        evaluate(model, [EMPTY], alone)


# evaluate_generation


@torch.no_grad()
def greedy_words(model: nn.Module, prompt: list[int]) -> str:
    """The answer by the definition: no cache, no padding, one token after the other."""
    tokens = list(prompt)
    for _ in range(SETTINGS.max_new_tokens):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == END:
            break
    return " ".join(f"w{token}" for token in tokens[len(prompt) :] if token > END)


@pytest.fixture
def prompts(model: Any) -> list[EvalPrompt]:
    """More than a batch, of all lengths, in no order; every third reference is what the model will say."""
    torch.manual_seed(3)
    lengths = [3, 17, 1, 9, 24, 5, 5, 30, 2, 12, 7]
    token_ids = [torch.randint(2, VOCABULARY, (length,)).tolist() for length in lengths]
    return [
        EvalPrompt(
            prompt_ids=ids,
            reference=greedy_words(model, ids) if i % 3 == 0 else "w2 w3 w4 w5 w6",
        )
        for i, ids in enumerate(token_ids)
    ]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_answers_in_padded_batches_over_ranks_are_those_of_one_prompt_at_a_time(
    model: Any, tokenizer: Any, prompts: list[EvalPrompt], world_size: int
) -> None:
    results = Ranks(world_size).run(
        lambda c: evaluate_generation(copy.deepcopy(model), tokenizer, prompts, SETTINGS, c)
    )
    expected = [greedy_words(model, prompt.prompt_ids) for prompt in prompts]
    for metrics, samples in results:
        assert [sample["answer"] for sample in samples] == expected
        assert [sample["exact_match"] for sample in samples] == [i % 3 == 0 for i in range(len(prompts))]
        assert metrics["eval_exact_match"] == 4 / 11
        assert metrics["eval_f1"] == sum(sample["f1"] for sample in samples) / 11
        assert 0 < metrics["eval_bleu"] < 100


def test_a_sample_shows_prompt_reference_and_answer(model: Any, tokenizer: Any, alone: Any) -> None:
    _, (sample,) = evaluate_generation(model, tokenizer, [EvalPrompt([5, END, 9], "w2")], SETTINGS, alone)
    assert sample["prompt"].split() == ["w5", "<end>", "w9"]
    assert sample["reference"] == "w2"
    assert sample["answer"] == greedy_words(model, [5, END, 9])


def test_the_models_own_sampling_settings_have_no_effect(
    model: Any, tokenizer: Any, prompts: list[EvalPrompt], alone: Any
) -> None:
    model.generation_config.update(
        do_sample=True,
        temperature=5.0,
        top_k=3,
        repetition_penalty=2.0,
        no_repeat_ngram_size=1,
        num_beams=3,
    )
    _, samples = evaluate_generation(model, tokenizer, prompts, SETTINGS, alone)
    assert [sample["answer"] for sample in samples] == [greedy_words(model, p.prompt_ids) for p in prompts]


def test_an_end_token_that_only_the_model_knows_ends_the_answer_too(
    model: Any, tokenizer: Any, prompts: list[EvalPrompt], alone: Any
) -> None:
    prompt = next(p for p in prompts if len(set(greedy_words(model, p.prompt_ids).split())) > 3)
    words = greedy_words(model, prompt.prompt_ids).split()
    model.generation_config.eos_token_id = [END, int(words[2][1:])]
    _, (sample,) = evaluate_generation(model, tokenizer, [prompt], SETTINGS, alone)
    assert sample["answer"].split() == words[: words.index(words[2]) + 1]


def test_a_tokenizer_without_padding_token_is_no_obstacle(
    model: Any, tokenizer: Any, prompts: list[EvalPrompt], alone: Any
) -> None:
    tokenizer.pad_token = None
    _, samples = evaluate_generation(model, tokenizer, prompts, SETTINGS, alone)
    assert [sample["answer"] for sample in samples] == [greedy_words(model, p.prompt_ids) for p in prompts]


def test_generation_leaves_the_model_in_training_mode(model: Any, tokenizer: Any, alone: Any) -> None:
    evaluate_generation(model, tokenizer, [EvalPrompt([5], "w2")], SETTINGS, alone)
    assert all(part.training for part in model.modules())


# EarlyStop


def verdicts(losses: list[float], patience: int, min_delta: float = 0.0) -> list[str]:
    stop = EarlyStop(patience, min_delta)
    return ["".join(["+" * v.improved, "!" * v.stop]) for v in map(stop.update, losses)]


def test_training_stops_after_patience_evaluations_without_improvement() -> None:
    assert verdicts([3.0, 2.0, 2.5, 2.1, 2.0], patience=3) == ["+", "+", "", "", "!"]


def test_an_improvement_starts_the_count_again() -> None:
    assert verdicts([3.0, 3.1, 2.9, 3.0, 3.0], patience=2) == ["+", "", "+", "", "!"]


def test_a_fall_of_less_than_min_delta_is_no_improvement_and_does_not_move_the_mark() -> None:
    # Each fall is 0.06; two of them together pass the 0.1 below the mark of 1.0.
    assert verdicts([1.0, 0.94, 0.88, 0.82], patience=3, min_delta=0.1) == [
        "+",
        "",
        "+",
        "",
    ]


def test_a_loss_that_is_not_a_number_never_improves() -> None:
    assert verdicts([2.0, math.nan, math.nan], patience=2) == ["+", "", "!"]


def test_the_best_loss_is_remembered() -> None:
    stop = EarlyStop(patience=3)
    for loss in (2.0, 1.5, 1.8):
        stop.update(loss)
    assert stop.best_loss == 1.5
