"""A policy without dropout, wherever its architecture keeps the probability."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_trainers.online.dropout import disable_dropout
from tests.trainers.tiny import VOCABULARY, tiny_model


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        pytest.param("Llama", {"attention_dropout": 0.5}, id="in its attention"),
        pytest.param("GPT2", {"embd_pdrop": 0.5, "resid_pdrop": 0.5}, id="in layers of its own"),
        pytest.param("Falcon", {"hidden_dropout": 0.5, "attention_dropout": 0.5}, id="in its configuration"),
        pytest.param("Persimmon", {"attention_dropout": 0.5}, id="in the configuration, for attention"),
    ],
)
def test_a_model_that_learns_drops_nothing(
    architecture: str, config: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tiny_model(tmp_path, architecture, **config)
    ids = torch.arange(3, 40)[None] % VOCABULARY
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        assert not model.train()(ids).logits.equal(wanted), "there is dropout"
        with caplog.at_level(logging.INFO):
            disable_dropout(model)
        found = model(ids).logits
    assert model.training
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)
    assert sum("Dropout of up to 0.5 is off" in message for message in caplog.messages) == 1
