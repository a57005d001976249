"""`finetune` commands as messages have people type them: whole, and speaking to the place that a message is from."""

from __future__ import annotations

from finetune_operator.kinds import Key

__all__ = ["about", "listing"]


def about(verb: str, key: Key, place: str, *options: str) -> str:
    """The command that does something with a job; `place` is its backend's."""
    return _words(verb, *options, key.name, "-n", key.namespace, place)


def listing(place: str, namespace: str | None = None) -> str:
    """The command that shows the jobs of a namespace, or of all."""
    return _words("list", *(("-n", namespace) if namespace else ("-A",)), place)


def _words(*words: str) -> str:
    return " ".join(word for word in ("finetune", *words) if word)
