"""What an answer of the model is worth to it: the rewards that method.grpo and method.ppo learn from."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import AfterValidator, Field, WithJsonSchema

from finetune_api.base import Choice, Contract, Rule, exactly_one
from finetune_api.spec.fields import ModelUri, only_for_hub

__all__ = [
    "UNIQUE_REWARD_NAMES",
    "FunctionReward",
    "HttpReward",
    "MetricKind",
    "MetricReward",
    "ModelReward",
    "RewardList",
    "RewardSource",
    "reward_names",
]

MetricKind: TypeAlias = Literal["exact-match", "numeric-answer", "regex", "token-f1", "rouge-l", "bleu"]
Seconds = Annotated[float, Field(gt=0, le=3600)]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]

_MAX_NAME_LENGTH = 40


def _regular_expression(text: str) -> str:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression of Python: {error}") from None
    return text


def _header_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9-]+", text):
        raise ValueError("is no name of a header; use letters, digits and dashes")
    return text


# A pattern of keys is nothing that a CRD can state.
HeaderName = Annotated[str, Field(min_length=1, max_length=128), AfterValidator(_header_name)]


class FunctionReward(Contract):
    """A Python function that scores answers."""

    call: Annotated[
        str,
        Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*([.][A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$", max_length=256),
    ]
    """module:function, async or not, in the image or on PYTHONPATH: f(prompts, completions, **columns, **settings), the
    columns as lists. It gets what it names (all, with **kwargs) and returns a number per completion, or None for no
    opinion. It has its own process."""
    timeout_seconds: Seconds = 60.0
    """Longest call; then its process is begun anew, and the batch has no score."""
    settings: Annotated[
        dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})
    ] = Field(default_factory=dict)
    """More keyword arguments, the same at every call."""


class MetricReward(Contract):
    """How near an answer comes to the one in the data."""

    kind: MetricKind
    """`exact-match`: 1 for the same text, white space at the ends aside. `numeric-answer`: 1 for the same last
    number. `token-f1` (as SQuAD counts words), `rouge-l`, `bleu` (of one sentence): 0 to 1. `regex`: 1 when the pattern
    occurs in the answer."""
    column: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Column with the right answer, or a list of them: the nearest counts. Left out: answer."""
    pattern: Annotated[str, AfterValidator(_regular_expression), Field(min_length=1, max_length=1024)] | None = None
    """A regular expression of Python. Other kinds compare the first group of its last match in the answer, or all of
    the match; without one the score is 0."""

    rules = (
        Rule(
            cel="self.kind != 'regex' || has(self.pattern)",
            message="kind regex needs pattern; set it",
            holds=lambda m: m.kind != "regex" or m.pattern is not None,
            field="pattern",
        ),
        Rule(
            cel="self.kind != 'regex' || !has(self.column)",
            message="kind regex compares with no column; remove it",
            holds=lambda m: m.kind != "regex" or m.column is None,
            field="column",
        ),
    )


class HttpReward(Contract):
    """A service that scores batches of answers. It is sent {"prompts": [...], "completions": [...], "fields":
    {column: [...]}} and answers {"scores": [...]}."""

    url: Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+([/?][^#\s]*)?$", max_length=1024)]
    """Where batches are posted, http:// or https://. Redirects are not followed."""
    timeout_seconds: Seconds = 60.0
    """One request may take this long."""
    retries: Annotated[int, Field(ge=0, le=20)] = 3
    """Further tries after no answer, status 429 or 5xx, with growing waits."""
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 64
    """Answers in one request."""
    headers_from_env: Annotated[dict[HeaderName, EnvName], Field(max_length=16)] = Field(default_factory=dict)
    """Headers by the environment variables that hold their values, such as Authorization: JUDGE_AUTHORIZATION, from a
    Secret in cluster.pods.env."""


class ModelReward(Contract):
    """A reward model, such as method.reward trains: a sequence classifier with one label, or an adapter of one."""

    source: ModelUri
    """A model or adapter folder, hf://org/name, or job://name, which is waited for. Its own tokenizer and chat template
    are used."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Branch, tag or commit of an hf:// source."""
    calibrated: bool | None = None
    """Use (score - mean) / scale as method.reward measured them, 0 to 1 with squash. Left out: where calibration.json
    is there."""

    rules = (only_for_hub("revision", "remove it"),)


class RewardSource(Choice):
    """One thing that gives answers a number. The reward is the sum of all, each times its weight."""

    name: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$", max_length=_MAX_NAME_LENGTH)] | None = None
    """Its name in figures. Left out: the function's or metric's, or http or model."""
    weight: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    """What its scores are multiplied with; below 0 it is a penalty."""
    function: FunctionReward | None = None
    """A Python function."""
    metric: MetricReward | None = None
    """A comparison with the answer in the data."""
    http: HttpReward | None = None
    """A service."""
    model: ModelReward | None = None
    """A reward model."""

    rules = (
        exactly_one("function", "metric", "http", "model"),
        Rule(
            cel="self.weight != 0.0",
            message="weight 0 has no effect; remove the reward, or give it another weight",
            holds=lambda r: r.weight != 0,
            field="weight",
        ),
    )

    @property
    def chosen(self) -> str:
        """Which kind it is: function, metric, http or model."""
        return next(kind for kind in ("function", "metric", "http", "model") if getattr(self, kind) is not None)


RewardList = Annotated[list[RewardSource], Field(min_length=1, max_length=16)]

UNIQUE_REWARD_NAMES = Rule(
    cel="self.rewards.all(a, !has(a.name) || self.rewards.exists_one(b, has(b.name) && b.name == a.name))",
    message="two rewards have the same name; rename one",
    holds=lambda method: _are_unique([reward.name for reward in method.rewards if reward.name is not None]),
    field="rewards",
)
"""A rule of every block that has `rewards`."""


def _are_unique(names: Sequence[str]) -> bool:
    return len(set(names)) == len(names)


def reward_names(rewards: Sequence[RewardSource]) -> list[str]:
    """What each of `rewards` is called: its own name, or one that says what it is and that no other has."""
    taken = {reward.name for reward in rewards if reward.name is not None}
    names = []
    for reward in rewards:
        name = reward.name or _unused(_derived_name(reward), taken)
        taken.add(name)
        names.append(name)
    return names


def _derived_name(reward: RewardSource) -> str:
    if reward.function is not None:
        words = re.sub(r"[^a-z0-9_]+", "_", reward.function.call.rpartition(":")[2].lower()).lstrip("_0123456789")
        return words[: _MAX_NAME_LENGTH - 4] or "function"
    return reward.metric.kind.replace("-", "_") if reward.metric is not None else reward.chosen


def _unused(name: str, taken: set[str]) -> str:
    numbered = (f"{name}_{number}" for number in range(2, 100))
    return name if name not in taken else next(other for other in numbered if other not in taken)
