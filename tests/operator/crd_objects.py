"""Objects that the API server can hold, drawn from a CRD's own schema: for tests that throw anything at the operator.

Only the structural schema is obeyed; what CEL refuses is drawn too, since rules can be added to a CRD while older
objects are in place. Times are drawn among those that the server takes for a date-time and programs stumble over.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from hypothesis import strategies as st

from finetune_api.schema import custom_resource_definitions

__all__ = ["JSON", "finetune_jobs", "finetune_runtimes"]

Schema = dict[str, Any]

JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
_TIMES = st.sampled_from(
    [
        *("2026-01-01T12:00:00Z", "2026-01-01T11:00:00.123456789Z", "2026-01-01T12:00:00+14:00"),
        *("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z", "9999-12-31T23:59:59-12:00", "2026-01-01T12:00:00"),
    ]
)
_TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["", "Valid", "Complete", "Failed", "Suspended", "True", "FailurePolicy", "NodeLost", "example-1"]),
)
_URIS = st.sampled_from(
    [
        "hf://org/name",
        "file:///x",
        "job://sft",
        "job://example",
        "pvc://c/p",
        "s3://bucket/p",
        "package://p/q",
        "hf://?",
    ]
)


def finetune_jobs() -> st.SearchStrategy[Any]:
    """Specs and statuses of FineTuneJobs: {"spec": ..., "status": ...}; the latter is sometimes absent."""
    return _object_of("finetunejobs.finetune-operator.io.yaml")


def finetune_runtimes() -> st.SearchStrategy[Any]:
    """Specs of FineTuneRuntimes."""
    return _object_of("finetuneruntimes.finetune-operator.io.yaml")


@cache
def _object_of(name: str) -> st.SearchStrategy[Any]:
    version = custom_resource_definitions()[name]["spec"]["versions"][0]
    top = version["schema"]["openAPIV3Schema"]
    kept = {key: child for key, child in top["properties"].items() if key in ("spec", "status")}
    return _values({**top, "properties": kept})


def _values(schema: Schema) -> st.SearchStrategy[Any]:
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema.get("x-kubernetes-int-or-string"):
        return st.integers(-5, 70_000) | st.just("auto") | st.text(max_size=5)
    match schema.get("type"):
        case "object" if "properties" in schema:
            return _object(schema)
        case "object" if "additionalProperties" in schema:
            return st.dictionaries(_TEXTS, _values(schema["additionalProperties"]), max_size=3)
        case "object":
            return st.dictionaries(st.text(max_size=5), JSON, max_size=3)
        case "array":
            return st.lists(_values(schema["items"]), min_size=schema.get("minItems", 0), max_size=3)
        case "string":
            return _strings(schema)
        case "integer":
            return _integers(schema)
        case "number":
            low, high = schema.get("minimum"), schema.get("maximum")
            return st.floats(
                low, high, allow_nan=False, allow_infinity=False, exclude_min=bool(schema.get("exclusiveMinimum"))
            )
        case "boolean":
            return st.booleans()
    return JSON


@st.composite
def _object(draw: st.DrawFn, schema: Schema) -> dict[str, Any]:
    """What is required, and a few of the others: all of them would be one large object after another."""
    properties, required = schema["properties"], schema.get("required", [])
    optional = [name for name in properties if name not in required]
    chosen = draw(st.lists(st.sampled_from(optional), unique=True, max_size=5)) if optional else []
    return {name: draw(_values(properties[name])) for name in [*required, *chosen]}


def _strings(schema: Schema) -> st.SearchStrategy[str]:
    if schema.get("format") == "date-time":
        return _TIMES
    pattern = schema.get("pattern")
    if pattern is None:
        return _TEXTS.filter(lambda text: len(text) >= schema.get("minLength", 0))
    if "://" in pattern:
        return _URIS.filter(lambda uri: re.search(pattern, uri) is not None)
    matching: st.SearchStrategy[str] = st.from_regex(str(pattern), fullmatch=True)
    return matching.filter(lambda text: len(text) <= schema.get("maxLength", 1024))


def _integers(schema: Schema) -> st.SearchStrategy[int]:
    low, high = schema.get("minimum"), schema.get("maximum")
    within = st.integers(low if low is not None else -(2**63), high if high is not None else 2**63 - 1)
    small = st.integers(low if low is not None else -1, min(high, (low or 0) + 5) if high is not None else 5)
    return small | within
