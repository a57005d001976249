"""Label selectors, as kubectl takes them: `a=b`, `a!=b`, `a`, `!a`, `a in (b,c)`, `a notin (b,c)`, joined by commas.

Used by `local.cluster`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from finetune_operator.errors import ApiError

__all__ = ["Selector", "parse_selector"]

Selector = Callable[[Mapping[str, str]], bool]
"""Whether an object with these labels is selected."""

_REQUIREMENT = re.compile(
    r"\s*(?:(?P<absent>!)\s*)?(?P<key>[\w./-]+)\s*"
    r"(?:(?P<equal>==?|!=)\s*(?P<value>[\w.-]*)|(?P<among>in|notin)\s*\((?P<values>[^()]*)\))?\s*(?:,|$)"
)


def parse_selector(text: str | None) -> Selector:
    """The selector behind `text`; none, or an empty one, selects everything. ApiError for what is not one."""
    requirements: list[Selector] = []
    position = 0
    while text and position < len(text):
        found = _REQUIREMENT.match(text, position)
        if found is None:
            raise ApiError(400, "BadRequest", f"unable to parse requirement: {text[position:]!r}")
        requirements.append(_requirement(found))
        position = found.end()
    return lambda labels: all(holds(labels) for holds in requirements)


def _requirement(found: re.Match[str]) -> Selector:
    key = found["key"]
    if found["equal"]:
        value, wanted = found["value"], found["equal"] != "!="
        return lambda labels: (labels.get(key) == value) is wanted
    if found["among"]:
        values, inside = {value.strip() for value in found["values"].split(",")}, found["among"] == "in"
        return lambda labels: (labels.get(key) in values) is inside
    present = found["absent"] is None
    return lambda labels: (key in labels) is present
