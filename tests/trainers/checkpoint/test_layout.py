"""Names say what they name, and nothing else is taken for one of ours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.layout import CheckpointId

ids = st.builds(CheckpointId, epoch=st.integers(0, 10**7), step=st.integers(0, 10**12))
ID = CheckpointId(epoch=3, step=200)


def test_a_checkpoint_is_named_by_step_and_attempt() -> None:
    assert str(ID) == "0000000200-e00003"
    assert layout.shard(ID, 7) == "ckpt/0000000200-e00003/shard-00007-000.safetensors"


@given(ids)
def test_a_name_is_read_back(checkpoint: CheckpointId) -> None:
    assert CheckpointId.parse(str(checkpoint)) == checkpoint
    for name in (layout.manifest(checkpoint), layout.shard(checkpoint, 2), layout.aux(checkpoint, 2, "rng", "json")):
        assert layout.checkpoint_of(name) == checkpoint
    assert layout.pinned(layout.pin(checkpoint)) == checkpoint
    assert layout.epoch_of(layout.fence(checkpoint.epoch)) == checkpoint.epoch
    assert layout.rank_of_receipt(layout.receipt(checkpoint, checkpoint.epoch)) == checkpoint.epoch


@pytest.mark.parametrize(
    "text", ["200-e3", "0000000200", "0000000200-e00003x", "00000000200-e00003", "", "-1-e00001", "٠٠٠٠٠٠٠٠٠٠-e00001"]
)
def test_what_is_not_the_name_of_a_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a checkpoint"):
        CheckpointId.parse(text)


@pytest.mark.parametrize(
    "name", ["ckpt/notes.txt", "ckpt/junk/MANIFEST.json", "HEAD.json", "other/0000000200-e00003/x"]
)
def test_a_file_elsewhere_belongs_to_no_checkpoint(name: str) -> None:
    assert layout.checkpoint_of(name) is None
    assert layout.pinned(name) is None
    assert layout.epoch_of(name) is None
    assert layout.rank_of_receipt(name) is None


def test_the_newest_is_of_the_latest_attempt_and_then_of_the_highest_step() -> None:
    went_back = CheckpointId(epoch=4, step=150)
    assert max(CheckpointId(3, 100), CheckpointId(3, 200), went_back) == went_back


@given(st.lists(st.integers(0, 10**9), min_size=2))
def test_a_plain_listing_is_in_the_order_of_steps(steps: list[int]) -> None:
    names = [str(CheckpointId(1, step)) for step in steps]
    assert sorted(names) == [str(CheckpointId(1, step)) for step in sorted(steps)]


@pytest.mark.parametrize(("name", "suffix"), [("../rng", "json"), ("RNG", "json"), ("rng", "pkl"), ("", "json")])
def test_an_auxiliary_file_has_a_plain_name(name: str, suffix: str) -> None:
    with pytest.raises(ValueError, match="cannot name an auxiliary file"):
        layout.aux(ID, 0, name, suffix)
