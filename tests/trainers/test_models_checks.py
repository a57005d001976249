"""What a look at a model finds beyond single mistakes, which are rows of tests/bad_input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import Problem
from finetune_api.spec import Precision
from finetune_trainers.errors import UserError
from finetune_trainers.models import prepare_model
from tests.trainers.tiny import plan_for, tiny_model


def problems_of(folder: Path, changes: dict[str, Any] | None = None) -> list[Problem]:
    with pytest.raises(UserError) as caught:
        prepare_model(plan_for(folder, changes), folder.parent / "cache", lambda _percent, _text: None)
    assert "Traceback" not in caught.value.message
    return caught.value.problems


def test_a_broken_gguf_file_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(8))
    problems_of(tmp_path / "cut.gguf")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_quantization_without_bitsandbytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tiny_model(tmp_path / "model")
    [problem] = problems_of(tmp_path / "model", {"tuning": {"lora": {"quantization": "nf4"}}})
    assert problem.path == "spec.tuning.lora.quantization"
    assert "pip install 'finetune-operator[quantization]'" in problem.message


def test_four_bits_on_a_cpu_are_refused_where_they_would_be_read_wrongly(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", hidden_size=64, intermediate_size=96)
    [problem] = problems_of(tmp_path / "model", {"tuning": {"lora": {"quantization": "nf4"}}})
    assert problem.path == "spec.tuning.lora.quantization"
    assert "a multiple of 64, unlike model.layers.0.mlp.down_proj of this model; set int8" in problem.message


def test_fp16_on_a_cpu_is_refused_in_a_plan_that_was_not_made_by_planning(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    plan = plan_for(tmp_path / "model").model_copy(update={"precision": Precision.FP16})
    with pytest.raises(UserError, match=r"spec\.training\.precision: fp16 needs a GPU"):
        prepare_model(plan, tmp_path / "cache", lambda _percent, _text: None)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    changes = {"method.sft.maxSeqLength": 1024, "tuning": {"lora": {"targetModules": ["w1", "w2"]}}}
    assert len(problems_of(tmp_path / "model", changes)) == 3
