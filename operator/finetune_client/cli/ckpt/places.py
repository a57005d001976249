"""What a person calls a place -> where its checkpoints are.

s3://bucket/team/job/checkpoints    a URI: s3, gs, pvc, file; a checkpoint's own URI too, .../ckpt/0000000200-e00001
runs/support-bot/20250101-120000    a folder of `finetune run`: where its job saves, and the job's own rules
support-bot                         the newest run of that name below ./runs
/data/checkpoints                   a folder with checkpoints
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api.checkpoint_requests import Rules

__all__ = ["BadPlace", "Place", "RunAtWork", "held", "place_of"]

_RUNS = Path("runs")
_FOLDER = "checkpoints"
_NAME = re.compile(r"[a-z](?:[-a-z0-9]{0,38}[a-z0-9])?")
_CHECKPOINT = re.compile(r"(?P<place>.+)/ckpt/(?P<id>\d{10,}-e\d{5,})/?")


class BadPlace(ValueError):
    """There is no such place; the message says what would be right."""


class RunAtWork(ValueError):
    """The run's folder is in use."""


@dataclass(frozen=True)
class Place:
    """Where checkpoints are."""

    uri: str
    checkpoint: str | None = None
    """The one that was named along with it."""
    rules: Rules | None = None
    """Of the job whose run it is; None: not known."""
    run: Path | None = None
    """The folder of the run that they are in, which a run at work has locked."""
    plan: Path | None = None
    """Of the job whose run it is."""


def place_of(text: str, is_new: bool = False) -> Place:
    """`is_new`: there need be no checkpoints yet, and no folder. Raises BadPlace."""
    found = _CHECKPOINT.fullmatch(text)
    if found:
        return replace(place_of(found["place"], is_new), checkpoint=found["id"])
    if text.startswith("file://"):
        return _of_folder(Path(text.removeprefix("file://")), text, is_new)
    if "://" in text:
        return Place(text)
    folder = Path(text)
    if not folder.exists() and _NAME.fullmatch(text):
        return _of_folder(_newest_run(text), text, is_new)
    return _of_folder(folder, text, is_new)


@contextmanager
def held(place: Place) -> Iterator[bool]:
    """Keep runs away from the place -> whether that can be done: only where it lies in a run's folder. Raises
    RunAtWork."""
    if place.run is None:
        yield False
        return
    lock = os.open(place.run, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise RunAtWork(f"{place.run} is in use by finetune run; wait for its end, or stop it") from None
    try:
        yield True
    finally:
        os.close(lock)


def _newest_run(name: str) -> Path:
    runs = sorted(folder for folder in (_RUNS / name).glob("*/") if (folder / "plan.json").is_file())
    if not runs:
        raise BadPlace(
            f"{name} is no folder here, and there is no run of that name in {_RUNS / name}; name a run's folder, a"
            " folder with checkpoints, or a URI such as s3://bucket/team/job/checkpoints"
        )
    return runs[-1]


def _of_folder(path: Path, given: str, is_new: bool) -> Place:
    """`given` is what the person called it."""
    folder = path.absolute()
    if not folder.exists() and is_new:
        return Place(f"file://{folder}")
    if not folder.is_dir():
        raise BadPlace(f"{given} is no folder; name a run's folder, a folder with checkpoints, or a URI")
    if folder.name == _FOLDER and (folder.parent / "plan.json").is_file():
        return _of_run(folder.parent, given, is_new)
    if _holds_checkpoints(folder):
        return Place(f"file://{folder}")
    if (folder / "plan.json").is_file():
        return _of_run(folder, given, is_new)
    if jobs := sorted(file.parent.name for file in folder.glob("*/plan.json")):
        raise BadPlace(
            f"{given} holds the runs of several jobs; name one: {', '.join(f'{given}/{job}' for job in jobs)}"
        )
    return Place(f"file://{folder}")


def _of_run(folder: Path, given: str, is_new: bool) -> Place:
    plan = folder / "plan.json"
    settings = _checkpoint_settings(plan)
    uri, rules = settings.get("uri"), _rules(settings)
    if isinstance(uri, str):
        return Place(uri, rules=rules, plan=plan)
    if not (folder / _FOLDER).is_dir() and not is_new:
        why = "has saved none yet" if settings else "saves none: its job has no spec.checkpoint"
        raise BadPlace(f"{given} has no checkpoints; the run {why}")
    from finetune_client.folders import STATE_FILE  # brings much that other places do not need

    run = next((one for one in (folder, folder.parent) if (one / STATE_FILE).is_file()), None)
    return Place(f"file://{folder / _FOLDER}", rules=rules, run=run, plan=plan)


def _checkpoint_settings(plan: Path) -> dict[str, Any]:
    """Read leniently: the plan of another version names its place all the same."""
    try:
        found = json.loads(plan.read_bytes()).get("checkpoint")
    except (OSError, ValueError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _rules(settings: dict[str, Any]) -> Rules | None:
    """None when the plan does not say them, or in a way that is not ours: then nothing is deleted by any."""
    names = ("keepLast", "keepEvery", "keepBest", "quotaBytes")
    said = {name: settings[name] for name in names if settings.get(name) is not None}
    try:
        return Rules.model_validate(said) if "keepLast" in said else None
    except ValidationError:
        return None


def _holds_checkpoints(folder: Path) -> bool:
    return (folder / "FENCE").is_dir() or (folder / "ckpt").is_dir()
