"""What every worker trains and evaluates on: shapes, labels, and who gets what."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch

from finetune_api.plan import BatchPlan
from finetune_trainers.data.batches import IGNORED, Batch, StepBatches, TrainBatches, eval_batches
from finetune_trainers.data.order import TrainOrder
from finetune_trainers.prepared import PreparedData

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ROWS = [
    {"prompt": f"What is {number}?", "completion": " ".join([WORDS[number % 10]] * (1 + number % 4)) + str(number)}
    for number in range(37)
]


@pytest.fixture
def data(workshop: Any) -> PreparedData:
    workshop.write("train.jsonl", ROWS)
    workshop.write("more.jsonl", [{"text": "a" * number} for number in range(1, 60)])
    workshop.write("eval.jsonl", ROWS[:11])
    prepared: PreparedData = workshop.prepare(
        {
            "data.train": [
                {"source": "file://./train.jsonl", "weight": 2},
                {"source": "file://./more.jsonl", "weight": 0.5},
            ],
            "data.eval": [{"source": "file://./eval.jsonl"}],
            "method.sft.maxSeqLength": 100,
        }
    )
    return prepared


def batch_plan(world_size: int, micro: int = 1, global_: int = 8) -> BatchPlan:
    return BatchPlan(
        global_batch_size=global_,
        micro_batch_size=micro,
        gradient_accumulation_steps=global_ // (micro * world_size),
        world_size=world_size,
    )


def ranks(data: PreparedData, plan: BatchPlan, step: int, total: int | None = None) -> list[StepBatches]:
    order = TrainOrder(data.train, seed=1)
    return [TrainBatches(data, order, plan, 100, total, rank).step(step) for rank in range(plan.world_size)]


def documents(batch: Batch) -> list[tuple[int, ...]]:
    edges = batch.cu_seqlens.tolist()
    ids = batch.input_ids[0].tolist()
    return [tuple(ids[start:end]) for start, end in pairwise(edges)]


def all_documents(parts: list[StepBatches]) -> Counter[tuple[int, ...]]:
    return Counter(
        document
        for part in parts
        for batch in part.micro_batches
        if batch.num_trained_tokens
        for document in documents(batch)
    )


def test_labels_are_the_next_token_of_the_same_document_where_it_is_trained(data: PreparedData) -> None:
    (part,) = ranks(data, batch_plan(1, micro=4), 0)
    for batch in part.micro_batches:
        ids, labels = batch.input_ids[0].tolist(), batch.labels[0].tolist()
        edges = batch.cu_seqlens.tolist()
        assert edges[-1] == len(ids)
        for start, end in pairwise(edges):
            assert labels[end - 1] == IGNORED
            assert labels[end - 2] == ids[end - 1]  # the end-of-sequence token is inside the loss
            shifted = zip(labels[start : end - 1], ids[start + 1 : end], strict=True)
            assert all(label in (IGNORED, following) for label, following in shifted)
            assert batch.position_ids[0, start:end].tolist() == list(range(end - start))
        assert batch.max_seqlen == max(end - start for start, end in pairwise(edges))
        assert batch.num_trained_tokens == sum(label != IGNORED for label in labels)


def test_tensors_have_the_shapes_and_types_that_the_model_takes(data: PreparedData) -> None:
    (part,) = ranks(data, batch_plan(1), 0)
    batch = part.micro_batches[0]
    tokens = batch.input_ids.shape[1]
    for tensor in (batch.input_ids, batch.labels, batch.position_ids):
        assert (tensor.shape, tensor.dtype) == ((1, tokens), torch.int64)
    assert (batch.cu_seqlens.dtype, batch.cu_seqlens[0].item()) == (torch.int32, 0)
    assert batch.to(torch.device("cpu")).input_ids.tolist() == batch.input_ids.tolist()


@pytest.mark.parametrize(("world_size", "micro"), [(1, 1), (1, 8), (2, 1), (2, 2), (4, 2), (8, 1)])
def test_a_step_holds_the_same_whatever_the_number_of_workers(data: PreparedData, world_size: int, micro: int) -> None:
    for step in (0, 3, 11):
        alone = ranks(data, batch_plan(1), step)
        together = ranks(data, batch_plan(world_size, micro), step)
        assert all_documents(together) == all_documents(alone)
        assert {part.num_trained_tokens for part in together} == {alone[0].num_trained_tokens}
        assert {part.num_tokens for part in together} == {alone[0].num_tokens}


def test_the_counts_of_the_global_batch_are_those_of_its_parts(data: PreparedData) -> None:
    parts = ranks(data, batch_plan(2, 2), 1)
    batches = [batch for part in parts for batch in part.micro_batches]
    assert parts[0].num_trained_tokens == sum(batch.num_trained_tokens for batch in batches)
    assert parts[0].num_tokens == sum(batch.input_ids.shape[1] for batch in batches)


def test_accumulation_steps_and_ranks_share_out_the_slots_in_order(data: PreparedData) -> None:
    alone = ranks(data, batch_plan(1, micro=1), 2)[0].micro_batches
    first, second = ranks(data, batch_plan(2, micro=2), 2)
    in_order = [first.micro_batches[0], second.micro_batches[0], first.micro_batches[1], second.micro_batches[1]]
    assert [document for batch in in_order for document in documents(batch)] == [
        document for batch in alone for document in documents(batch)
    ]


def test_beyond_the_last_sequence_every_rank_still_takes_part(data: PreparedData) -> None:
    parts = ranks(data, batch_plan(4), step=1, total=9)
    assert [len(part.micro_batches) for part in parts] == [2] * 4
    alone = ranks(data, batch_plan(1), step=1)[0].micro_batches[0]
    assert all_documents(parts) == Counter(documents(alone))
    dummy = parts[3].micro_batches[1]
    assert (dummy.num_trained_tokens, dummy.labels.tolist()) == (0, [[IGNORED]])
    assert dummy.cu_seqlens.tolist() == [0, 1]


def test_an_epoch_sees_every_row_as_often_as_its_weight_says(data: PreparedData) -> None:
    order = TrainOrder(data.train, seed=1)
    total = order.sequences_per_epoch
    steps = -(-total // 8)
    seen: Counter[tuple[int, ...]] = Counter()
    for step in range(steps):
        seen += all_documents(ranks(data, batch_plan(1), step, total))
    in_train = [count for document, count in seen.items() if len(set(document)) > 4]
    assert sorted(in_train).count(2) >= len(ROWS)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_sees_every_row_once_in_equally_many_batches_on_every_rank(
    data: PreparedData, world_size: int
) -> None:
    batches = [list(eval_batches(data, 2, world_size, rank)) for rank in range(world_size)]
    assert len({len(own) for own in batches}) == 1
    seen = Counter(
        document for own in batches for batch in own if batch.num_trained_tokens for document in documents(batch)
    )
    assert set(seen.values()) == {1}
    assert len(seen) == 11
    assert sum(batch.num_trained_tokens for own in batches for batch in own) == data.eval[0].num_trained_tokens


def test_without_packing_a_sequence_is_a_row(workshop: Any) -> None:
    workshop.write("train.jsonl", ROWS)
    prepared = workshop.prepare({"method.sft.packing": False, "method.sft.maxSeqLength": 100})
    assert prepared.train[0].num_sequences == len(ROWS)
    (part,) = ranks(prepared, batch_plan(1, micro=4), 0)
    assert all(len(documents(batch)) == 4 for batch in part.micro_batches)
