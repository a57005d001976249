"""Two answers, and a judge who sees them in both orders -> a data set. Called by `__main__`.

    candidates    {"prompt", "answers": […]}            every two different answers of a row, or some of them
    pairs         {"prompt", "chosen", "rejected"}      judged anew, and compared with what the data says

A verdict that changes with the order is a tie. Ties are counted, and are no rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from finetune_api.answers import Step
from finetune_api.preference_data import JudgeReport, ToJudge
from finetune_api.spec import DataFormat
from finetune_trainers.answering import OnStep
from finetune_trainers.data.faults import RowError
from finetune_trainers.data.preferences import Preference
from finetune_trainers.data.turns import Message
from finetune_trainers.errors import DataError, UserError
from finetune_trainers.preference_data.asking import Answered, Asking, Journal
from finetune_trainers.preference_data.opinions import Pair, pair_row
from finetune_trainers.preference_data.questions import (
    INSTRUCTIONS,
    Outcome,
    Question,
    Verdict,
    messages_for,
    outcome_of,
)
from finetune_trainers.preference_data.reading import Names, Row, every_row, files_of, names_for, prompt_of, texts
from finetune_trainers.preference_data.writing import new_file, write_data_set

__all__ = ["judge"]

_COLUMNS = ("prompt", "system", "answers", "chosen", "rejected", "margin")
_JOURNAL = ".verdicts"


@dataclass(frozen=True, slots=True)
class _Contest:
    """Two answers to one prompt."""

    prompt: list[Message]
    first: Message
    second: Message
    known: bool
    """The data says that the first is better."""

    def questions(self) -> tuple[Question, Question]:
        first, second = self.first["content"], self.second["content"]
        return Question(self.prompt, first, second), Question(self.prompt, second, first)


def judge(asked: ToJudge, tell: OnStep, wait_for: Callable[[float], object] | None = None) -> JudgeReport:
    """Ask about all pairs, as far as no verdict is known, and write the data set. Raises UnreachableError, DeniedError,
    DataError with the places of rows that cannot be read, UserError."""
    path = new_file(asked)
    files = files_of(asked.source)
    judge_ = Asking(asked, wait_for)
    rows = list(every_row(files, _Reader(asked).read))
    contests = [contest for row in rows for contest in row]
    if not contests:
        raise UserError("SOURCE has no two different answers to one prompt")
    journal = Journal(Path(f"{path}{_JOURNAL}"))
    with journal.open():
        tally = _asked(contests, asked, judge_, journal, tell)
    verdicts = [_verdicts(contest, asked, journal) for contest in contests]
    outcomes = [outcome_of(*two) for two in verdicts]
    figures = _figures(contests, verdicts, outcomes)
    pairs = [pair for one, outcome in zip(contests, outcomes, strict=True) if (pair := _preferred(one, outcome))]
    if not pairs:
        raise DataError(
            f"no row is left to be written: of {len(contests)} pairs {figures['ties']} are ties, {figures['changed']}"
            f" have a verdict that changes with the order of the answers, and {figures['unreadable']} have none"
        )
    counts = {"rows_read": len(rows), "pairs": len(contests), **tally, **figures}
    told = {
        "judge": {
            "model": asked.model,
            "sent": judge_.settings,
            "messages": _example(asked),
            "verdicts": journal.path.name,
        },
        "counts": counts,
    }
    written = write_data_set(asked, files, (pair_row(pair, with_margin=False) for pair in pairs), told)
    return JudgeReport(data=written, verdicts=str(journal.path), **counts)


def _asked(
    contests: Sequence[_Contest], asked: ToJudge, judge_: Asking, journal: Journal, tell: OnStep
) -> dict[str, int]:
    """Ask what the journal does not know -> counts."""
    questions = {question.key(asked): question for contest in contests for question in contest.questions()}
    unknown = {key: question for key, question in questions.items() if key not in journal.known}
    remembered = len(questions) - len(unknown)
    num_prompt = num_completion = 0
    for count, (key, answered) in enumerate(judge_.answers(unknown), start=1):
        journal.add(key, answered)
        num_prompt += answered.prompt_tokens
        num_completion += answered.completion_tokens
        _refuse_the_unanswerable(count, answered, journal, unknown)
        tell(Step(what="verdicts", done=remembered + count, total=len(questions)))
    return {
        "asked": len(unknown),
        "remembered": remembered,
        "prompt_tokens": num_prompt,
        "completion_tokens": num_completion,
    }


_ENOUGH = 32


def _refuse_the_unanswerable(count: int, answered: Answered, journal: Journal, asked: dict[str, Question]) -> None:
    """A judge whose first verdicts cannot be read at all is not paid for the rest."""
    if count == min(_ENOUGH, len(asked)) and not any(journal.known.values()):
        raise UserError(
            f"none of the first {count} answers of the judge has a verdict that can be read; it says:"
            f" {answered.said[:200]!r}. Name another model, raise --max-tokens, or let --instructions ask for less"
        )


def _verdicts(contest: _Contest, asked: ToJudge, journal: Journal) -> tuple[Verdict | None, Verdict | None]:
    straight, turned = (journal.known[question.key(asked)] for question in contest.questions())
    return straight, turned


def _preferred(contest: _Contest, outcome: Outcome) -> Pair | None:
    match outcome:
        case Outcome.FIRST:
            return Pair(contest.prompt, contest.first, contest.second)
        case Outcome.SECOND:
            return Pair(contest.prompt, contest.second, contest.first)
        case _:
            return None


def _figures(
    contests: Sequence[_Contest],
    verdicts: Sequence[tuple[Verdict | None, Verdict | None]],
    outcomes: Sequence[Outcome],
) -> dict[str, Any]:
    counts = Counter(outcomes)
    num_preferred = counts[Outcome.FIRST] + counts[Outcome.SECOND]
    said = Counter(verdict for two in verdicts for verdict in two)
    of_known = [outcome for one, outcome in zip(contests, outcomes, strict=True) if one.known]
    decided = [outcome for outcome in of_known if outcome in (Outcome.FIRST, Outcome.SECOND)]
    return {
        "preferred": num_preferred,
        "ties": counts[Outcome.TIE],
        "changed": counts[Outcome.CHANGED],
        "unreadable": counts[Outcome.UNREADABLE],
        "disagreement": _share(counts[Outcome.CHANGED], len(outcomes) - counts[Outcome.UNREADABLE]),
        "first_preferred": _share(said[Verdict.FIRST], said[Verdict.FIRST] + said[Verdict.SECOND]),
        "agreement": _share(decided.count(Outcome.FIRST), len(decided)),
    }


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _example(asked: ToJudge) -> list[Message]:
    """What is sent, with names in the place of texts."""
    shown = Question([{"role": "user", "content": "{prompt}"}], "{first}", "{second}")
    return messages_for(shown, asked.instructions or INSTRUCTIONS)


class _Reader:
    def __init__(self, asked: ToJudge) -> None:
        self._names = Names(asked.columns, _COLUMNS)
        self._form = names_for(self._names, DataFormat.PREFERENCE)
        self._most, self._seed = asked.pairs_per_row, asked.seed
        self._num_rows = 0

    def read(self, row: Row) -> list[_Contest]:
        self._num_rows += 1
        names = self._names
        if names.are_in(row, "chosen", "rejected"):
            found = self._form.read(row.columns)
            assert isinstance(found, Preference)
            *prompt, chosen = found.chosen.messages
            return [_Contest(prompt, chosen, found.rejected.messages[-1], known=True)]
        if not names.are_in(row, "answers"):
            raise RowError(f"has neither {names['answers']!r} nor {names['chosen']!r} and {names['rejected']!r}")
        prompt = prompt_of(row, names).messages
        answers = list(dict.fromkeys(texts(row.columns[names["answers"]], names["answers"])))
        messages = [{"role": "assistant", "content": answer} for answer in answers]
        return [_Contest(prompt, *two, known=False) for two in self._some(list(combinations(messages, 2)))]

    def _some(self, pairs: list[tuple[Message, Message]]) -> Iterator[tuple[Message, Message]]:
        """As many as are wanted, in their order; which ones follows from the seed and the row's number."""
        if self._most is None or len(pairs) <= self._most:
            yield from pairs
            return
        drawn = np.random.default_rng([self._seed, self._num_rows]).permutation(len(pairs))[: self._most]
        yield from (pairs[place] for place in sorted(drawn.tolist()))
