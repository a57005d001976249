"""Answers that a teacher writes in the place of the data's, once and before the first step. Called by `building`.

Each rank writes its part of all answers. They are kept in the cache beside the rows that they answer, named by all that
decides them, so a later attempt, on whatever workers, finds the very same rows; what one had written that was ended
early is there too, a block of answers at a time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from torch import nn

from finetune_api.plan import RunPlan
from finetune_api.progress import Stage
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.cache import SourceArrays, SourceManifest, SourceWriter, read_manifest
from finetune_trainers.data.kept import keep, read_kept
from finetune_trainers.data.packing import rows_together
from finetune_trainers.evaluation import end_token_ids
from finetune_trainers.models import load_tokenizer
from finetune_trainers.prepared import PreparedRun, PreparedSource
from finetune_trainers.rollout import Request, Sampling
from finetune_trainers.rollout.in_process import InProcessEngine
from finetune_trainers.rollout.sampling import seed_of

__all__ = ["with_teacher_answers"]

CODE_VERSION = 1
"""Counts up with every change that gives other answers for the same teacher and rows."""
WRITTEN_AT_ONCE = 64
"""Answers that a rank writes together."""
KEPT_AT_ONCE = 1024
"""Answers of all ranks after which what was written is safe. With another number goes another CODE_VERSION."""


class _Question(NamedTuple):
    row: int
    """In its source."""
    ids: NDArray[np.int32]


class _Answer(NamedTuple):
    place: int
    """Of its question among all of its source."""
    ids: NDArray[np.int32]
    ended: bool


def with_teacher_answers(
    plan: RunPlan, prepared: PreparedRun, teacher: nn.Module, context: WorkerContext
) -> PreparedRun:
    """`prepared` with the teacher's answers in the place of the training rows' last ones. Collective.

    The rows stay as many and in the same order. Raises StorageError when the cache cannot be used.
    """
    folders = [Path(source.folder).with_name(_key(source, plan, prepared)) for source in prepared.data.train]
    known = context.broadcast_object([read_manifest(one) for one in folders] if context.rank == 0 else None)
    assert known is not None
    for index in [index for index, manifest in enumerate(known) if manifest is None]:
        arrays = SourceArrays(Path(prepared.data.train[index].folder))
        asked = [_Question(row, _prompt(arrays, row)) for row in range(arrays.num_sequences)]
        files = [folders[index].with_name(f"{folders[index].name}-{start}.npy") for start in _blocks(asked)]
        answers = _all_written(asked, files, plan, prepared, teacher, context)
        if context.rank == 0:
            known[index] = _publish(folders[index], asked, answers, plan)
            for file in files:
                file.unlink(missing_ok=True)
                file.with_suffix(".json").unlink(missing_ok=True)
    made = context.broadcast_object(known)
    train = [
        source.model_copy(update={"folder": str(folder), **_figures(manifest)})
        for source, folder, manifest in zip(prepared.data.train, folders, made, strict=True)
        if manifest is not None
    ]
    return prepared.model_copy(update={"data": prepared.data.model_copy(update={"train": train})})


def _key(source: PreparedSource, plan: RunPlan, prepared: PreparedRun) -> str:
    assert plan.method.distill is not None
    assert plan.method.distill.teacher_answers is not None
    assert prepared.teacher is not None
    facts = {
        "version": CODE_VERSION,
        "rows": Path(source.folder).name,
        "teacher": prepared.teacher.digest,
        "sampling": plan.method.distill.teacher_answers.to_document(),
        "seed": plan.optimization.seed,
        "precision": plan.precision,
        "device": plan.workers.device,
    }
    return blake3(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _prompt(arrays: SourceArrays, row: int) -> NDArray[np.int32]:
    """What comes before the row's answer, which is all that is trained in it."""
    [(start, end)] = arrays.rows_of(row)
    return arrays.tokens[start : start + int(np.argmax(arrays.trained[start:end]))]


def _blocks(asked: Sequence[_Question]) -> range:
    """Where each block of questions begins: the same for any number of ranks."""
    return range(0, len(asked), KEPT_AT_ONCE)


def _all_written(
    asked: Sequence[_Question],
    files: Sequence[Path],
    plan: RunPlan,
    prepared: PreparedRun,
    teacher: nn.Module,
    context: WorkerContext,
) -> list[_Answer]:
    """In order; what is written is kept in `files`, one for each block, and what is there is not written again."""
    engine = _engine(plan, prepared, teacher, context)
    answers: list[_Answer] = []
    for start, file in zip(_blocks(asked), files, strict=True):
        kept = context.broadcast_object(read_kept(file) if context.rank == 0 else None)
        if kept is None:
            block = range(start, min(start + KEPT_AT_ONCE, len(asked)))
            parts = context.all_gather_object(_written(asked, block, plan, engine, context))
            found = sorted((answer for part in parts for answer in part), key=lambda answer: answer.place)
            if context.rank == 0:
                keep(file, _as_array(found))
        else:
            found = _of_array(kept, start)
        answers += found
    engine.close()
    return answers


def _engine(plan: RunPlan, prepared: PreparedRun, teacher: nn.Module, context: WorkerContext) -> InProcessEngine:
    tokenizer = load_tokenizer(prepared.model, plan.model.trust_remote_code)
    end_ids = end_token_ids(teacher, tokenizer)
    return InProcessEngine(teacher, tokenizer.pad_token_id, end_ids, context, batch_size=WRITTEN_AT_ONCE)


def _as_array(answers: Sequence[_Answer]) -> NDArray[np.int32]:
    """Answer after answer: how many tokens, whether it ended, the tokens."""
    return np.concatenate([np.array([len(one.ids), one.ended, *one.ids], dtype=np.int32) for one in answers])


def _of_array(array: NDArray[np.int32], place: int) -> list[_Answer]:
    """The answers, the first of them at `place`."""
    answers: list[_Answer] = []
    at = 0
    while at < len(array):
        end = at + 2 + int(array[at])
        answers.append(_Answer(place + len(answers), array[at + 2 : end], bool(array[at + 1])))
        at = end
    return answers


def _written(
    asked: Sequence[_Question],
    block: range,
    plan: RunPlan,
    engine: InProcessEngine,
    context: WorkerContext,
) -> list[_Answer]:
    """This rank's part of the answers to the questions of `block`: it takes turns with the others."""
    assert plan.method.distill is not None
    settings = plan.method.distill.teacher_answers
    assert settings is not None
    places = block[context.rank :: context.world_size]
    requests = [
        Request(asked[place].ids.tolist(), seed_of(plan.optimization.seed, asked[place].row)) for place in places
    ]
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)

    def tell(done: int, total: int) -> None:
        there = block.start + len(block) * done // max(total, 1)
        message = f"The teacher has written {there} of {len(asked)} answers"
        context.report(Stage.LOADING_MODEL, percent=100.0 * there / len(asked), message=message)

    completions = engine.generate(requests, sampling, tell)
    return [
        _Answer(place, np.array(one.ids, dtype=np.int32), one.ended)
        for place, one in zip(places, completions, strict=True)
    ]


def _publish(folder: Path, questions: Sequence[_Question], answers: Sequence[_Answer], plan: RunPlan) -> SourceManifest:
    limit = plan.method.settings.max_seq_length
    num_cut = 0
    with SourceWriter(folder) as writer:
        for question, answer in zip(questions, answers, strict=True):
            ids = np.concatenate([question.ids, answer.ids])[:limit]
            num_cut += not answer.ended or len(ids) < len(question.ids) + len(answer.ids)
            trained = np.arange(len(ids)) >= len(question.ids)
            writer.append(ids, trained, np.array([len(ids)], dtype=np.int64))
        return writer.publish(
            rows_together(len(answers), 1),
            capacity=limit,
            num_rows=len(answers),
            num_rows_dropped=0,
            notes=[f"{num_cut} of {len(answers)} answers of the teacher were cut"],
        )


def _figures(manifest: SourceManifest) -> dict[str, float]:
    return {
        "num_tokens": manifest.num_tokens,
        "num_trained_tokens": manifest.num_trained_tokens,
        "packing_efficiency": manifest.packing_efficiency,
    }
