"""`finetune ckpt diff`: what two checkpoints say differently, and how far their values are apart.

Values are read from both in blocks of a few megabytes, verified as they are read, so memory does not grow with the
model. The figures are taken in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from pydantic import JsonValue

from finetune_api.answers import Step
from finetune_api.checkpoints import Comparison, Difference, ValueDifference
from finetune_trainers.answering import OnStep
from finetune_trainers.checkpoint.manifest import ITEM_BYTES, Intent, Manifest, SliceKey, TensorRecord
from finetune_trainers.checkpoint.reading import SliceReader
from finetune_trainers.checkpoint.slices import Wanted
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError

__all__ = ["Side", "comparison"]

_BLOCK_BYTES = 16 << 20
_OF_EVERY_CHECKPOINT = {"kind", "version", "step", "epoch", "token", "created", "tensors", "paramGroups"}
"""Keys of an intent that differ anyway, or that are compared one by one."""
_NUMBERS = {"F64": "f8", "F32": "f4", "F16": "f2", "I64": "i8", "I32": "i4", "I16": "i2", "I8": "i1"}
_NUMBERS |= {"U64": "u8", "U32": "u4", "U16": "u2", "U8": "u1", "BOOL": "u1"}


class Side(NamedTuple):
    """One of the two."""

    storage: Storage
    manifest: Manifest

    @property
    def name(self) -> str:
        return f"{self.storage.uri} {self.manifest.id}"


def comparison(a: Side, b: Side, states: Sequence[str] | None, on_step: OnStep) -> Comparison:
    """`states` None: what they say of themselves only; else the values of these states too. Raises UserError when
    neither has such a state, DamagedError when what is read is not what was saved."""
    one, other = a.manifest.intent, b.manifest.intent
    values, num_compared = None, 0
    if states is not None:
        found = list(_values(a, b, states, on_step))
        num_compared = len(found)
        differing = [value for value in found if value.num_different]
        values = sorted(differing, key=lambda value: -math.inf if value.max_abs is None else -value.max_abs)
    return Comparison(
        a=a.name,
        b=b.name,
        fields=[*_fields(_said(one), _said(other)), *_groups(one, other)],
        tensors=list(_tensors(one, other)),
        values=values,
        num_compared=num_compared,
    )


def _said(intent: Intent) -> dict[str, JsonValue]:
    return {key: value for key, value in intent.to_document().items() if key not in _OF_EVERY_CHECKPOINT}


def _fields(one: JsonValue, other: JsonValue, path: str = "") -> Iterator[Difference]:
    """Differing leaves of two documents, by dotted path."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in [*one, *(key for key in other if key not in one)]:
            yield from _fields(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield Difference(what=path, a=one, b=other)


def _groups(one: Intent, other: Intent) -> Iterator[Difference]:
    """Groups of the optimizer by name. `steps`, a count for each tensor, tells nothing that the step does not."""
    before, after = ({(group.role, group.name): group for group in each.param_groups} for each in (one, other))
    for key in [*before, *(key for key in after if key not in before)]:
        a, b, what = before.get(key), after.get(key), f"paramGroups.{key[1]}"
        if a is None or b is None:
            yield Difference(what=what, a=a and f"{len(a.tensors)} tensors", b=b and f"{len(b.tensors)} tensors")
            continue
        if a.tensors != b.tensors:
            yield Difference(what=f"{what}.tensors", a=len(a.tensors), b=len(b.tensors))
        options = ({name: value for name, value in each.options.items() if name != "steps"} for each in (a, b))
        yield from _fields(next(options), next(options), what)


def _by_name(intent: Intent) -> dict[tuple[str, str], TensorRecord]:
    return {(tensor.role, tensor.name): tensor for tensor in intent.tensors}


def _tensors(one: Intent, other: Intent) -> Iterator[Difference]:
    before, after = _by_name(one), _by_name(other)
    for key in [*before, *(key for key in after if key not in before)]:
        a, b = (_shape(side.get(key)) for side in (before, after))
        if a != b:
            yield Difference(what=" ".join(key), a=a, b=b)


def _shape(tensor: TensorRecord | None) -> JsonValue:
    if tensor is None:
        return None
    states = ", ".join(f"{state} {dtype}" for state, dtype in sorted(tensor.states.items()))
    return f"{list(tensor.shape)} {states}"


def _values(a: Side, b: Side, states: Sequence[str], on_step: OnStep) -> Iterator[ValueDifference]:
    """All states of tensors that both have in the same shape and type."""
    before, after = _by_name(a.manifest.intent), _by_name(b.manifest.intent)
    pairs = [
        (tensor, state)
        for key, tensor in before.items()
        for state, dtype in tensor.states.items()
        if state in states and key in after and after[key].shape == tensor.shape
        if after[key].states.get(state) == dtype
    ]
    if not pairs:
        known = sorted({state for tensor in before.values() for state in tensor.states})
        raise UserError(f"--state: the two share no tensor with {' or '.join(states)}; they have {', '.join(known)}")
    total, done = 2 * sum(tensor.numel * ITEM_BYTES[tensor.states[state]] for tensor, state in pairs), 0
    readers = tuple(SliceReader(side.storage, side.manifest, _BLOCK_BYTES) for side in (a, b))
    for tensor, state in pairs:
        yield _value(readers, tensor, state)
        done += 2 * tensor.numel * ITEM_BYTES[tensor.states[state]]
        on_step(Step(what=tensor.name, done=done, total=total))


def _value(readers: Sequence[SliceReader], tensor: TensorRecord, state: str) -> ValueDifference:
    import numpy as np

    dtype, key = tensor.states[state], SliceKey(tensor.role, tensor.name, state)
    item, each = ITEM_BYTES[dtype], _BLOCK_BYTES // ITEM_BYTES[dtype]
    num_different = num_not_finite = 0
    largest = of_a = of_difference = 0.0
    num_finite = 0
    for start in range(0, tensor.numel, each):
        want = Wanted(key, start, min(start + each, tensor.numel))
        blocks = [_read(reader, want, item) for reader in readers]
        raw = [np.frombuffer(block, f"u{item}") for block in blocks]
        different = raw[0] != raw[1]
        num_different += int(different.sum())
        if dtype != "BF16" and dtype not in _NUMBERS:
            continue  # 8-bit floating point: numpy has none
        left, right = (_numbers(block, dtype) for block in blocks)
        finite = np.isfinite(left) & np.isfinite(right)
        num_not_finite += int((different & ~finite).sum())
        num_finite += int(finite.sum())
        apart = np.where(finite, left, 0.0) - np.where(finite, right, 0.0)
        largest = max(largest, float(np.abs(apart).max(initial=0.0)))
        of_difference += float(np.dot(apart, apart))
        of_a += float(np.dot(np.where(finite, left, 0.0), np.where(finite, left, 0.0)))
    relative = math.sqrt(of_difference / of_a) if of_a else (0.0 if of_difference == 0 else None)
    return ValueDifference(
        role=tensor.role,
        tensor=tensor.name,
        state=state,
        num_elements=tensor.numel,
        num_different=num_different,
        max_abs=largest if num_finite else None,
        relative_norm=relative if num_finite else None,
        num_not_finite=num_not_finite,
    )


def _read(reader: SliceReader, want: Wanted[SliceKey], item: int) -> memoryview:
    data = memoryview(bytearray((want.end - want.start) * item))
    reader.read({want: data})
    return data


def _numbers(block: memoryview, dtype: str) -> Any:
    """The elements in fp64."""
    import numpy as np

    if dtype == "BF16":
        block, dtype = (np.frombuffer(block, "u2").astype("u4") << 16).data.cast("B"), "F32"
    with np.errstate(invalid="ignore"):  # a NaN that signals
        return np.frombuffer(block, _NUMBERS[dtype]).astype("f8")
