"""The chart's values.schema.json, from its values: Helm then refuses unknown keys and wrong types."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from helm.generator.values import Group, Section, Value

__all__ = ["render_schema", "values_schema"]

_ANYTHING = {"type": "object"}


def values_schema(
    sections: Iterable[Section], definitions: Mapping[str, Any], subcharts: Iterable[str]
) -> dict[str, Any]:
    """The JSON schema. `subcharts` are the groups whose values go to another chart.

    Helm adds `global` to the values of a chart that has a parent, and to those of each subchart.
    """
    charts = set(subcharts)
    members = tuple(member for section in sections for member in section.members)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the chart finetune-operator",
        **_object(members, charts, shares=True),
        "definitions": dict(definitions),
    }


def render_schema(schema: Mapping[str, Any]) -> str:
    """The schema as a file."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def _object(members: Iterable[Value | Group], charts: set[str], shares: bool) -> dict[str, Any]:
    properties = {member.path[-1]: _member(member, charts) for member in members}
    if shares:
        properties["global"] = _ANYTHING
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _member(member: Value | Group, charts: set[str]) -> dict[str, Any]:
    if isinstance(member, Group):
        return _object(member.members, charts, shares=len(member.path) == 1 and member.path[0] in charts)
    return {"description": member.says, "default": member.default, **member.schema}
