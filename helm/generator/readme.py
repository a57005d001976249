"""The chart's README.md: README.in.md with the tables of values put in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from helm.generator.values import Section, Value

__all__ = ["render_readme"]

_LONGEST_DEFAULT = 72


def render_readme(page: str, sections: Iterable[Section], chart: Mapping[str, Any]) -> str:
    """The page with VERSION, APP_VERSION and VALUES replaced."""
    tables = "\n\n".join(_table(section) for section in sections)
    replaced = page.replace("@VERSION@", chart["version"]).replace("@APP_VERSION@", chart["appVersion"])
    return replaced.replace("@VALUES@", tables)


def _table(section: Section) -> str:
    rows = [f"| `{'.'.join(value.path)}` | {_default(value)} | {_cell(_says(value))} |" for value in section.values()]
    return "\n".join([f"### {section.title}", "", "| Value | Default | What it is |", "|---|---|---|", *rows])


def _says(value: Value) -> str:
    """The sentence, and the limits that the schema sets."""
    schema = value.schema
    if "enum" in schema:
        return f"{value.says} One of {', '.join(f'`{one}`' for one in schema['enum'])}."
    if "minimum" in schema and "maximum" in schema:
        return f"{value.says} From {schema['minimum']} to {schema['maximum']}."
    return value.says


def _default(value: Value) -> str:
    text = json.dumps(value.default, ensure_ascii=False)
    return f"`{_cell(text)}`" if len(text) <= _LONGEST_DEFAULT else "see values.yaml"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
