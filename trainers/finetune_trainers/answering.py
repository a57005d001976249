"""Answers one request, given as JSON, with lines of `Told` on stdout: how far it has come, then the report or why there
is none.

What the programs behind `finetune ckpt` and `finetune data` have in common; `finetune_client.cli.asking` reads it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar

from pydantic import ValidationError

from finetune_api.answers import Refusal, Step, Told
from finetune_api.base import Contract
from finetune_api.failures import INTERRUPTED
from finetune_trainers.errors import UserError

__all__ = ["OnStep", "answered", "tell_step"]

OnStep = Callable[[Step], None]
Request = TypeVar("Request")

_TELL_SECONDS = 0.2


def answered(
    arguments: Sequence[str],
    parse: Callable[[str], Request],
    answer: Callable[[Request], Contract],
    refusal_of: Callable[[Exception], Refusal],
) -> Contract | int:
    """Tells what `answer` makes of the one argument -> that report, or the exit code where there is none."""
    try:
        report = answer(_request(arguments, parse))
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        refusal = refusal_of(error)
        _tell(Told(refusal=refusal))
        return refusal.exit_code
    _tell(Told(report=report.model_dump(mode="json", by_alias=True)))
    return report


def tell_step() -> OnStep:
    """For something that takes time: called however often, it tells a few times a second, and the end."""
    told_at = 0.0

    def tell(step: Step) -> None:
        nonlocal told_at
        now = time.monotonic()
        if now - told_at >= _TELL_SECONDS or step.done == step.total:
            told_at = now
            _tell(Told(progress=step))

    return tell


def _request(given: Sequence[str], parse: Callable[[str], Request]) -> Request:
    try:
        (text,) = given
        return parse(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}") from None
    except ValueError:
        raise UserError("one argument is expected, a request as JSON, which the finetune command writes") from None


def _tell(told: Told) -> None:
    with suppress(BrokenPipeError):  # nobody listens any more
        print(told.model_dump_json(by_alias=True), flush=True)
