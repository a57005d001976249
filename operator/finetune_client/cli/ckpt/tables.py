"""Answers about checkpoints, for people: aligned columns without borders, whole at any width, so that they can be cut,
sorted and searched by other programs too."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from datetime import datetime

from pydantic import JsonValue

from finetune_api.checkpoints import (
    CheckpointDetails,
    CheckpointList,
    CheckpointSummary,
    Collection,
    Comparison,
    Damages,
    Difference,
    Exported,
    FileDamage,
    Imported,
    PinReport,
    Repair,
    RestoreCosts,
    Verification,
)
from finetune_client.cli.sizes import size

__all__ = [
    "collection",
    "comparison",
    "costs",
    "details",
    "exported",
    "imported",
    "listing",
    "pin",
    "repair",
    "verification",
]

_MOST = 20
"""Rows of a list that may be long; the rest is counted."""


def listing(found: CheckpointList, now: datetime) -> Iterator[str]:
    if not found.checkpoints:
        yield f"No checkpoints yet at {found.uri}"
        return
    rows = [_row(row, now) for row in found.checkpoints]
    header = ("STEP", "ATTEMPT", "AGE", "SIZE", "RANKS", "ZERO", "STATE", "PINNED", "WHY")
    yield from _columns(header, rows, right={0, 1, 2, 3, 4, 5})
    shared = f", {size(found.shared_bytes)} of it shared" if found.shared_bytes else ""
    yield ""
    yield f"{_count(found.checkpoints, 'checkpoint')} at {found.uri}: {size(found.bytes)}{shared}"
    if found.newest is not None:
        yield f"A run goes on from {found.newest}"
    else:
        yield "None is whole: a run begins at step 0"
    if found.activity is not None and found.activity.at_work:
        yield f"At work: {found.activity.owner}{_since(found.activity.last_sign, now)}"


def _row(row: CheckpointSummary, now: datetime) -> Sequence[str]:
    return (
        str(row.step),
        str(row.epoch),
        "" if row.created is None else _age(row.created, now),
        size(row.bytes),
        "" if row.world_size is None else str(row.world_size),
        "" if row.zero_stage is None else str(row.zero_stage),
        row.state,
        "no" if row.pin is None else row.pin.by or "yes",
        _why(row),
    )


def _why(row: CheckpointSummary) -> str:
    if row.problems:
        more = f" (and {len(row.problems) - 1} more)" if len(row.problems) > 1 else ""
        return row.problems[0] + more
    if row.pin is not None and row.pin.reason:
        return "; ".join([f"pinned: {row.pin.reason}", *(one for one in row.reasons if one != "pinned")])
    return ("" if row.keep else "goes: ") + "; ".join(row.reasons)


def details(found: CheckpointDetails, now: datetime) -> Iterator[str]:
    summary, base = found.summary, found.base_model
    created = (
        "" if summary.created is None else f"{summary.created:%Y-%m-%d %H:%M:%S %Z}, {_age(summary.created, now)} ago"
    )
    yield from _fields(
        [
            ("checkpoint", f"{summary.id}  (step {summary.step}, attempt {summary.epoch} at this place)"),
            ("place", found.uri),
            ("state", summary.state + "".join(f"; {problem}" for problem in summary.problems[:_MOST])),
            ("pinned", _pinned(summary)),
            ("created", created),
            ("job", f"{found.job}, attempt {found.attempt}"),
            ("went on from", found.parent or "nothing: it began at step 0"),
            ("base model", "" if base is None else f"{base['source']}  (digest {str(base['digest'])[:12]})"),
            ("adapter", _pairs(found.adapter)),
            ("parameters", f"{found.num_parameters:,} in {found.num_tensors} tensors"),
            ("saved by", f"{summary.world_size} processes, ZeRO stage {summary.zero_stage}"),
            ("data", _pairs(found.data)),
            ("samples", f"{found.consumed_samples:,}, {found.global_batch} in a step"),
            ("metrics", _pairs(dict(summary.metrics))),
            ("versions", _pairs(dict(found.writer))),
            ("lossy", _pairs(dict(found.lossy))),
        ]
    )
    yield ""
    rows = [
        (one.role, one.state, one.dtype, str(one.num_tensors), f"{one.num_elements:,}", size(one.bytes))
        for one in found.states
    ]
    yield from _columns(("ROLE", "STATE", "TYPE", "TENSORS", "ELEMENTS", "SIZE"), rows, right={3, 4, 5})
    if found.groups:
        yield ""
        groups = [(one.role, one.name, str(one.num_tensors), _pairs(one.options)) for one in found.groups]
        yield from _columns(("ROLE", "GROUP", "TENSORS", "OPTIONS"), groups, right={2})
    yield ""
    files = [("" if one.rank is None else str(one.rank), size(one.bytes), one.name) for one in found.files]
    yield from _columns(("RANK", "SIZE", "FILE"), files, right={0, 1})
    yield f"{_count(found.files, 'file')}, {size(summary.bytes)}"
    if found.tensors is not None:
        yield ""
        tensors = [(one.role, one.name, _shape(one.shape), _pairs(dict(one.states))) for one in found.tensors]
        yield from _columns(("ROLE", "TENSOR", "SHAPE", "STATES"), tensors)


def verification(found: Verification) -> Iterator[str]:
    for one in found.checkpoints:
        yield f"{one.id}  {'whole' if one.whole else 'DAMAGED'}"
        yield from _damages(one)
    yield from (f"{one}  deleted meanwhile" for one in found.deleted)
    damaged = sum(not one.whole for one in found.checkpoints)
    how = f"every byte ({size(found.bytes_read)})" if found.deep else "sizes, receipts and documents; --deep reads all"
    verdict = f"{damaged} of {len(found.checkpoints)} damaged" if damaged else "all whole"
    yield f"{_count(found.checkpoints, 'checkpoint')} verified, {verdict}. Looked at: {how}"


def _damages(found: Damages) -> Iterator[str]:
    for damage in found.damages[:_MOST]:
        yield f"  {_damage(damage)}"
    if len(found.damages) > _MOST:
        yield f"  and {len(found.damages) - _MOST} more; -o json has them all"


def _damage(damage: FileDamage) -> str:
    about = ""
    if damage.tensor is not None:
        about = f" {damage.role} {damage.tensor} {damage.state} [{damage.start}, {damage.end})"
    return f"{damage.file}{about}: {damage.what}"


def comparison(found: Comparison) -> Iterator[str]:
    yield f"a  {found.a}"
    yield f"b  {found.b}"
    yield ""
    if not found.fields and not found.tensors:
        yield "They say the same of themselves."
    if found.fields:
        yield from _columns(("FIELD", "A", "B"), [_sides(one) for one in found.fields])
    if found.tensors:
        yield ""
        yield from _columns(("TENSOR", "A", "B"), [_sides(one) for one in found.tensors[:_MOST]])
        yield from _rest(len(found.tensors))
    if found.values is None:
        return
    yield ""
    if not found.values:
        yield f"The values are the same, to the bit, in all {found.num_compared} that were compared."
        return
    rows = [
        (
            one.tensor,
            one.state,
            f"{one.num_different:,} of {one.num_elements:,}",
            _figure(one.max_abs),
            _figure(one.relative_norm),
            str(one.num_not_finite) if one.num_not_finite else "",
        )
        for one in found.values[:_MOST]
    ]
    header = ("TENSOR", "STATE", "DIFFERENT", "MAX |A-B|", "|A-B|/|A|", "NOT FINITE")
    yield from _columns(header, rows, right={2, 3, 4, 5})
    yield from _rest(len(found.values))
    yield f"{len(found.values)} of {found.num_compared} compared differ"


def _sides(one: Difference) -> Sequence[str]:
    return one.what, _short(one.a), _short(one.b)


def costs(found: RestoreCosts) -> Iterator[str]:
    yield (
        f"{found.id}: saved by {found.saved_world} processes under ZeRO {found.saved_zero_stage},"
        f" gone on from by {found.world} under ZeRO {found.zero_stage}"
    )
    yield ""
    rows = [
        (
            str(one.rank),
            size(one.bytes_needed),
            size(one.bytes_read),
            f"{one.bytes_read / one.bytes_needed:.3f}" if one.bytes_needed else "",
            str(one.requests),
            str(one.files),
            size(one.memory_bytes),
        )
        for one in found.ranks[:_MOST]
    ]
    header = ("RANK", "NEEDS", "READS", "RATIO", "REQUESTS", "FILES", "MEMORY")
    yield from _columns(header, rows, right=set(range(7)))
    yield from _rest(len(found.ranks))
    yield (
        f"Together {size(found.bytes_needed)} needed, {size(found.bytes_read)} read: {found.amplification:.3f} times."
        f" A process takes up to {size(found.memory_bytes)} while it reads."
    )
    if found.fits is not None:
        yield "That fits." if found.fits else "That does NOT fit in the memory that was named."
    yield from (f"Note: {note}" for note in found.notes)


def exported(found: Exported) -> Iterator[str]:
    yield f"Written {found.id} to {found.to} ({found.format}, {found.kind}, {size(found.bytes)})"


def imported(found: Imported) -> Iterator[str]:
    moments = f"optimizer state of {found.num_with_moments} of them" if found.num_with_moments else "no optimizer state"
    yield (
        f"Imported {found.source} ({found.format}) as {found.id}: {_count(range(found.num_tensors), 'tensor')},"
        f" {moments}, {size(found.bytes)}"
    )
    yield f"A run of {found.job} with global batch {found.global_batch} goes on after step {found.step} at {found.uri}"
    yield from (f"Note: {note}" for note in found.notes)


def collection(found: Collection, now: datetime) -> Iterator[str]:
    would = "would be " if found.dry_run else ""
    rows = [("deleted", one.id, size(one.bytes), one.reason) for one in found.deleted]
    rows += [("kept", one.id, size(one.bytes), one.reason) for one in found.kept]
    if rows:
        yield from _columns(("WHAT", "CHECKPOINT", "SIZE", "WHY"), rows, right={2})
        yield ""
    yield from (f"{one} {would}completed first: all of it is there" for one in found.completed)
    if found.blobs:
        shared = "shared file that nothing refers to" if found.blobs == 1 else "shared files that nothing refers to"
        yield f"{found.blobs} {shared}, {size(found.blob_bytes)}, {would}deleted"
    if found.unfinished:
        yield f"{_count(range(found.unfinished), 'file')} whose writer died {would}deleted"
    if found.bytes or found.deleted:
        yield f"{_count(found.deleted, 'checkpoint')} {would}deleted, {size(found.bytes)} {would}freed"
    elif not found.unfinished:
        yield "Nothing to delete"
    if found.dry_run and found.activity is not None and found.activity.at_work:
        since = _since(found.activity.last_sign, now)
        yield f"At work: {found.activity.owner}{since}; without --dry-run this is refused"
    yield from (f"Note: {note}" for note in found.notes)


def repair(found: Repair) -> Iterator[str]:
    would = "would be " if found.dry_run else ""
    yield from (f"{one} {would}completed: all of it was there but its manifest" for one in found.completed)
    yield from (f"{one.id} {would}closed, with nothing deleted: {one.reason}" for one in found.closed)
    yield from (f"{one} {would}taken back from deletion: it is pinned" for one in found.revived)
    yield from (f"{one.file} {would}{one.what}" for one in found.mended)
    if found.head is not None:
        yield f"HEAD.json {would}written: {_short(found.head.b)}"
    if not (found.completed or found.closed or found.revived or found.mended or found.head):
        yield f"Nothing to repair at {found.uri}"
    for one in found.damaged:
        yield f"{one.id} is damaged, and that cannot be mended:"
        yield from _damages(one)


def pin(found: PinReport) -> Iterator[str]:
    if not found.pinned:
        yield f"{found.id} is left to retention again" if found.changed else f"{found.id} was not pinned"
        return
    by = "" if found.pin is None or not found.pin.by else f" by {found.pin.by}"
    why = "" if found.pin is None or not found.pin.reason else f": {found.pin.reason}"
    yield f"{found.id} {'is' if found.changed else 'was already'} pinned{by}{why}"


def _columns(
    header: Sequence[str], rows: Iterable[Sequence[str]], right: AbstractSet[int] = frozenset()
) -> Iterator[str]:
    """`right`: columns of numbers, which end at one place."""
    table = [header, *rows]
    widths = [max(len(row[index]) for row in table) for index in range(len(header))]
    for row in table:
        cells = (
            cell.rjust(width) if index in right else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()


def _fields(fields: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Those that say something."""
    for name, value in fields:
        if value:
            yield f"{name:<13} {value}"


def _pairs(values: dict[str, JsonValue] | None) -> str:
    return ", ".join(f"{name} {_short(value)}" for name, value in (values or {}).items())


def _short(value: JsonValue) -> str:
    """A value on one line; long ones are cut."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return _figure(value)
    text = ", ".join(map(_short, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _pinned(summary: CheckpointSummary) -> str:
    if summary.pin is None:
        return "no"
    return f"by {summary.pin.by or 'somebody'}" + (f": {summary.pin.reason}" if summary.pin.reason else "")


def _rest(count: int) -> Iterator[str]:
    if count > _MOST:
        yield f"and {count - _MOST} more; -o json has them all"


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _since(sign: datetime | None, now: datetime) -> str:
    return "" if sign is None else f", last sign of life {_age(sign, now)} ago"


def _age(then: datetime, now: datetime) -> str:
    """59 s, 3 min, 5 h or 12 d. Clocks differ: what seems to come from the future is of this moment."""
    seconds = max((now - then).total_seconds(), 0.0)
    for length, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
