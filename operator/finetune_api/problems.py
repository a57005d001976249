"""Turns what pydantic finds wrong into sentences a person can act on: field path, value received, what would be right.

Called by `manifests` for files and by the operator for objects from the API server.
"""

from __future__ import annotations

import difflib
import json
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from finetune_api.failures import Problem

__all__ = ["InvalidManifest", "problems_of", "shorten", "validate_document"]

_VALUE_LENGTH = 80
_Model = TypeVar("_Model", bound=BaseModel)

_PATTERNS = {
    "^[a-z]([-a-z0-9]*[a-z0-9])?$": "must be lower-case letters, digits and '-', starting with a letter",
    "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$": "must be lower-case letters, digits and '-'",
    "^[0-9]+(\\.[0-9]+)?[MBT]$": "must be a size such as 135M, 8B or 1.2T",
    "^[A-Za-z_][A-Za-z0-9_]*([.][A-Za-z_][A-Za-z0-9_]*)*:[A-Za-z_][A-Za-z0-9_]*$": "must be module:function, such as"
    " my_rewards.maths:is_right",
    "^https?://[^/?#@\\s]+([/?][^#\\s]*)?$": "must be http://host/path or https://host/path, without a user name",
}

_TYPES = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text; put it in quotes",
    "list_type": "must be a list; start each item with '- '",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "model_attributes_type": "must be a mapping of keys to values",
    "missing": "is required",
}


class InvalidManifest(ValueError):
    """One or more objects are not what the contract asks for."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def validate_document(model: type[_Model], document: object, file: str | None = None) -> _Model:
    """Read `document` (plain YAML or JSON values) as `model`, without converting types silently.

    Raises InvalidManifest with one Problem for each fault.
    """
    try:
        text = json.dumps(document, default=str)
    except (ValueError, RecursionError):  # a YAML alias can make a mapping its own member
        raise InvalidManifest([Problem(file=file, message="is nested too deeply, or contains itself")]) from None
    try:
        # The snake_case names are Python's own: a cluster knows only the camelCase ones.
        return model.model_validate_json(text, strict=True, by_alias=True, by_name=False)
    except ValidationError as error:
        raise InvalidManifest(problems_of(error, model, file)) from None


def problems_of(error: ValidationError, model: type[BaseModel], file: str | None = None) -> list[Problem]:
    """One Problem for each error of a validation of `model`."""
    return [_problem(details, model, file) for details in error.errors(include_url=False)]


def shorten(value: object) -> str:
    """`value` as JSON, cut to a length that fits in a message."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _VALUE_LENGTH else text[: _VALUE_LENGTH - 1] + "…"


def _problem(details: ErrorDetails, model: type[BaseModel], file: str | None) -> Problem:
    location, value = details["loc"], details["input"]
    if details["type"] == "rule" and (field := details["ctx"]["field"]):
        location, value = (*location, *field.split(".")), details["ctx"]["found"]
    found = None if details["type"] == "missing" else shorten(value)
    return Problem(file=file, path=_path(location), value=found, message=_message(details, model))


def _path(location: Sequence[int | str]) -> str | None:
    text = ""
    for step in location:
        text += f"[{step}]" if isinstance(step, int) else f".{step}"
    return text.removeprefix(".") or None


def _message(details: ErrorDetails, model: type[BaseModel]) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind in _TYPES:
        return _TYPES[kind]
    match kind:
        case "extra_forbidden":
            return _unknown_field(str(details["loc"][-1]), _model_at(model, details["loc"][:-1]))
        case "literal_error" | "enum":
            return f"must be {context['expected']}".replace("'", "")
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}"
        case "greater_than":
            return f"must be above {context['gt']:g}"
        case "less_than_equal":
            return f"must be at most {context['le']:g}"
        case "less_than":
            return f"must be below {context['lt']:g}"
        case "string_pattern_mismatch":
            return _PATTERNS.get(context["pattern"], f"must match {context['pattern']}")
        case "string_too_long":
            return f"must have at most {context['max_length']} characters"
        case "string_too_short":
            return "must not be empty"
        case "too_long":
            return f"must have at most {context['max_length']} entries, not {context['actual_length']}"
        case "too_short":
            return f"must have at least {context['min_length']} entry"
        case "value_error":
            return str(context["error"])
        case _:
            return details["msg"]


def _unknown_field(name: str, owner: type[BaseModel] | None) -> str:
    if owner is None:
        return "is not a known field; remove it"
    known = [field.alias or key for key, field in owner.model_fields.items()]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"is not a known field; {hint}known here: {', '.join(known) or 'none'}"


def _model_at(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel] | None:
    """The model that stands at `location` below `model`."""
    here: type[BaseModel] | None = model
    for step in location:
        if isinstance(step, int):
            continue
        if here is None:
            return None
        fields = {field.alias or name: field for name, field in here.model_fields.items()}
        here = _first_model(fields[step].annotation) if step in fields else None
    return here


def _first_model(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(_first_model, typing.get_args(annotation))), None)
