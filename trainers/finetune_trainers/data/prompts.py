"""Questions for evaluation by generation: the evaluation data up to its last answer, and that answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_api.spec import DataFormat
from finetune_trainers.data.encoding import TextEncoding, load_encoding
from finetune_trainers.data.faults import Faults
from finetune_trainers.data.formats import Row, choose_format
from finetune_trainers.data.preferences import Preference, Rated
from finetune_trainers.data.readers import read_chunks
from finetune_trainers.data.sources import find_files
from finetune_trainers.data.turns import Conversation, Document, Message, Prompt
from finetune_trainers.errors import UserError
from finetune_trainers.prepared import PreparedModel

__all__ = ["EvalPrompt", "eval_prompts"]


@dataclass(frozen=True)
class EvalPrompt:
    """One question and the answer in the data."""

    prompt_ids: list[int]
    """Ends with the template's generation prompt."""
    reference: str


def eval_prompts(plan: RunPlan, model: PreparedModel, limit: int) -> list[EvalPrompt]:
    """The first `limit` rows of the evaluation data as questions. Call it after `prepare_data`, which has
    seen that the rows are sound. Raises UserError when a source has running text, in which nothing is
    asked."""
    encoding = load_encoding(plan, model)
    prompts: list[EvalPrompt] = []
    with TemporaryDirectory(prefix="finetune-prompts-") as scratch:
        for index in range(len(plan.data.eval)):
            for prompt in _prompts_of(plan, index, encoding, Path(scratch)):
                if len(prompts) == limit:
                    return prompts
                prompts.append(prompt)
    return prompts


def _prompts_of(plan: RunPlan, index: int, encoding: TextEncoding, scratch: Path) -> Iterator[EvalPrompt]:
    source = plan.data.eval[index]
    path = f"spec.data.eval[{index}]"
    renderer = form = None
    num_seen = 0
    for chunk in read_chunks(find_files(source, path), path, scratch, Faults()):
        for row in chunk.rows:
            if num_seen == source.max_rows:
                return
            num_seen += 1
            if form is None:
                form = choose_format(source, row, plan.method.formats)
                renderer = encoding.renderer(form.format)
            if form.format is DataFormat.TEXT or renderer is None:
                problem = Problem(
                    path="spec.training.generation",
                    message=f"needs questions and answers, but {source.source} holds running text",
                )
                raise UserError(str(problem), [problem])
            messages = _good_answer(form.read(row))
            if messages is None:
                continue
            text = renderer.prompt(messages[:-1])
            ids = encoding.tokenizer.encode(text, add_special_tokens=renderer.adds_special_tokens).ids
            yield EvalPrompt(ids, messages[-1]["content"])


def _good_answer(row: Row) -> list[Message] | None:
    """The conversation with the answer that is worth comparing with; None where the data has a bad one only."""
    match row:
        case Conversation():
            return row.messages
        case Preference():
            return row.chosen.messages
        case Rated():
            return row.conversation.messages if row.good else None
        case Document() | Prompt():
            raise AssertionError("running text is refused before it is read, and rewards judge what has no answer")
