"""How a document is written and read: canonical JSON with a version and its own digest. Pure.

Canonical is: sorted keys, no spaces, UTF-8; under `digest` the SHA-256 of all that stands beside it. Reading demands
the very bytes that writing makes, so that no changed byte goes unseen.

The upgrade rule. `version` counts up with every change of any model in `manifest`, additions included, because readers
refuse keys that they do not know. A reader takes its own version and all older ones: each version has one function in
`_UPGRADES` that turns its document into one of the next version, and these functions stay for ever, each with a file
that its version wrote among the tests. A version newer than one's own is refused by name and never guessed at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import JsonValue, ValidationError

from finetune_api.base import Contract

__all__ = ["VERSION", "BadDocumentError", "canonical", "kind_of", "parse", "sealed"]

VERSION = 1

Model = TypeVar("Model", bound=Contract)

_UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
"""Version -> what makes a document of the next version out of one."""


class BadDocumentError(ValueError):
    """A file is not what its name says; the message tells in what way."""


def canonical(document: JsonValue) -> bytes:
    """The one way to write a JSON document. Raises ValueError for NaN and infinities, which JSON does not have."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def sealed(model: Contract) -> bytes:
    """The file of a model: canonical, with its digest."""
    document = model.to_document()
    return canonical(document | {"digest": hashlib.sha256(canonical(document)).hexdigest()})


def parse(data: bytes, model: type[Model]) -> Model:
    """The inverse of `sealed`, after upgrades. Raises BadDocumentError."""
    document = _opened(data)
    _demand_kind(document, model)
    try:
        return model.model_validate(_upgraded(document))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise BadDocumentError(f"is not as its version has it: {where}: {first['msg']}") from None


def kind_of(data: bytes) -> str | None:
    """What a document says that it is. Raises BadDocumentError when it is damaged."""
    kind = _opened(data).get("kind")
    return kind if isinstance(kind, str) else None


def _opened(data: bytes) -> dict[str, Any]:
    """The document without its digest, which was right."""
    try:
        document = json.loads(data)
        canonical_again = canonical(document)
    except (ValueError, RecursionError) as error:
        raise BadDocumentError(f"is not JSON ({len(data)} bytes): {error}") from None
    if not isinstance(document, dict) or canonical_again != data:
        raise BadDocumentError("is not in canonical form: it was edited, or is not whole")
    digest = document.pop("digest", None)
    if digest != hashlib.sha256(canonical(document)).hexdigest():
        raise BadDocumentError("does not have the content that its digest was taken of")
    return document


def _demand_kind(document: dict[str, Any], model: type[Contract]) -> None:
    kind = model.model_fields["kind"].default
    if document.get("kind") != kind:
        raise BadDocumentError(f"is of kind {document.get('kind')!r} where {kind!r} is expected")


def _upgraded(document: dict[str, Any]) -> dict[str, Any]:
    version = document.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise BadDocumentError(f"has version {version!r}; this release reads versions 1 to {VERSION}")
    for older in range(version, VERSION):
        document = _UPGRADES[older](document)
    return document
