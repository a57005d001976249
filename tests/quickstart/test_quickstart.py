"""The quickstart itself on the real 135M model, with fewer rows: its manifest, its data, its two commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.e2e

SAMPLE = Path(__file__).parents[2] / "manifests" / "samples" / "quickstart"
FINETUNE = [sys.executable, "-m", "finetune_client"]
FEWER_ROWS = ["--set", "data.train[0].maxRows=48", "--set", "data.eval[0].maxRows=8"]


@dataclass(frozen=True)
class Tuned:
    """The run's folder, and what `finetune run -o json` printed."""

    folder: Path
    document: dict[str, Any]


def finetune(*arguments: str | Path) -> str:
    done = subprocess.run([*FINETUNE, *map(str, arguments)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    folder = tmp_path_factory.mktemp("quickstart")
    shutil.copy(SAMPLE / "job.yaml", folder)
    make_data = [sys.executable, str(SAMPLE / "make_data.py"), "--folder", str(folder / "data")]
    subprocess.run(make_data, check=True, capture_output=True, env=os.environ, timeout=300)
    printed = finetune("run", folder / "job.yaml", "--workdir", folder / "run", *FEWER_ROWS, "-o", "json")
    return Tuned(folder, json.loads(printed))


def test_a_real_model_learns_from_real_text(tuned: Tuned) -> None:
    losses = tuned.document["eval"]
    assert tuned.document["phase"] == "Succeeded"
    assert 0 < losses["lossAfter"] < losses["lossBefore"]


def test_the_tuned_model_answers_a_held_out_question_beside_the_base_model(tuned: Tuned) -> None:
    question = (tuned.folder / "data" / "question.txt").read_text()
    asked = ("chat", tuned.folder / "run", question, "--compare-base", "--max-new-tokens", "16")
    answer = json.loads(finetune(*asked, "-o", "json"))
    assert answer["prompt"] == question
    assert answer["tuned"].strip()
    assert answer["base"].strip()
    assert answer["tuned"] != answer["base"]
