"""The page of `finetune describe`: with how many of its workers a job trains."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from finetune_api.job import JobProgress, Resolved, Status
from finetune_client.advice import Advice
from finetune_client.cli.jobs.page import page
from finetune_client.client import Description
from finetune_client.views import JobView

RESOLVED = Resolved(
    world_size=4,
    gpus=0,
    global_batch_size=16,
    micro_batch_size=2,
    gradient_accumulation_steps=2,
    zero_stage=2,
    precision="fp32",
)


@pytest.mark.parametrize(("now", "told"), [(None, "  4 processes"), (4, "  4 processes"), (2, "  2 of 4 processes")])
def test_it_says_with_how_many_of_its_processes_a_job_trains(now: int | None, told: str) -> None:
    status = Status(resolved=RESOLVED, progress=JobProgress(step=3, world_size=now))
    view = JobView("example", "default", status, {"metadata": {"name": "example"}})
    lines = list(page(Description(view, Advice(), []), datetime(2030, 1, 1, tzinfo=UTC)))
    [workers] = [line for line in lines if line.strip().startswith("workers ")]
    assert workers.replace("workers", "").strip().startswith(told.strip()), workers
