"""Two gloo ranks with a real ZeRO-3 engine and unequal work write what one process with the whole model writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.trainers.rollout.writers import PROMPTS, engine_for, policy, requests_for
from tests.trainers.rollout.zero3_writer import DRAWN, END_IDS, shares
from tests.trainers.two_ranks import run_two_ranks

pytestmark = pytest.mark.training


def test_ranks_with_more_work_less_or_none_write_the_answers_of_one_process(tmp_path: Path) -> None:
    wanted = engine_for(policy(tmp_path / "model"), END_IDS).generate(requests_for(PROMPTS), DRAWN)
    assert len({len(answer.ids) for answer in wanted}) > 2, "answers of one length would not show a rank that waits"
    run_two_ranks("tests.trainers.rollout.zero3_writer", tmp_path)
    for number in range(2):
        found = json.loads((tmp_path / f"rank-{number}.json").read_text())
        assert len(found) == 6
        for call, answers in found.items():
            own = shares()[int(call.split()[1]) * 2 + number]
            assert len(answers) == len(own)
            for index, answer in zip(own, answers, strict=True):
                assert (answer["ids"], answer["ended"]) == (wanted[index].ids, wanted[index].ended)
                assert answer["log_probs"] == pytest.approx(wanted[index].log_probs, abs=1e-4)
