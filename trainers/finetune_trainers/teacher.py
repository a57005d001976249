"""The teacher of distillation: found and checked on the driver, loaded frozen on every worker.

The launcher calls `prepare_teacher` after the model has been checked; `methods.building` calls `load_teacher`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_api.spec import Full, Model, Teacher, Tuning
from finetune_trainers.errors import UserError
from finetune_trainers.frozen import NEVER_LEARNS, load_frozen
from finetune_trainers.models import load_model, prepare_model, stored_tokenizer
from finetune_trainers.prepared import PreparedModel

__all__ = ["load_teacher", "prepare_teacher"]

FIELD = "spec.method.distill.teacher"
_THE_MODEL = re.compile(r"\bthe model\b(?! type)")


def prepare_teacher(
    plan: RunPlan, student: PreparedModel, cache: Path, on_progress: Callable[[float, str], None]
) -> PreparedModel | None:
    """The teacher of `plan`, seen to be whole and to have the student's tokens; None where there is none.

    Raises UserError, about the teacher's fields.
    """
    if plan.method.distill is None:
        return None
    asked = plan.method.distill.teacher
    try:
        teacher = prepare_model(_as_model(plan, asked, Tuning(full=Full())), cache, on_progress)
    except UserError as error:
        raise _refused([_about_the_teacher(problem) for problem in error.problems]) from error
    words = stored_tokenizer(teacher, asked.trust_remote_code).get_vocab()
    own_words = stored_tokenizer(student, plan.model.trust_remote_code).get_vocab()
    if words != own_words:
        field = "source" if asked.tokenizer is None else "tokenizer"
        message = _difference(words, own_words, plan.model.tokenizer or plan.model.source)
        raise _refused([Problem(path=f"{FIELD}.{field}", value=asked.tokenizer or asked.source, message=message)])
    return teacher


def load_teacher(teacher: PreparedModel, plan: RunPlan, device: torch.device) -> nn.Module:
    """The teacher on `device`, in the precision of the training, without gradients. Collective."""
    assert plan.method.distill is not None
    as_model = _as_model(plan, plan.method.distill.teacher, NEVER_LEARNS)
    return load_frozen(partial(load_model, teacher, as_model, device), plan)


def _as_model(plan: RunPlan, teacher: Teacher, tuning: Tuning) -> RunPlan:
    """The plan of a job whose model is the teacher."""
    model = Model(
        source=teacher.source,
        revision=teacher.revision,
        tokenizer=teacher.tokenizer,
        trust_remote_code=teacher.trust_remote_code,
    )
    return plan.model_copy(update={"model": model, "tuning": tuning})


def _about_the_teacher(problem: Problem) -> Problem:
    """What is wrong with the teacher as a model, by the field that names the teacher."""
    path = (problem.path or "").replace("spec.model", FIELD)
    message = _THE_MODEL.sub("the teacher", problem.message.replace("spec.model", FIELD))
    return problem.model_copy(update={"path": path, "message": message})


def _refused(problems: list[Problem]) -> UserError:
    return UserError("; ".join(str(problem) for problem in problems), problems)


def _difference(words: dict[str, int], own_words: dict[str, int], own_source: str) -> str:
    """What to tell of a teacher with other `words` (token -> number) than the model from `own_source` has."""
    theirs = {number: word for word, number in words.items()}
    ours = {number: word for word, number in own_words.items()}
    differing = [number for number in sorted(theirs.keys() | ours.keys()) if theirs.get(number) != ours.get(number)]
    first = differing[0]
    here, there = (repr(of[first]) if first in of else "missing" for of in (ours, theirs))
    return (
        f"has another tokenizer than the model ({own_source}): {len(differing)} of {len(ours)} tokens differ, the first"
        f" is number {first}, which is {there} in the teacher's and {here} in the model's; probabilities can only be"
        " compared token by token, so use a teacher of the model's own family"
    )
