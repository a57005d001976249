"""What makes two checkpoints ones of the same training, also where another release saved one of them."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.spec import Lora
from finetune_trainers.checkpoint.identity import differences, trainings
from finetune_trainers.checkpoint.manifest import DataState
from tests.trainers.checkpoint.synthetic import intent

LORA = Lora(rank=4).model_dump(mode="json", exclude_none=True)


def data(digest: str) -> DataState:
    return DataState(seed=7, epoch=0, cursor=0, digest=digest)


def test_a_field_that_an_older_release_did_not_have_is_as_its_default_has_it() -> None:
    older = {name: value for name, value in LORA.items() if name != "quantization"}
    assert differences(intent(adapter=older), intent(adapter=LORA)) == []


@pytest.mark.parametrize(
    "adapter", [None, LORA | {"rank": 8}, LORA | {"quantization": "int8"}, LORA | {"magnitude": True}, {"rank": "x"}]
)
def test_another_adapter_or_one_with_fields_that_nobody_knows_is_another_training(adapter: Any) -> None:
    other = ["it trained other parameters (spec.tuning differs)"]
    assert differences(intent(adapter=adapter), intent(adapter=LORA)) == other
    assert differences(intent(adapter=adapter), intent(adapter=adapter)) == []


@pytest.mark.parametrize(
    ("found", "mine", "same"),
    [
        ("a", "a", True),
        ("made-of", "content+made-of", True),
        ("content+made-of", "content+made-of-by-newer-code", True),
        ("content+made-of", "other+made-of-by-newer-code", False),
        ("made-of", "content+made-of-by-newer-code", False),
    ],
)
def test_data_is_the_same_when_its_content_is_or_what_it_was_made_of(found: str, mine: str, same: bool) -> None:
    assert (differences(intent(data=data(found)), intent(data=data(mine))) == []) == same


def test_checkpoints_of_three_releases_in_a_row_are_of_one_training() -> None:
    digests = ["content+made-of-2", "content+made-of-1", "made-of-1", "else"]
    assert trainings(intent(data=data(digest)) for digest in digests) == [0, 0, 0, 1]
