"""Two checkpoints are compared by what they say and by their values, in blocks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune_api.checkpoints import Comparison, ValueDifference
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin import comparing
from finetune_trainers.checkpoint.admin.comparing import Side, comparison
from finetune_trainers.checkpoint.commit import publish
from finetune_trainers.checkpoint.manifest import Manifest, ParamGroup, TensorRecord
from finetune_trainers.checkpoint.reading import DamagedError
from finetune_trainers.checkpoint.shards import Slice
from finetune_trainers.checkpoint.slices import even_slice
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.write import announce, write_rank
from finetune_trainers.errors import UserError
from tests.trainers.checkpoint.faulting import FaultingStorage, Schedule, SimulatedDisk
from tests.trainers.checkpoint.saving import CHUNK, SHARD, intent_of, save, start

Values = Mapping[tuple[str, str], NDArray[Any]]
TYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16", "int64": "I64", "uint8": "F8_E4M3"}


@pytest.fixture
def place() -> Storage:
    return PosixStorage("/run", SimulatedDisk())


def saved(storage: Storage, step: int, values: Values, world: int = 2) -> Manifest:
    """A checkpoint of these values, by (tensor, state); larger elements first."""
    fence = start(storage)
    names = list(dict.fromkeys(name for name, _ in values))
    tensors = tuple(
        TensorRecord(
            name=name,
            shape=next(array.shape for (other, _), array in values.items() if other == name),
            states={state: TYPES[array.dtype.name] for (other, state), array in values.items() if other == name},
        )
        for name in names
    )
    intent = intent_of(fence, step, world, tensors=tensors)
    announce(storage, intent)
    for rank in range(world):
        held = [
            Slice(names.index(name), state, *even_slice(array.size, rank, world))
            for (name, state), array in sorted(values.items(), key=lambda item: -item[1].itemsize)
        ]

        def data(piece: Slice) -> memoryview:
            flat = values[names[piece.tensor], piece.state].reshape(-1)
            return flat[piece.start : piece.end].data.cast("B")

        held = [piece for piece in held if piece.start < piece.end]
        write_rank(storage, intent, rank, held, data, {}, SHARD, CHUNK)
    return publish(storage, fence, intent.id)


def compared(storage: Storage, a: Values, b: Values, *states: str) -> Comparison:
    sides = Side(storage, saved(storage, 10, a)), Side(storage, saved(storage, 20, b, world=3))
    return comparison(*sides, states or ("param",), lambda flow: None)


def only(found: Comparison) -> ValueDifference:
    assert found.values is not None
    (value,) = found.values
    return value


def of(*numbers: float, dtype: str = "float32") -> Values:
    return {("w", "param"): np.array(numbers, dtype)}


def test_figures_are_those_of_the_whole_tensors(place: Storage) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((90, 70)).astype("float32")
    b = (a + 1e-3 * rng.standard_normal(a.shape)).astype("float32")
    b[:40] = a[:40]
    found = only(compared(place, {("w", "param"): a}, {("w", "param"): b}))
    apart = a.astype("float64") - b
    assert found.num_elements == 6300
    assert found.num_different == int((a != b).sum())
    assert found.max_abs == pytest.approx(np.abs(apart).max(), rel=1e-12)
    assert found.relative_norm == pytest.approx(np.linalg.norm(apart) / np.linalg.norm(a.astype("float64")), rel=1e-9)


def test_cutting_into_blocks_changes_no_figure(place: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    a, b = ({("w", "param"): rng.standard_normal(20_000).astype("float32")} for _ in range(2))
    whole = only(compared(place, a, b))
    monkeypatch.setattr(comparing, "_BLOCK_BYTES", CHUNK)
    schedule = Schedule()
    slow = FaultingStorage(place, schedule)
    cut = only(compared(slow, a, b))
    assert (cut.num_different, cut.max_abs) == (whole.num_different, whole.max_abs)
    assert cut.relative_norm == pytest.approx(whole.relative_norm, rel=1e-12)
    reads = [
        name.rpartition("[")[2].rstrip(")").split(", ")
        for name in schedule.names
        if "before read" in name and "[" in name
    ]
    assert max(int(end) - int(begin) for begin, end in reads) <= CHUNK


def test_the_same_values_differ_in_nothing(place: Storage) -> None:
    found = compared(place, of(1.0, math.nan), of(1.0, math.nan))
    assert (found.values, found.num_compared) == ([], 1)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param(of(0.0, 0.0), of(3.0, 4.0), (4.0, None, 0), id="from nothing there is no ratio"),
        pytest.param(of(3.0, 4.0), of(0.0, 0.0), (4.0, 1.0, 0), id="to nothing all is lost"),
        pytest.param(of(0.0), of(-0.0), (0.0, 0.0, 0), id="two zeros have different bits"),
        pytest.param(of(1.0, math.nan), of(1.5, 2.0), (0.5, 0.5, 1), id="NaN is counted apart"),
        pytest.param(of(math.inf), of(1.0), (None, None, 1), id="infinity too"),
        pytest.param(of(1.0, 4.0), of(1.5, math.nan), (0.5, 0.5, 1), id="on either side"),
        pytest.param(of(2**53 + 1, dtype="int64"), of(5, dtype="int64"), (2.0**53 - 5, 1.0, 0), id="whole numbers"),
        pytest.param(of(1.5, dtype="float16"), of(2.5, dtype="float16"), (1.0, 2 / 3, 0), id="float16"),
        pytest.param(of(0x3F80, dtype="uint16"), of(0x4000, dtype="uint16"), (1.0, 1.0, 0), id="bfloat16"),
        pytest.param(of(1, dtype="uint8"), of(2, dtype="uint8"), (None, None, 0), id="no arithmetic in 8 bits"),
    ],
)
def test_odd_values_are_compared_as_far_as_they_can_be(
    place: Storage, a: Values, b: Values, expected: tuple[float | None, float | None, int]
) -> None:
    found = only(compared(place, a, b))
    largest, relative, not_finite = expected
    assert found.num_different >= 1
    assert found.max_abs == largest
    assert found.relative_norm == (None if relative is None else pytest.approx(relative, rel=1e-6))
    assert found.num_not_finite == not_finite


def test_the_furthest_apart_comes_first(place: Storage) -> None:
    a = {("near", "param"): np.zeros(3, "float32"), ("far", "param"): np.zeros(3, "float32")}
    b = {("near", "param"): np.ones(3, "float32"), ("far", "param"): np.full(3, 9, "float32")}
    found = compared(place, a, b)
    assert found.values is not None
    assert [value.tensor for value in found.values] == ["far", "near"]


def test_only_the_states_that_are_asked_for_are_read(place: Storage) -> None:
    a = {("w", "param"): np.zeros(3, "float32"), ("w", "exp_avg"): np.zeros(3, "float32")}
    b = {("w", "param"): np.ones(3, "float32"), ("w", "exp_avg"): np.zeros(3, "float32")}
    assert compared(place, a, b, "exp_avg").values == []
    with pytest.raises(UserError, match="share no tensor with momentum; they have exp_avg, param"):
        compared(place, a, b, "momentum")


def test_tensors_that_cannot_be_compared_are_named(place: Storage) -> None:
    a = {("w", "param"): np.zeros((2, 3), "float32"), ("old", "param"): np.zeros(2, "float32")}
    b = {("w", "param"): np.zeros((3, 2), "float32"), ("new", "param"): np.zeros(2, "float32")}
    sides = Side(place, saved(place, 10, a)), Side(place, saved(place, 20, b))
    found = comparison(*sides, None, lambda flow: None)
    assert [(one.what, one.a, one.b) for one in found.tensors] == [
        ("model w", "[2, 3] param F32", "[3, 2] param F32"),
        ("model old", "[2] param F32", None),
        ("model new", None, "[2] param F32"),
    ]
    assert found.values is None


def test_what_they_say_differently_is_named_by_field(place: Storage) -> None:
    fence = start(place)
    groups = [(ParamGroup(name="0", tensors=("weight",), options={"lr": lr, "steps": [lr]}),) for lr in (0.1, 0.2)]
    a = save(place, fence, 10, metrics={"loss": 2.0}, param_groups=groups[0])
    b = save(place, fence, 20, 3, metrics={"loss": 1.0, "acc": 0.5}, param_groups=groups[1])
    found = comparison(Side(place, a), Side(place, b), None, lambda flow: None)
    assert [(one.what, one.a, one.b) for one in found.fields] == [
        ("world.size", 2, 3),
        ("metrics.loss", 2.0, 1.0),
        ("metrics.acc", None, 0.5),
        ("paramGroups.0.lr", 0.1, 0.2),
    ]


def test_a_checkpoint_says_the_same_as_itself(place: Storage) -> None:
    side = Side(place, save(place, start(place), 10))
    found = comparison(side, side, ("param", "exp_avg"), lambda flow: None)
    assert (found.fields, found.tensors, found.values, found.num_compared) == ([], [], [], 3)


def test_damaged_values_are_not_compared(place: Storage) -> None:
    a, b = saved(place, 10, of(1.0)), saved(place, 20, of(2.0))
    name = layout.shard(b.id, 0)
    data = bytearray(place.read(name))
    data[4096] ^= 1
    place.replace(name, bytes(data))
    with pytest.raises(DamagedError, match="shard-00000"):
        comparison(Side(place, a), Side(place, b), ("param",), lambda flow: None)
