"""A store finds what it holds, by key and by every index, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.kinds import Key
from finetune_operator.raw import Document, key_of, version_of
from finetune_operator.runtime.store import Store
from tests.operator.runtime.fakes import thing


def by_owner(document: Document) -> Iterable[str]:
    return document["owners"]  # type: ignore[no-any-return]


def owned(name: str, *owners: str) -> Document:
    return thing(name, owners=list(owners))


def found(store: Store, owner: str) -> list[str]:
    return [key_of(document).name for document in store.by_index("owner", owner)]


def test_a_document_is_found_under_each_of_its_values() -> None:
    store = Store({"owner": by_owner})
    store.put(owned("a", "x", "y", "x"))
    store.put(owned("b", "y"))
    store.put(owned("c"))
    assert (found(store, "x"), found(store, "y"), found(store, "z")) == (["a"], ["a", "b"], [])
    assert len(store) == 3


def test_a_change_moves_it_to_its_new_values() -> None:
    store = Store({"owner": by_owner})
    first, second = owned("a", "x", "y"), owned("a", "y", "z")
    assert store.put(first) is None
    assert store.put(second) is first
    assert [found(store, owner) for owner in "xyz"] == [[], ["a"], ["a"]]
    assert store.get(Key("default", "a")) is second


def test_what_is_removed_is_found_nowhere_and_leaves_no_empty_index_behind() -> None:
    store = Store({"owner": by_owner})
    document = owned("a", "x")
    store.put(document)
    assert store.remove(Key("default", "a")) is document
    assert store.remove(Key("default", "a")) is None
    assert (found(store, "x"), store.list(), len(store)) == ([], [], 0)
    assert store._indexes == {"owner": {}}


def test_an_indexer_that_raises_leaves_the_store_as_it_was() -> None:
    store = Store({"owner": by_owner})
    before = owned("a", "x")
    store.put(before)
    with pytest.raises(KeyError):
        store.put(thing("a"))
    assert store.list() == store.by_index("owner", "x") == [before]


def test_an_index_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(KeyError):
        Store().by_index("owner", "x")


def test_an_object_of_the_cluster_has_no_namespace_in_its_key() -> None:
    assert key_of({"metadata": {"name": "a"}}) == Key("", "a")
    assert version_of({"metadata": {"name": "a"}}) == version_of({}) == ""


@given(st.lists(st.tuples(st.sampled_from("abc"), st.none() | st.lists(st.sampled_from("xyz"), max_size=3))))
def test_indexes_agree_with_a_search_through_everything(writes: list[tuple[str, list[str] | None]]) -> None:
    store = Store({"owner": by_owner})
    for name, owners in writes:
        if owners is None:
            store.remove(Key("default", name))
        else:
            store.put(owned(name, *owners))
    for owner in "xyz":
        assert sorted(found(store, owner)) == sorted(
            key_of(document).name for document in store.list() if owner in document["owners"]
        )
