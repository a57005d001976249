"""Reward functions as people write them, and as they should not: what the tests name as module:function."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
from pathlib import Path
from typing import Any

forever = threading.Event()
calls: list[int] = []
NOT_A_FUNCTION = 3


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def matches(prompts: list[str], completions: list[str], answer: list[str], factor: float = 1.0) -> list[float]:
    assert len(prompts) == len(completions)
    return [factor * (text == right) for text, right in zip(completions, answer, strict=True)]


def hinted(completions: list[str], hint: list[str | None] | None = None) -> list[float]:
    return [float(one is not None) for one in hint or [None] * len(completions)]


def everything(completions: list[str], **others: Any) -> list[float]:
    """The number of what it is given, and whether all of it is as long as the answers."""
    assert all(len(column) == len(completions) for column in others.values())
    return [float(len(others)) for _ in completions]


def everything_but(completions: list[str], factor: float, **others: Any) -> list[float]:
    return [factor * len(others) for _ in completions]


def about_the_rest(
    completions: list[str], messages: list[list[dict[str, str]]], num_tokens: list[int], ended: list[bool]
) -> list[float]:
    return [
        100.0 * len(conversation) + 10.0 * count + end
        for conversation, count, end in zip(messages, num_tokens, ended, strict=True)
    ]


async def later(completions: list[str]) -> list[float]:
    await asyncio.sleep(0)
    return [float(len(text)) for text in completions]


def without_opinion(completions: list[str]) -> list[float | None]:
    return [None if text == "?" else 1.0 for text in completions]


def raises_for_bad(completions: list[str]) -> list[float]:
    if "bad" in completions:
        raise ValueError("cannot read this\nat all")
    return [1.0] * len(completions)


def always_raises(completions: list[str]) -> list[float]:
    raise KeyError("never")


def raises_for_short(completions: list[str], least: int) -> list[float]:
    if any(len(text) < least for text in completions):
        raise ValueError("too short")
    return [float(len(text)) for text in completions]


def no_opinion_of_short(completions: list[str], least: int) -> list[float | None]:
    return [None if len(text) < least else 1.0 for text in completions]


def hangs_once(completions: list[str], folder: str) -> list[float]:
    """Over the lives of its processes."""
    if not Path(folder, "hung").exists():
        Path(folder, "hung").touch()
        forever.wait()
    return [1.0 + len(text) for text in completions]


def hangs_for_bad(completions: list[str]) -> list[float]:
    if "bad" in completions:
        forever.wait()
    return [1.0] * len(completions)


def ends_for_bad(completions: list[str]) -> list[float]:
    if "bad" in completions:
        os._exit(7)
    return [1.0] * len(completions)


def ends_alone_for_bad(completions: list[str]) -> list[float]:
    if len(completions) > 1 and "bad" in completions:
        raise ValueError("cannot read this")
    return ends_for_bad(completions)


def exits_for_bad(completions: list[str]) -> list[float]:
    if "bad" in completions:
        sys.exit("enough")
    return [1.0] * len(completions)


def one_mean(completions: list[str]) -> list[float]:
    """Right for one answer, and wrong for several."""
    return [sum(map(len, completions)) / len(completions)]


def one_too_few(completions: list[str]) -> list[float]:
    return [1.0] * (len(completions) - 1)


def not_finite(completions: list[str]) -> list[float]:
    return [{"nan": float("nan"), "inf": float("-inf")}.get(text, 2.0) for text in completions]


def not_numbers(completions: list[str]) -> list[Any]:
    return ["7" if text == "bad" else 2.0 for text in completions]


def one_number(completions: list[str]) -> float:
    return 1.0


def arrays(completions: list[str]) -> Any:
    import numpy as np

    return np.arange(len(completions), dtype=np.float32)


def counts_calls(completions: list[str]) -> list[float]:
    calls.append(1)
    return [float(len(calls))] * len(completions)


def prints(completions: list[str]) -> list[float]:
    print('{"values": [9.0]}', flush=True)
    return [1.0] * len(completions)


def no_completions(texts: list[str]) -> list[float]:
    return [1.0] * len(texts)


def starts_a_child(completions: list[str], folder: str) -> list[float]:
    """Starts a process of its own and notes it."""
    import subprocess

    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(folder, "child").write_text(str(child.pid))
    return [1.0] * len(completions)
