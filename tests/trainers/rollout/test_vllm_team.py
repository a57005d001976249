"""Two gloo ranks with a real ZeRO-3 engine share one vLLM, and each has the answers to its own requests.

Against the stand-in by transformers, and in a lane of its own against vLLM itself, with each weight in two parts.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from finetune_trainers.errors import UserError
from finetune_trainers.rollout.vllm_process import VARIABLE
from finetune_trainers.rollout.vllm_team import Team
from tests.trainers.factories import tiny_plan
from tests.trainers.online.online_world import METHODS
from tests.trainers.rollout.test_vllm import BOTH, TOLERANCE, head_of_32
from tests.trainers.rollout.vllm_compared import differing_weights
from tests.trainers.rollout.vllm_environments import real_python, stand_in_python
from tests.trainers.rollout.vllm_team_writer import DRAWN
from tests.trainers.rollout.writers import PROMPTS, Alone, engine_for, requests_for
from tests.trainers.rollout.zero3_writer import END_IDS, shares
from tests.trainers.two_ranks import run_two_ranks

pytestmark = pytest.mark.training


@pytest.mark.parametrize("which", BOTH)
def test_ranks_that_share_a_vllm_have_each_the_answers_to_their_own_requests(
    which: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, real_python() if which == "vllm" else stand_in_python(tmp_path / "environment"))
    module = head_of_32(tmp_path / "model")
    wanted = engine_for(module, END_IDS).generate(requests_for(PROMPTS), DRAWN)
    plan = tiny_plan(tmp_path / "model", tmp_path / "rows.jsonl", {"method": METHODS["grpo"]})
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    run_two_ranks("tests.trainers.rollout.vllm_team_writer", tmp_path)
    ranks: list[dict[str, Any]] = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    for number, rank in enumerate(ranks):
        for call, answers in enumerate(rank["answers"]):
            own = shares()[call * 2 + number]
            assert [answer["ids"] for answer in answers] == [wanted[index].ids for index in own]
            for index, answer in zip(own, answers, strict=True):
                assert answer["log_probs"] == pytest.approx(wanted[index].log_probs, abs=TOLERANCE)
    weights: dict[str, Tensor] = dict(module.named_parameters())
    num_parts = 2 if which == "vllm" else 1
    assert len(ranks[0]["digests"]) == 2
    for part, seen in enumerate(ranks[0]["digests"]):
        assert seen
        assert not differing_weights(seen, weights, part % num_parts, num_parts)
    assert [rank["processes"] for rank in ranks] == [1, 0], "one of the two has it"
    assert [rank["left"] for rank in ranks] == [0, 0]
    asked_first = len(shares()[0])
    assert [asked_first, asked_first] in ranks[0]["told"], "of its own requests"
    assert all(done <= num <= asked_first for done, num in ranks[0]["told"])
    assert ranks[0]["refused"].startswith("spec.method.grpo.vllm")
    assert ranks[1]["refused"] == ranks[0]["refused"], "who does not lead hears why, too"


class OnTwoMachines(Alone):
    world_size = 2

    def all_gather_object(self, value: tuple[str, str]) -> list[tuple[str, str]]:
        return [value, ("another", value[1])]


def test_ranks_of_two_machines_do_not_share_a_vllm() -> None:
    context: Any = OnTwoMachines()
    with pytest.raises(UserError, match=r"vllm.tensorParallelSize: 2: processes 0 to 1 are not on one machine"):
        Team(context, 2, "spec.method.ppo.vllm.tensorParallelSize")
