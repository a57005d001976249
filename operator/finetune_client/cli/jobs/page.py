"""All that is known of a job, on a page for people: `finetune describe`."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime

from finetune_api.job import Attempt, Status
from finetune_client.cli.jobs.tables import age, columns
from finetune_client.cli.sizes import size
from finetune_client.client import Description
from finetune_client.telling import duration, what_next

__all__ = ["page"]

_MOST_EVENTS = 15
_INDENT = "  "


def page(found: Description, now: datetime) -> Iterator[str]:
    """The lines."""
    view, status = found.view, found.view.status
    yield f"{view.name} in {view.namespace}: {view.phase}, {age(view.created_at, now) or 'unknown'} old"
    if found.advice.why:
        yield from (_INDENT + line for line in found.advice.why.splitlines())
    if told := what_next(view):
        yield told
    yield from _training(status)
    yield from _attempts(status)
    yield from _post_mortem(status)
    yield from _conditions(status)
    yield from _events(found, now)


def _training(status: Status) -> Iterator[str]:
    facts = [
        ("method", " and ".join(filter(None, (status.method, status.tuning)))),
        ("workers", _workers(status)),
        ("progress", _progress(status)),
        ("checkpoint", _checkpoint(status)),
        *(("artifact", f"{one.uri} ({one.kind}, {size(one.bytes)})") for one in status.artifacts),
    ]
    told = [f"{_INDENT}{name:<10} {text}" for name, text in facts if text]
    yield from _section("Training", told)


def _workers(status: Status) -> str:
    found = status.resolved
    if found is None:
        return ""
    now = status.progress.world_size if status.progress is not None else None
    missing = f"{now} of " if now is not None and now < found.world_size else ""
    batch = f"{found.micro_batch_size} x {found.gradient_accumulation_steps} x {found.world_size}"
    return (
        f"{missing}{found.world_size} processes on {found.gpus} GPUs, batch {batch} = {found.global_batch_size}, "
        f"ZeRO stage {found.zero_stage}, {found.precision}"
    )


def _progress(status: Status) -> str:
    found = status.progress
    if found is None:
        return ""
    parts = [f"step {found.step}" + (f" of {found.total_steps}" if found.total_steps else "")]
    if found.eta_seconds and status.finished_at is None:
        parts.append(f"{duration(found.eta_seconds)} left")
    if found.tokens_per_second:
        parts.append(f"{found.tokens_per_second:,} tokens/s")
    return ", ".join([*parts, *(f"{name} {value}" for name, value in found.metrics.items())])


def _checkpoint(status: Status) -> str:
    found = status.checkpoint
    return "" if found is None else f"step {found.step}, {size(found.bytes)}, {found.uri}"


def _attempts(status: Status) -> Iterator[str]:
    rows = [_attempt(one) for one in status.attempts]
    table = columns(("NO", "RAYJOB", "FROM STEP", "TO STEP", "TOOK", "OUTCOME", "THEN", "MESSAGE"), rows)
    counts = f"{status.restarts} restarts, {status.preemptions} preemptions"
    yield from _section(f"Attempts ({counts})", [_INDENT + line for line in table] if rows else [])


def _attempt(one: Attempt) -> tuple[str, ...]:
    took = "" if one.ended_at is None else duration((one.ended_at - one.created_at).total_seconds())
    message = (one.message or "").partition("\n")[0]
    return (
        str(one.number),
        one.ray_job,
        "" if one.resumed_from_step is None else str(one.resumed_from_step),
        str(one.step),
        took,
        one.outcome or "goes on",
        one.action or "",
        message,
    )


def _post_mortem(status: Status) -> Iterator[str]:
    found = status.post_mortem
    if found is None:
        return
    facts = [f"class {found.failure_class}"]
    facts += [f"pod {found.pod}"] if found.pod else []
    facts += [found.reason] if found.reason else []
    facts += [f"exit code {found.exit_code}"] if found.exit_code is not None else []
    lines = [_INDENT + line for line in found.message.splitlines()]
    yield from _section(f"What is known of attempt {found.attempt}: {', '.join(facts)}", lines or [""])


def _conditions(status: Status) -> Iterator[str]:
    rows = [(one.type, one.status, one.reason, one.message.partition("\n")[0]) for one in status.conditions]
    table = columns(("CONDITION", "HOLDS", "REASON", "MESSAGE"), rows)
    yield from _section("Conditions", [_INDENT + line for line in table] if rows else [])


def _events(found: Description, now: datetime) -> Iterator[str]:
    rows = [(age(one.at, now), one.kind, one.reason, one.message) for one in found.events[-_MOST_EVENTS:]]
    table = columns(("AGE", "TYPE", "REASON", "MESSAGE"), rows)
    yield from _section("Events", [_INDENT + line for line in table] if rows else [])


def _section(title: str, lines: list[str]) -> Iterator[str]:
    if lines:
        yield ""
        yield title
        yield from lines
