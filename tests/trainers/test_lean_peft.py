"""PEFT without bitsandbytes, until somebody quantizes: `test_quantization` shows that it is there then."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import finetune_trainers
from tests.trainers.needs import NEEDS_BITSANDBYTES
from tests.trainers.tiny import tiny_model

PROGRAM = """
import sys
from finetune_trainers.lean_peft import peft, with_bitsandbytes
from finetune_trainers.tuning import peft_warnings_off
from importlib.util import find_spec
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with peft_warnings_off():
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
print("bitsandbytes" in sys.modules, find_spec("bitsandbytes") is not None, peft.import_utils.is_bnb_available())
with_bitsandbytes()
print("bitsandbytes" in sys.modules, peft.import_utils.is_bnb_4bit_available(), peft.helpers.bnb.__name__)
"""


@NEEDS_BITSANDBYTES
def test_bitsandbytes_is_imported_when_it_is_asked_for_and_not_with_peft(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    said = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "model")], capture_output=True, text=True, check=True
    ).stdout
    before, after = said.splitlines()
    assert before == "False True False", "PEFT goes without it, and everybody else finds it"
    assert after == "True True bitsandbytes"


def test_no_module_imports_peft_past_it() -> None:
    [package] = finetune_trainers.__path__
    importing = {
        file.name
        for file in Path(package).rglob("*.py")
        if re.search(r"^\s*(import|from) peft\b", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert importing == {"lean_peft.py"}
