"""A document that was read before is not read again, and a changed one always is."""

from __future__ import annotations

from typing import Any

from finetune_operator.remembered import Remembered


class Reader:
    """Reads the value of a document, and counts."""

    def __init__(self, size: int = 10) -> None:
        self.times = 0
        self.remembered = Remembered(self._read, size)

    def _read(self, document: Any) -> Any:
        self.times += 1
        return document.get("value")


def document(uid: str | None, value: int) -> dict[str, Any]:
    return {"metadata": {"uid": uid}, "value": value}


def test_the_same_document_is_read_once() -> None:
    reader, one = Reader(), document("a", 1)
    assert [reader.remembered(one) for _ in range(3)] == [1, 1, 1]
    assert reader.times == 1


def test_a_newer_version_takes_the_older_ones_place() -> None:
    reader, old, new = Reader(), document("a", 1), document("a", 2)
    assert [reader.remembered(one) for one in (old, new, old)] == [1, 2, 1]
    assert reader.times == 3


def test_an_equal_document_is_not_the_same() -> None:
    reader = Reader()
    assert reader.remembered(document("a", 1)) == reader.remembered(document("a", 1))
    assert reader.times == 2


def test_what_has_no_uid_is_read_each_time() -> None:
    reader, one = Reader(), document(None, 1)
    assert [reader.remembered(one) for _ in range(2)] == [1, 1]
    assert reader.times == 2


def test_the_longest_unused_is_forgotten_first() -> None:
    reader = Reader(size=2)
    a, b, c = (document(uid, 1) for uid in "abc")
    for one in (a, b, a, c, a):
        reader.remembered(one)
    assert reader.times == 3
    reader.remembered(b)
    assert reader.times == 4
