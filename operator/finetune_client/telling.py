"""What people are told of a job in one line, wherever they look: a terminal, a notebook, a debugger."""

from __future__ import annotations

from collections.abc import Collection

from finetune_api.job import Phase
from finetune_client.advice import advice_for
from finetune_client.views import JobView

__all__ = ["duration", "first_words", "summary", "watched", "what_next"]

_LONGEST = 70
_OF_REWARDS = {"reward": "reward", "kl": "kl"}
_OF_LOSS = {"loss": "loss", "rewards/accuracies": "accuracy"}


def summary(view: JobView) -> str:
    """How the job stands, in a line that differs when something worth telling has changed."""
    status = view.status
    parts = [str(view.phase)]
    if status.progress is not None and status.progress.step:
        of = f"/{status.progress.total_steps}" if status.progress.total_steps else ""
        parts.append(f"step {status.progress.step}{of}")
        metrics = status.progress.metrics
        parts += [f"{said} {metrics[name]}" for name, said in watched(metrics).items()]
        if status.progress.eta_seconds and not view.is_over:
            parts.append(f"{duration(status.progress.eta_seconds)} left")
    if status.checkpoint is not None:
        parts.append(f"checkpoint {status.checkpoint.step}")
    if len(status.attempts) > 1:
        parts.append(f"attempt {status.attempts[-1].number}")
    why = advice_for(view).why
    return ", ".join(parts) + (f": {first_words(why)}" if why else "")


def watched(names: Collection[str]) -> dict[str, str]:
    """Of the figures called `names` those that a person watches, and what they are called on a screen.

    Where rewards are learned from these are the reward and the distance from the reference: that loss is about zero,
    however well it goes. Elsewhere they are the loss and, of answers that were judged, the share that the model gets
    right.
    """
    chosen = _OF_REWARDS if "reward" in names else _OF_LOSS
    return {name: said for name, said in chosen.items() if name in names}


def duration(seconds: float) -> str:
    """4.2 s, 3:07 or 1:02:05."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def first_words(text: str) -> str:
    """Of a sentence: what a line has room for."""
    line = text.partition("\n")[0]
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"


def what_next(view: JobView) -> str:
    """What to do about it, or where its model is; empty where there is nothing to say."""
    advice = advice_for(view).next
    return f"Next: {advice}" if advice and view.phase is not Phase.SUCCEEDED else advice
