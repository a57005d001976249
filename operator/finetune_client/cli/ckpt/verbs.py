"""What each command of `finetune ckpt` does: a place and options -> a request -> its answer, shown -> the exit code."""

from __future__ import annotations

import getpass
import socket
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError

from finetune_api import checkpoint_requests as requests
from finetune_api import checkpoints as reports
from finetune_api.answers import Refusal
from finetune_api.base import Contract
from finetune_client.cli.asking import Answer, Asked, Tell, ask, refuse, say, show
from finetune_client.cli.ckpt import tables
from finetune_client.cli.ckpt.places import BadPlace, Place, RunAtWork, held, place_of
from finetune_client.cli.exits import IN_USE, INVALID, OK
from finetune_client.cli.sizes import parse_size

__all__ = [
    "Keeping",
    "diff",
    "export",
    "gc",
    "import_",
    "inspect",
    "ls",
    "pin",
    "plan",
    "repair",
    "unpin",
    "verify",
]

_NEWEST = "newest"
_KEEP_LAST = 3
"""As spec.checkpoint.keepLast is unless a job says otherwise."""

ADMIN = Asked(
    "finetune_trainers.checkpoint.admin",
    needs=("finetune_trainers", "blake3", "numpy"),
    what_it_does="looks at the checkpoints",
    in_bytes=True,
)


@dataclass(frozen=True)
class Keeping:
    """What the command line says of retention."""

    last: int | None = None
    every: int | None = None
    best: str | None = None
    """METRIC[:min|max[:COUNT]]."""
    quota: str | None = None
    drop_others: bool = False

    def rules(self, known: requests.Rules | None) -> requests.Rules:
        """Those of the command line where there are any, else those that are `known`, else none: all stay. Raises
        ValueError."""
        if replace(self, drop_others=False) == Keeping():
            return (known or requests.Rules()).model_copy(update={"drop_others": self.drop_others})
        last = self.last
        if last is None and (self.every is not None or self.best is not None):
            last = (known.keep_last if known else None) or _KEEP_LAST
        return requests.Rules(
            keep_last=last,
            keep_every=self.every,
            keep_best=None if self.best is None else _best(self.best),
            quota_bytes=None if self.quota is None else _bytes_of(self.quota, "--quota"),
            drop_others=self.drop_others,
        )


def ls(where: str, keeping: Keeping, as_json: bool) -> int:
    def tell(report: dict[str, Any]) -> Iterable[str]:
        return tables.listing(reports.CheckpointList.model_validate(report), _now())

    return _run(where, lambda place: requests.ToList(uri=place.uri, keep=keeping.rules(place.rules)), tell, as_json)


def inspect(where: str, checkpoint: str | None, tensors: bool, as_json: bool) -> int:
    def tell(report: dict[str, Any]) -> Iterable[str]:
        return tables.details(reports.CheckpointDetails.model_validate(report), _now())

    def request(place: Place) -> Contract:
        return requests.ToInspect(uri=place.uri, id=_id(checkpoint, place), tensors=tensors)

    return _run(where, request, tell, as_json)


def verify(where: str, checkpoint: str | None, every: bool, deep: bool, as_json: bool) -> int:
    def tell(report: dict[str, Any]) -> Iterable[str]:
        return tables.verification(reports.Verification.model_validate(report))

    def request(place: Place) -> Contract:
        named = checkpoint or place.checkpoint
        if every and named is not None:
            raise ValueError(f"--all verifies every checkpoint; leave it out, or {named}")
        return requests.ToVerify(uri=place.uri, id=named, all=every, deep=deep)

    return _run(where, request, tell, as_json)


def diff(where: str, a: str, b: str, other: str | None, values: bool, states: list[str], as_json: bool) -> int:
    def tell(report: dict[str, Any]) -> Iterable[str]:
        return tables.comparison(reports.Comparison.model_validate(report))

    def request(place: Place) -> Contract:
        return requests.ToCompare(
            uri=place.uri,
            a=a,
            b=b,
            uri_of_b=None if other is None else place_of(other).uri,
            states=(states or ["param"]) if values or states else None,
        )

    return _run(where, request, tell, as_json)


def plan(
    where: str, checkpoint: str | None, world: int, zero_stage: int | None, memory: str | None, as_json: bool
) -> int:
    def tell(report: dict[str, Any]) -> Iterable[str]:
        return tables.costs(reports.RestoreCosts.model_validate(report))

    def request(place: Place) -> Contract:
        return requests.ToPlan(
            uri=place.uri,
            id=_id(checkpoint, place),
            world=world,
            zero_stage=zero_stage,
            memory=None if memory is None else _bytes_of(memory, "--memory"),
        )

    return _run(where, request, tell, as_json)


def export(
    where: str, checkpoint: str | None, to: str, options: dict[str, Any], shard: str | None, as_json: bool
) -> int:
    """`options` are the other fields of the request."""

    def tell(report: dict[str, Any]) -> Iterable[str]:
        return tables.exported(reports.Exported.model_validate(report))

    def request(place: Place) -> Contract:
        return requests.ToExport(
            uri=place.uri,
            id=_id(checkpoint, place),
            to=to if "://" in to else str(Path(to).absolute()),
            max_shard_bytes=None if shard is None else _bytes_of(shard, "--max-shard-size"),
            **options,
        )

    return _run(where, request, tell, as_json)


def import_(
    where: str, source: Path, plan_file: Path | None, said: dict[str, Any], take_over: bool, as_json: bool
) -> int:
    """`said` are other fields of the request; those that are None are taken from the job's plan, where there is one."""

    def tell(report: dict[str, Any]) -> Iterable[str]:
        return tables.imported(reports.Imported.model_validate(report))

    def request(place: Place) -> Contract:
        named = {name: value for name, value in said.items() if value is not None}
        known = _of_plan(plan_file or place.plan) | ({"base_revision": None} if "base" in named else {}) | named
        alone = take_over or place.run is not None
        return requests.ToImport(uri=place.uri, source=str(source.absolute()), by=_whoami(), take_over=alone, **known)

    return _run(where, request, tell, as_json, alone=True, is_new=True)


def _of_plan(file: Path | None) -> dict[str, Any]:
    """What a checkpoint must say for the training of a plan to go on from it. Raises ValueError."""
    if file is None:
        return {}
    from finetune_api.plan import RunPlan

    path = file / "plan.json" if file.is_dir() else file
    try:
        plan = RunPlan.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        right = "name a run's folder, or what finetune plan job.yaml -o json prints"
        raise ValueError(f"--for: {path} is no plan of a job that can be read; {right}") from None
    if plan.checkpoint is None:
        raise ValueError(f"--for: {plan.namespace}/{plan.name} saves no checkpoints; give it spec.checkpoint")
    lora = plan.tuning.lora
    return {
        "job": plan.checkpoint.job,
        "base": plan.model.source,
        "base_revision": plan.model.revision,
        "global_batch": plan.batch.global_batch_size,
        "adapter": None if lora is None else lora.model_dump(mode="json", exclude_none=True),
        "weight_decay": plan.optimization.adamw.weight_decay,
    }


def pin(where: str, checkpoint: str | None, reason: str, as_json: bool) -> int:
    def request(place: Place) -> Contract:
        return requests.ToPin(uri=place.uri, id=_id(checkpoint, place), by=_whoami(), reason=reason)

    return _run(where, request, _tell_pin, as_json)


def unpin(where: str, checkpoint: str | None, as_json: bool) -> int:
    return _run(where, lambda place: requests.ToUnpin(uri=place.uri, id=_id(checkpoint, place)), _tell_pin, as_json)


def repair(where: str, dry_run: bool, take_over: bool, as_json: bool) -> int:
    def tell(report: dict[str, Any]) -> Iterable[str]:
        return tables.repair(reports.Repair.model_validate(report))

    def request(place: Place) -> Contract:
        alone = take_over or place.run is not None  # the run's lock is ours
        return requests.ToRepair(uri=place.uri, by=_whoami(), dry_run=dry_run, take_over=alone)

    return _run(where, request, tell, as_json, alone=True)


def gc(where: str, keeping: Keeping, dry_run: bool, yes: bool, take_over: bool, as_json: bool) -> int:
    """Without --yes the plan is shown and a person is asked."""

    def request(place: Place, dry: bool) -> Contract:
        rules = keeping.rules(place.rules)
        if rules == requests.Rules() and not as_json:
            say("No rule is known here, so checkpoints stay and only what was never completed goes; say --keep-last N")
        alone = take_over or place.run is not None
        return requests.ToCollect(uri=place.uri, keep=rules, by=_whoami(), dry_run=dry, take_over=alone)

    if dry_run or yes:
        return _run(where, lambda place: request(place, dry_run), _tell_collection, as_json, alone=True)
    if as_json or not _is_terminal():
        return _refuse("nobody is there to ask; say --yes to delete, or --dry-run to see what would be", as_json)
    planned: dict[str, Any] = {}

    def tell(report: dict[str, Any]) -> Iterable[str]:
        planned.update(report)
        return _tell_collection(report)

    code = _run(where, lambda place: request(place, True), tell, as_json, alone=True)
    if code != OK or not _would_delete(planned):
        return code
    if not typer.confirm("Delete these?", err=True):
        say("Nothing was deleted")
        return OK
    return gc(where, keeping, False, True, take_over, as_json)


def _would_delete(report: dict[str, Any]) -> bool:
    return bool(report["deleted"] or report["blobs"] or report["unfinished"])


def _tell_pin(report: dict[str, Any]) -> Iterable[str]:
    return tables.pin(reports.PinReport.model_validate(report))


def _tell_collection(report: dict[str, Any]) -> Iterable[str]:
    return tables.collection(reports.Collection.model_validate(report), _now())


def _run(
    where: str,
    make: Callable[[Place], Contract],
    tell: Tell,
    as_json: bool,
    alone: bool = False,
    is_new: bool = False,
) -> int:
    """`alone`: keep runs away meanwhile, where the place is in a run's folder. `is_new`: nothing need be there yet."""
    try:
        place = place_of(where, is_new)
        if not alone:
            return show(_asked(make(place)), tell, as_json)
        with held(place):
            return show(_asked(make(place)), tell, as_json)
    except RunAtWork as error:
        return _refuse(str(error), as_json, IN_USE)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return _refuse(f"{'.'.join(map(str, first['loc']))}: {first['msg']}", as_json)
    except (BadPlace, ValueError) as error:
        return _refuse(str(error), as_json)


def _asked(request: Contract) -> Answer:
    return ask(ADMIN, request)


def _refuse(message: str, as_json: bool, code: int = INVALID) -> int:
    return refuse(Refusal(message=message, exit_code=code), as_json)


def _id(given: str | None, place: Place) -> str:
    return given or place.checkpoint or _NEWEST


def _bytes_of(text: str, option: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from None


def _best(text: str) -> requests.KeepBest:
    metric, _, rest = text.partition(":")
    mode, _, count = rest.partition(":")
    if mode not in ("", "min", "max") or (count and not count.isdecimal()) or not metric:
        raise ValueError(f"--keep-best: {text!r} is not of the form METRIC[:min|max[:COUNT]], such as eval_loss:min:2")
    return requests.KeepBest(metric=metric, mode="max" if mode == "max" else "min", count=int(count or 1))


def _whoami() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def _is_terminal() -> bool:
    return sys.stdin.isatty()


def _now() -> datetime:
    return datetime.now(UTC)
