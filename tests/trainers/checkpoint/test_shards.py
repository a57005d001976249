"""A shard is a safetensors file that others can open, and every byte of it follows from a list and the data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from finetune_trainers.checkpoint.manifest import TensorRecord
from finetune_trainers.checkpoint.shards import (
    CHUNK_BYTES,
    DIGEST_BYTES,
    ShardPlan,
    Slice,
    chunk_digests,
    digest_of_digests,
    num_chunks,
    shared_out,
)
from finetune_trainers.checkpoint.slices import tiling_faults
from tests.trainers.checkpoint import synthetic


def written(path: Path, rank: int) -> ShardPlan:
    intent = synthetic.intent()
    held = synthetic.slices(intent, rank)
    plan = ShardPlan.of(intent, rank, held)
    data = list(synthetic.data(intent, held))
    tables = b"".join(chunk_digests(piece, CHUNK_BYTES) for piece in data)
    path.write_bytes(plan.header + b"".join(data) + tables)
    return plan


def test_any_reader_of_safetensors_opens_a_shard(tmp_path: Path) -> None:
    plan = written(tmp_path / "shard", rank=1)
    assert (tmp_path / "shard").stat().st_size == plan.bytes
    with safe_open(tmp_path / "shard", framework="np") as opened:
        assert opened.metadata() == {"format": "finetune-operator.io/shard", "step": "10", "epoch": "1", "rank": "1"}
        start, end = 2080, 4160
        proj = opened.get_tensor(f"model/proj/exp_avg[{start}:{end}]")
        expected = synthetic.whole(synthetic.intent(), 4, "exp_avg")[start:end]
        assert np.array_equal(proj.view(np.uint32), expected)
        assert opened.get_tensor("__digests__").shape == (len(plan.slices), DIGEST_BYTES)


def test_data_begins_at_a_page_and_elements_are_aligned() -> None:
    intent = synthetic.intent()
    plan = ShardPlan.of(intent, 0, synthetic.slices(intent, 0))
    assert plan.offsets[0] == len(plan.header)
    assert len(plan.header) % 4096 == 0
    assert all(
        offset % 4 == 0 for offset, piece in zip(plan.offsets, plan.slices, strict=True) if piece.state != "value"
    )


def test_small_elements_before_large_ones_are_refused() -> None:
    intent = synthetic.intent()
    with pytest.raises(ValueError, match="slices with larger elements must come first"):
        ShardPlan.of(intent, 0, list(reversed(synthetic.slices(intent, 0))))


def test_a_rank_that_holds_nothing_still_writes_a_shard(tmp_path: Path) -> None:
    plan = ShardPlan.of(synthetic.intent(), 1, [])
    (tmp_path / "shard").write_bytes(plan.header)
    with safe_open(tmp_path / "shard", framework="np") as opened:
        assert opened.get_tensor("__digests__").shape == (0, DIGEST_BYTES)
    assert plan.record("shard", []).extents == ()


def test_digests_are_over_chunks_from_the_slices_start() -> None:
    data = memoryview(bytes(range(256)) * 20)
    digests = chunk_digests(data, 4096)
    assert num_chunks(len(data), 4096) == 2
    assert digests == blake3(data[:4096]).digest() + blake3(data[4096:]).digest()
    assert digest_of_digests(digests) == blake3(digests).hexdigest()


@given(st.lists(st.integers(0, 9000), max_size=8), st.integers(1, 5), st.sampled_from(["F32", "BF16"]))
def test_slices_are_shared_out_in_order_over_files_that_are_not_too_long(
    lengths: list[int], chunks: int, dtype: str
) -> None:
    states = {"x": dtype}
    tensors = tuple(TensorRecord(name=f"t{n}", shape=(length,), states=states) for n, length in enumerate(lengths))
    intent = synthetic.intent(tensors=tensors)
    held = [Slice(n, "x", 0, length) for n, length in enumerate(lengths) if length]
    files = shared_out(intent, held, chunks * 4096, 4096)
    item = 4 if dtype == "F32" else 2
    for file in files:
        assert sum(piece.end - piece.start for piece in file) * item <= chunks * 4096
    pieces = [(piece.tensor, piece.start, piece.end) for file in files for piece in file]
    assert pieces == sorted(pieces)
    assert tiling_faults(dict(enumerate(lengths)), pieces) == []
    assert all(start * item % 4096 == 0 for _, start, _ in pieces), "cut between chunks"


def test_what_fits_into_one_file_is_not_cut() -> None:
    intent = synthetic.intent()
    held = synthetic.slices(intent, 0)
    assert shared_out(intent, held, 1 << 20, 4096) == [held]


def test_a_header_of_many_tensors_stays_small() -> None:
    tensors = tuple(TensorRecord(name=f"layer.{n}", shape=(4,), states={"param": "F32"}) for n in range(1000))
    intent = synthetic.intent(world=1, tensors=tensors)
    plan = ShardPlan.of(intent, 0, [Slice(n, "param", 0, 4) for n in range(1000)])
    assert len(plan.header) < 100 * 1000
