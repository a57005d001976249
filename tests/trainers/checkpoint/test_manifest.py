"""Documents are read back as written, refused when one byte differs, and make a checkpoint only when they fit."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.assembly import assembly_faults
from finetune_trainers.checkpoint.documents import VERSION, BadDocumentError, canonical, parse, sealed
from finetune_trainers.checkpoint.manifest import (
    Abandoned,
    AuxRecord,
    Extent,
    Intent,
    Manifest,
    Receipt,
    ShardRecord,
    TensorRecord,
    parse_manifest,
)
from finetune_trainers.checkpoint.shards import ShardPlan
from tests.trainers.checkpoint import synthetic

GOLDEN = Path(__file__).parent / "golden"


def receipt(intent: Intent, rank: int) -> Receipt:
    held = synthetic.slices(intent, rank)
    plan = ShardPlan.of(intent, rank, held)
    shard = plan.record(layout.shard(intent.id, rank).rpartition("/")[2], ["a" * 64] * len(held))
    aux = AuxRecord(name="rng", file=f"aux-{rank:05d}-rng.json", bytes=2, digest="b" * 64)
    return Receipt(step=intent.step, epoch=intent.epoch, token=intent.token, rank=rank, shards=(shard,), aux=(aux,))


def manifest(world: int = 2) -> Manifest:
    intent = synthetic.intent(world=world)
    return Manifest(intent=intent, receipts=tuple(receipt(intent, rank) for rank in range(world)))


@pytest.mark.parametrize(
    "model", [synthetic.intent(), receipt(synthetic.intent(), 1), manifest(), Abandoned(epoch=2, reason="superseded")]
)
def test_a_document_is_read_back_as_it_was_written(model: Intent | Receipt | Manifest | Abandoned) -> None:
    assert parse(sealed(model), type(model)) == model
    assert sealed(parse(sealed(model), type(model))) == sealed(model)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_canonical_json_has_one_form(value: object) -> None:
    try:
        written = canonical(value)  # type: ignore[arg-type]
    except UnicodeEncodeError:
        return  # a lone surrogate, which no UTF-8 file holds
    assert canonical(json.loads(written)) == written


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"loss": float("nan")})
    with pytest.raises(ValidationError):
        synthetic.intent(metrics={"loss": float("inf")})


def test_every_changed_bit_of_a_manifest_is_noticed() -> None:
    data = bytearray(sealed(manifest(world=1)))
    for position in range(len(data)):
        for bit in (0, 5):  # bit 5 changes the case of a letter and makes a space of a NUL
            data[position] ^= 1 << bit
            with pytest.raises(BadDocumentError):
                parse_manifest(bytes(data))
            data[position] ^= 1 << bit


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_manifest_that_is_cut_off_is_noticed(keep: int) -> None:
    with pytest.raises(BadDocumentError, match="is not JSON"):
        parse_manifest(sealed(manifest())[:keep])


def edited(document: dict[str, object]) -> bytes:
    """Somebody's edit, with the digest made again."""
    document = {key: value for key, value in document.items() if key != "digest"}
    return canonical(document | {"digest": hashlib.sha256(canonical(document)).hexdigest()})  # type: ignore[arg-type]


def test_a_newer_version_is_refused_by_name() -> None:
    document = json.loads(sealed(manifest())) | {"version": VERSION + 1}
    with pytest.raises(
        BadDocumentError, match=rf"has version {VERSION + 1}; this release reads versions 1 to {VERSION}"
    ):
        parse_manifest(edited(document))


def test_one_kind_of_document_is_not_taken_for_another() -> None:
    with pytest.raises(BadDocumentError, match="is of kind 'receipt' where 'checkpoint' is expected"):
        parse_manifest(sealed(receipt(synthetic.intent(), 0)))


def test_an_unknown_key_is_refused_with_its_path() -> None:
    document = json.loads(sealed(manifest()))
    document["intent"]["world"]["pipeline"] = 2
    with pytest.raises(BadDocumentError, match=r"intent\.world\.pipeline"):
        parse_manifest(edited(document))


def test_a_manifest_cannot_point_outside_its_folder() -> None:
    for file in ("../shard.safetensors", "/etc/passwd", "a/b", ""):
        with pytest.raises(ValidationError):
            AuxRecord(name="rng", file=file, bytes=1, digest="0" * 64)


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.json")), ids=lambda file: file.name)
def test_documents_that_older_releases_wrote_are_read_for_ever(file: Path) -> None:
    read = parse_manifest(file.read_bytes())
    assert isinstance(read, Manifest)
    assert read.intent == synthetic.intent()


def test_each_version_has_a_document_kept() -> None:
    kept = {file.name for file in GOLDEN.glob("*.json")}
    assert kept == {f"manifest-v{version}.json" for version in range(1, VERSION + 1)}


def test_the_present_version_writes_what_is_kept() -> None:
    """If this fails the models have changed: count VERSION up, add an upgrade, keep a new file beside the old ones."""
    assert sealed(manifest()) == (GOLDEN / f"manifest-v{VERSION}.json").read_bytes()


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_the_receipts_of_all_ranks_make_a_checkpoint(world: int) -> None:
    whole = manifest(world)
    assert assembly_faults(whole.intent, whole.receipts) == []
    there = {source.key for source in whole.sources()}
    assert there == {key for key in synthetic.keys(whole.intent) if key.name != "empty"}


def test_a_missing_receipt_is_named_by_rank() -> None:
    whole = manifest(3)
    assert assembly_faults(whole.intent, [whole.receipts[0], whole.receipts[2]]) == ["rank 1 has no receipt"]


def with_shard(whole: Manifest, **changes: object) -> list[Receipt]:
    first, *others = whole.receipts
    shard = first.shards[0].model_copy(update=changes)
    return [first.model_copy(update={"shards": (shard,)}), *others]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"step": 9}, "receipt of rank 0: is of step 9 of attempt 1"),
        ({"epoch": 2}, "receipt of rank 0: is of step 10 of attempt 2"),
        ({"token": "other"}, "or of another attempt of that number"),
    ],
)
def test_a_receipt_of_another_save_is_refused(change: dict[str, object], fault: str) -> None:
    whole = manifest()
    receipts = [whole.receipts[0].model_copy(update=change), whole.receipts[1]]
    assert any(fault in said for said in assembly_faults(whole.intent, receipts))


def test_a_lost_slice_is_named_by_its_elements() -> None:
    whole = manifest()
    extents = whole.receipts[0].shards[0].extents
    (fault,) = assembly_faults(whole.intent, with_shard(whole, extents=extents[:-1]))
    assert fault == "model buffer value: elements [0, 5) are missing"


def test_slices_that_do_not_lie_end_to_end_are_refused() -> None:
    whole = manifest()
    first, second, *others = whole.receipts[0].shards[0].extents
    moved = (first, second._replace(offset=second.offset + 4), *others)
    faults = assembly_faults(whole.intent, with_shard(whole, extents=moved))
    assert any("does not hold its slices end to end at byte" in fault for fault in faults)


def test_a_rank_cannot_vouch_for_another_ranks_file() -> None:
    whole = manifest()
    receipts = with_shard(whole, file="shard-00001-000.safetensors")
    assert "receipt of rank 0: shard-00001-000.safetensors is not a file of this rank" in assembly_faults(
        whole.intent, receipts
    )


def test_slices_of_unknown_tensors_and_types_are_refused() -> None:
    whole = manifest()
    stray = Extent(99, "param", 0, 1, 4096, "0" * 64)
    assert "tensor 99, which is not in the intent" in str(
        assembly_faults(whole.intent, with_shard(whole, extents=(stray,)))
    )
    odd = whole.intent.model_copy(update={"tensors": (TensorRecord(name="x", shape=(1,), states={"param": "F33"}),)})
    assert "for which the intent has no type" in str(
        assembly_faults(odd, with_shard(whole, extents=(stray._replace(tensor=0),)))
    )


def test_two_tensors_of_one_name_are_refused() -> None:
    tensor = TensorRecord(name="x", shape=(0,), states={"param": "F32"})
    intent = synthetic.intent(world=1, tensors=(tensor, tensor))
    empty = Receipt(step=10, epoch=1, token="t-1", rank=0)
    assert assembly_faults(intent, [empty]) == ["two tensors have the same role and name"]
    assert assembly_faults(intent.model_copy(update={"tensors": (tensor,)}), [empty]) == []


def test_a_shard_record_says_what_lies_after_its_slices() -> None:
    whole = manifest()
    shard: ShardRecord = whole.receipts[0].shards[0]
    assert "after its digests begin" in str(
        assembly_faults(whole.intent, with_shard(whole, table_offset=shard.table_offset - 1))
    )
