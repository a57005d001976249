"""Rollout: the policy's own answers to prompts, with the probability of every token. Called by online methods.

in_process    the policy's weights, in the process that trains them
task          what a rank is to write, and with what
sampling      from logits to a token, pure
beams         the likeliest answers, by a search
row_cache     keys and values of a batch whose rows come and go
room          how much of that has room
zero3         parameters that ZeRO-3 keeps in parts, whole for a while
vllm_engine   vLLM, in a process and an environment of its own beside each trainer
vllm_team     trainers that share one
vllm_server   what runs there
vllm_process  the trainer's end of the pipe to it
vllm_weights  the policy as vLLM reads it: whole, adapters merged
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

__all__ = ["AheadEngine", "Completion", "OnProgress", "Request", "RolloutEngine", "Sampling"]

OnProgress = Callable[[int, int], None]
"""Told how many of this rank's requests are answered, and how many there are."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    max_new_tokens: int
    temperature: float = 1.0
    """What logits are divided by; 0 takes the likeliest token always."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability; 1 is all."""
    top_k: int = 0
    """Only so many of the likeliest tokens, before `top_p`; 0 is all."""
    num_beams: int = 1
    """Above 1: nothing is drawn, and answers are the likeliest that a search over so many beginnings finds."""
    length_penalty: float = 1.0
    """Of that search: answers are compared by log-probability / length ** length_penalty."""


@dataclass(frozen=True)
class Request:
    """One answer to be written."""

    prompt_ids: Sequence[int]
    """At least one."""
    seed: int
    """At least 0, of this very sample: equal seeds give equal answers for equal weights, whatever shares the batch
    (up to rounding, which in half precision may differ with the size of the batch)."""
    place: int = 0
    """Where the answer stands among those that a search with beams finds: below `num_beams`, 0 the best."""


@dataclass(frozen=True)
class Completion:
    """One answer."""

    ids: list[int]
    """With the end token where there is one."""
    log_probs: list[float]
    """Of each of `ids`, nats: in the distribution at the sampling temperature, before top-p and top-k; at temperature
    1 where the likeliest token is taken. With beams too: what the policy says, whoever chose."""
    ended: bool
    """False: cut at max_new_tokens."""


class RolloutEngine(Protocol):
    """What answers prompts with the policy as it is. All calls are collective."""

    is_policy: bool
    """Tokens have the very probabilities with which the trainer learns from them. Otherwise it asks the policy anew,
    and corrects for the difference."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, on_progress: OnProgress | None = None
    ) -> list[Completion]:
        """The answers in the order of `requests`, which are this rank's own; another rank may have more, or none."""
        ...

    def update_weights(self) -> None:
        """The policy has been updated: take over its weights."""
        ...

    def sleep(self) -> None:
        """Nothing will be asked for a while: give memory back."""
        ...

    def wake(self) -> None:
        """Be ready again after `sleep`."""
        ...

    def close(self) -> None:
        """End for good, in the middle of writing too. May be called twice."""
        ...


@runtime_checkable
class AheadEngine(RolloutEngine, Protocol):
    """One in a process of its own, which writes while the policy learns. Between `start` and `collect` it has the
    weights of the `update_weights` before, and nothing else may be asked of it."""

    def start(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Begin to answer `requests`, which are this rank's own."""
        ...

    def collect(self, on_progress: OnProgress | None = None) -> list[Completion]:
        """The answers, as `generate` gives them, as soon as they are there. What went wrong since `start` is raised
        here."""
        ...
