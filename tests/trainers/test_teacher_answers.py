"""Sequence-level distillation: the teacher writes the answers, once, and they are learned from like any data."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from finetune_api.plan import RunPlan
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.data.cache import SourceArrays, read_manifest
from finetune_trainers.launch import check
from finetune_trainers.methods import teacher_answers
from finetune_trainers.methods.teacher_answers import with_teacher_answers
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.teacher import load_teacher
from tests.trainers import reference
from tests.trainers.foreign_warnings import WHEN_TRAINING
from tests.trainers.school import School, curve

pytestmark = [pytest.mark.training, *WHEN_TRAINING]

LONGEST = 8


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory) -> School:
    return School.at(tmp_path_factory.mktemp("school"))


def asking(school: School, changes: dict[str, Any] | None = None, alpha: float = 1.0, **answers: Any) -> RunPlan:
    """The teacher writes at most eight tokens for each row."""
    written = {"maxNewTokens": LONGEST, **answers}
    return school.plan(changes, alpha=alpha, packing=False, teacherAnswers=written)


def written(school: School, plan: RunPlan, workdir: Path) -> tuple[PreparedRun, PreparedRun]:
    """What was prepared, and the same with the teacher's answers."""
    prepared = school.world.prepare(plan, workdir)
    assert prepared.teacher is not None
    context = SingleProcessContext(plan, workdir)
    teacher = load_teacher(prepared.teacher, plan, context.device)
    return prepared, with_teacher_answers(plan, prepared, teacher, context)


def rows(prepared: PreparedRun) -> Iterator[tuple[list[int], list[int]]]:
    """(prompt, answer) of each training row."""
    [source] = prepared.data.train
    arrays = SourceArrays(Path(source.folder))
    for start, end in pairwise(arrays.offsets.tolist()):
        begins = start + int(np.argmax(arrays.trained[start:end]))
        assert arrays.trained[begins:end].all()
        yield arrays.tokens[start:begins].tolist(), arrays.tokens[begins:end].tolist()


def test_greedy_answers_are_those_of_transformers(school: School, tmp_path: Path) -> None:
    before, after = written(school, asking(school), tmp_path)
    teacher: Any = AutoModelForCausalLM.from_pretrained(school.teacher)
    asked, answered = list(rows(before)), list(rows(after))
    assert [prompt for prompt, _ in answered] == [prompt for prompt, _ in asked]
    for prompt, answer in answered[:20]:
        ids = torch.tensor([prompt])
        wanted = teacher.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LONGEST)
        assert answer == wanted[0, len(prompt) :].tolist()


def test_the_steps_are_those_of_plain_transformers_on_the_answers(school: School, tmp_path: Path) -> None:
    for name, alpha in {"answers alone": 1.0, "probabilities too": 0.5}.items():
        plan = asking(school, alpha=alpha)
        _, after = written(school, plan, tmp_path / name / "prepared")
        school.train(plan, tmp_path / name)
        wanted = [step["loss"] for step in reference.train(plan, after)]
        assert curve(tmp_path / name, "loss") == pytest.approx(wanted, abs=1e-5)


def test_the_student_comes_to_write_like_its_teacher(school: School, tmp_path: Path) -> None:
    longer = {"training.maxSteps": 40, "training.learningRate": 0.01}
    school.train(asking(school, longer), tmp_path)
    losses = curve(tmp_path, "loss")
    assert losses[-1] < 0.8 * losses[0]


def test_evaluation_data_keeps_its_answers(school: School, tmp_path: Path) -> None:
    before, after = written(school, asking(school), tmp_path)
    assert after.data.eval == before.data.eval
    assert after.total_steps == before.total_steps
    assert after.data.train[0].num_sequences == before.data.train[0].num_sequences
    assert after.data.train[0].num_trained_tokens == sum(len(answer) for _, answer in rows(after))


def test_an_answer_is_cut_where_the_sequence_ends(school: School, tmp_path: Path) -> None:
    _, after = written(school, asking(school, maxNewTokens=200), tmp_path)
    lengths = [len(prompt) + len(answer) for prompt, answer in rows(after)]
    assert max(lengths) == 64


def test_a_later_attempt_finds_what_was_written(
    school: School, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = asking(school, temperature=1.0)
    school.world.prepare(plan, tmp_path)  # what is prepared says whether its rows lay in the cache already
    _, first = written(school, plan, tmp_path)

    class Mute:
        def __init__(self, *_: object, **__: object) -> None:
            raise AssertionError("all answers are there")

    monkeypatch.setattr(teacher_answers, "InProcessEngine", Mute)
    _, second = written(school, plan, tmp_path)
    assert second == first
    with pytest.raises(AssertionError, match="all answers are there"):
        written(school, asking(school, temperature=0.9), tmp_path)


def test_what_was_written_before_an_attempt_ended_early_is_not_written_again(
    school: School, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are asked in blocks of five: the first attempt ends in the third, and what it kept of the first is
    damaged."""
    plan = asking(school, {"training.seed": 41}, temperature=1.0)
    monkeypatch.setattr(teacher_answers, "KEPT_AT_ONCE", 5)
    write, blocks = teacher_answers._written, list[int]()

    def until_the_third(asked: Any, block: range, *others: Any) -> Any:
        blocks.append(block.start)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return write(asked, block, *others)

    monkeypatch.setattr(teacher_answers, "_written", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        written(school, plan, tmp_path)
    [damaged] = school.world.cache.glob("data/*-0.npy")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    _, resumed = written(school, plan, tmp_path)
    [source] = resumed.data.train
    assert blocks == [0, 5, 10, 0, *range(10, source.num_rows, 5)]
    assert not list(school.world.cache.glob("data/*-*.npy"))
    found, told = list(rows(resumed)), read_manifest(Path(source.folder))
    assert told is not None
    shutil.rmtree(source.folder)
    monkeypatch.setattr(teacher_answers, "KEPT_AT_ONCE", 1024)
    assert list(rows(written(school, plan, tmp_path)[1])) == found
    assert read_manifest(Path(source.folder)) == told


@pytest.mark.parametrize("decides", ["teacher", "rows", "seed", "precision"])
def test_answers_are_known_by_all_that_decides_them(decides: str, school: School, tmp_path: Path) -> None:
    plan = asking(school)
    prepared = school.world.prepare(plan, tmp_path)
    assert prepared.teacher is not None
    [source] = prepared.data.train
    known = teacher_answers._key(source, plan, prepared)
    match decides:
        case "teacher":
            other = prepared.teacher.model_copy(update={"digest": "of other weights"})
            prepared = prepared.model_copy(update={"teacher": other})
        case "rows":
            source = source.model_copy(update={"folder": f"{source.folder}-of-others"})
        case "seed":
            plan = asking(school, {"training.seed": 43})
        case _:
            plan = asking(school, {"training.precision": "bf16"})
    assert teacher_answers._key(source, plan, prepared) != known


class OneOf(SingleProcessContext):
    """A rank among several that are asked one after the other."""

    def __init__(self, plan: RunPlan, workdir: Path, rank: int, world_size: int) -> None:
        super().__init__(plan, workdir)
        self.rank, self.world_size = rank, world_size


def test_any_number_of_ranks_writes_the_same_answers(school: School, tmp_path: Path) -> None:
    plan = asking(school, temperature=1.0)
    prepared = school.world.prepare(plan, tmp_path)
    assert prepared.teacher is not None
    teacher = load_teacher(prepared.teacher, plan, torch.device("cpu"))
    asked = [
        teacher_answers._Question(row, np.array(prompt, dtype=np.int32))
        for row, (prompt, _) in enumerate(rows(prepared))
    ][:12]

    def by(world_size: int) -> dict[int, NDArray[np.int32]]:
        contexts = [OneOf(plan, tmp_path, rank, world_size) for rank in range(world_size)]
        engines = [teacher_answers._engine(plan, prepared, teacher, context) for context in contexts]
        parts = [
            teacher_answers._written(asked, range(12), plan, engine, context)
            for engine, context in zip(engines, contexts, strict=True)
        ]
        return {answer.place: answer.ids for part in parts for answer in part}

    alone, together = by(1), by(3)
    assert alone.keys() == together.keys() == set(range(12))
    assert all(np.array_equal(alone[place], together[place]) for place in alone)


def test_running_text_has_no_answers_to_be_written(school: School, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text('{"text": "the cat sees the dog"}\n')
    failure = check(
        asking(school, {"data.train": [{"source": f"file://{file}"}]}), tmp_path / "run", school.world.cache
    ).failure
    assert failure is not None
    assert "which is text, and the job's method does not learn from that" in failure.message
