"""What the operator asks of a cluster, and no more: documents in, documents out.

`cluster.kubernetes` implements it for an API server, `local` in memory. Whatever decides or builds knows neither.
Every method may raise what `errors` lists; what is said here is only what each means by it.
"""

from __future__ import annotations

from typing import Any, Protocol

from finetune_operator.kinds import Key, Kind
from finetune_operator.runtime.reflector import ListWatch

__all__ = ["FIELD_MANAGER", "Cluster", "Document"]

Document = dict[str, Any]
"""An object as JSON has it. Whoever is given one leaves it as it is."""

FIELD_MANAGER = "finetune-operator"
"""The name under which the API server files what the operator has written."""


class Cluster(Protocol):
    """Reads and writes the objects of a cluster."""

    async def get(self, kind: Kind, key: Key) -> Document | None:
        """The object as it is now, not as it was last watched; None where there is none, or no such kind."""
        ...

    async def create(self, kind: Kind, document: Document) -> Document:
        """Writes a new object and returns it as stored. AlreadyExists where the name is taken."""
        ...

    async def apply(self, kind: Kind, document: Document) -> Document:
        """Server-side apply: the fields in `document` become so, and the field manager's, by force."""
        ...

    async def merge(self, kind: Kind, key: Key, patch: Document) -> Document:
        """JSON merge patch: null removes. With metadata.resourceVersion in it, Conflict where that is stale."""
        ...

    async def replace_status(self, kind: Kind, document: Document) -> Document:
        """Writes `status` and nothing else. Conflict where the document's resourceVersion is stale."""
        ...

    async def delete(self, kind: Kind, key: Key, uid: str | None, propagation: str = "Background") -> None:
        """Deletes the object if its uid is the one given. One that is absent, or another by now, is left alone."""
        ...

    def source(self, kind: Kind, namespace: str | None = None, label_selector: str | None = None) -> ListWatch:
        """What a reflector reads: the kind in one namespace, or None for all, narrowed by labels."""
        ...
