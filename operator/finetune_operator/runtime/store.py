"""The objects of one kind as last seen, by key and by index. A reflector writes it; everybody else reads it.

Documents are shared, not copied: whoever reads one leaves it as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, KeysView, Mapping

from finetune_operator.kinds import Key
from finetune_operator.raw import Document, key_of

__all__ = ["Documents", "Indexer", "Store"]

Documents = list[Document]
Indexer = Callable[[Document], Iterable[str]]
"""The values under which a document is to be found; a pure function, since it is asked again at removal."""


class Store:
    """A dictionary with indexes. Each write costs as much as the object has index values, however many are held."""

    def __init__(self, indexers: Mapping[str, Indexer] | None = None) -> None:
        """`indexers` by the name that `by_index` is asked with."""
        self._documents: dict[Key, Document] = {}
        self._indexers = dict(indexers or {})
        # Keys in a dict rather than a set: what is read from an index comes in the order it was told.
        self._indexes: dict[str, dict[str, dict[Key, None]]] = {name: {} for name in self._indexers}

    def __len__(self) -> int:
        return len(self._documents)

    def get(self, key: Key) -> Document | None:
        """The document, or None."""
        return self._documents.get(key)

    def keys(self) -> KeysView[Key]:
        """All keys, live: make a list of them before changing the store."""
        return self._documents.keys()

    def list(self) -> Documents:
        """All documents."""
        return [*self._documents.values()]

    def by_index(self, name: str, value: str) -> Documents:
        """The documents that the indexer `name` finds under `value`; KeyError where there is no such indexer."""
        return [self._documents[key] for key in self._indexes[name].get(value, ())]

    def put(self, document: Document) -> Document | None:
        """Holds the document instead of the earlier one, which is returned."""
        key = key_of(document)
        values = self._values(document)  # first of all: an indexer that raises leaves the store as it was
        old = self.remove(key)
        self._documents[key] = document
        for name, value in values:
            self._indexes[name].setdefault(value, {})[key] = None
        return old

    def remove(self, key: Key) -> Document | None:
        """Forgets the document and returns it."""
        old = self._documents.pop(key, None)
        for name, value in self._values(old) if old is not None else ():
            index = self._indexes[name]
            index[value].pop(key, None)
            if not index[value]:
                del index[value]
        return old

    def _values(self, document: Document) -> set[tuple[str, str]]:
        return {(name, value) for name, indexer in self._indexers.items() for value in indexer(document)}
