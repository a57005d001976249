"""People's judgements -> a data set. Called by `__main__`.

    pairs       {"prompt", "chosen", "rejected", "margin"?}            as the format preference has them
    ratings     {"prompt", "answers": […], "ratings": […]}             a row for each prompt, or
                {"prompt", "answer", "rating"}                         a row for each rating, of one or of many people
    rankings    {"prompt", "answers": [best, …, worst], "ranks"?: […]} ranks where answers share a place; 1 is the best

An answer that was rated several times has the mean of its ratings.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finetune_api.preference_data import ImportReport, ToImport
from finetune_api.spec import DataFormat
from finetune_trainers.data.faults import RowError, shorten
from finetune_trainers.data.preferences import Preference
from finetune_trainers.data.turns import Message, required_text
from finetune_trainers.errors import UserError
from finetune_trainers.preference_data.opinions import (
    Label,
    Pair,
    Scored,
    key_of,
    label_row,
    labels_of_pairs,
    labels_of_scores,
    pair_row,
    pairs_of,
    settled,
)
from finetune_trainers.preference_data.reading import (
    Names,
    Row,
    every_row,
    files_of,
    names_for,
    number,
    numbers,
    prompt_of,
    texts,
)
from finetune_trainers.preference_data.writing import new_file, write_data_set

__all__ = ["import_judgements"]

_COLUMNS = ("prompt", "system", "chosen", "rejected", "margin", "answers", "ratings", "ranks", "answer", "rating")


def import_judgements(asked: ToImport) -> ImportReport:
    """Read all judgements and write the data set. Raises DataError with the place of each row that cannot be read."""
    _check(asked)
    new_file(asked)
    files = files_of(asked.source)
    reader = _Reader(asked)
    found = _Found()
    for said in every_row(files, reader.read):
        found.add(said)
    assert reader.layout is not None, "there was a row"
    _check_layout(asked, reader.layout)
    pairs, labels, counts = found.decided(asked, reader.layout)
    as_labels = asked.form == "unpaired-preference"
    rows: Iterable[dict[str, Any]] = (
        map(label_row, labels) if as_labels else (pair_row(pair, _has_margin(asked, reader.layout)) for pair in pairs)
    )
    told = {"layout": reader.layout, "counts": {"rowsRead": found.num_rows, "prompts": found.num_prompts, **counts}}
    return ImportReport(
        data=write_data_set(asked, files, rows, told),
        layout=reader.layout,
        rows_read=found.num_rows,
        prompts=found.num_prompts,
        **counts,
    )


def _check(asked: ToImport) -> None:
    if (asked.good_from is None) != (asked.bad_to is None):
        raise UserError("--good-from and --bad-to go together; say both")
    if asked.good_from is not None and asked.bad_to is not None and asked.bad_to >= asked.good_from:
        raise UserError(f"--bad-to: {asked.bad_to:g} must be below --good-from, which is {asked.good_from:g}")
    if asked.good_from is not None and asked.form == "preference":
        raise UserError("--good-from and --bad-to are for --as unpaired-preference; pairs need neither")


def _check_layout(asked: ToImport, layout: str) -> None:
    if asked.good_from is not None and layout != "ratings":
        raise UserError(f"--good-from and --bad-to are for ratings, and these are {layout}")
    if asked.form == "unpaired-preference" and layout == "ratings" and asked.good_from is None:
        raise UserError("ratings become good and bad answers by --good-from and --bad-to; say both")
    if asked.margins and layout != "ratings":
        raise UserError(f"--margins writes differences of ratings, and these are {layout}; leave it out")


def _has_margin(asked: ToImport, layout: str) -> bool:
    return asked.margins or layout == "pairs"


class _Reader:
    """Reads rows in the layout that is asked for, or that the first row has."""

    def __init__(self, asked: ToImport) -> None:
        self._names = Names(asked.columns, _COLUMNS)
        self._form = names_for(self._names, DataFormat.PREFERENCE)
        self.layout: str | None = None if asked.layout == "auto" else asked.layout

    def read(self, row: Row) -> Pair | Scored:
        if self.layout is None:
            self.layout = self._layout_of(row)
        match self.layout:
            case "pairs":
                return self._pair(row)
            case "ratings":
                return self._ratings(row)
            case _:
                return self._ranking(row)

    def _layout_of(self, row: Row) -> str:
        names = self._names
        if names.are_in(row, "chosen", "rejected"):
            return "pairs"
        if names.are_in(row, "answers", "ratings") or names.are_in(row, "answer", "rating"):
            return "ratings"
        if names.are_in(row, "answers"):
            return "rankings"
        listed = ", ".join(map(str, row.columns)) or "none"
        raise RowError(
            f"holds no judgement that is known: the columns are {listed}. Pairs have chosen and rejected; ratings"
            " answers and ratings, or answer and rating; rankings answers, the best first. Name yours by --column"
        )

    def _pair(self, row: Row) -> Pair:
        found = self._form.read(row.columns)
        assert isinstance(found, Preference)
        *prompt, chosen = found.chosen.messages
        says = row.columns.get(self._names["margin"]) is not None
        return Pair(prompt, chosen, found.rejected.messages[-1], found.margin if says else None)

    def _ratings(self, row: Row) -> Scored:
        names = self._names
        prompt = prompt_of(row, names).messages
        if not names.are_in(row, "answers"):
            answer = required_text(names.value(row, "answer"), names["answer"])
            return Scored(prompt, [_said(answer)], [number(names.value(row, "rating"), names["rating"])])
        answers = texts(names.value(row, "answers"), names["answers"])
        return Scored(
            prompt, list(map(_said, answers)), numbers(names.value(row, "ratings"), names["ratings"], len(answers))
        )

    def _ranking(self, row: Row) -> Scored:
        names = self._names
        answers = texts(names.value(row, "answers"), names["answers"], least=2)
        twice = next((answer for answer in answers if answers.count(answer) > 1), None)
        if twice is not None:
            raise RowError("holds an answer twice, which cannot have two places", names["answers"], shorten(twice))
        ranks = [float(place) for place in range(len(answers))]
        if names.are_in(row, "ranks"):
            ranks = numbers(row.columns[names["ranks"]], names["ranks"], len(answers))
        return Scored(prompt_of(row, names).messages, list(map(_said, answers)), [-rank for rank in ranks])


def _said(text: str) -> Message:
    return {"role": "assistant", "content": text}


class _Found:
    """All judgements of a source, those of one prompt together."""

    def __init__(self) -> None:
        self.num_rows = 0
        self._pairs: list[Pair] = []
        self._rankings: list[Scored] = []
        self._prompts: dict[str, list[Message]] = {}
        self._ratings: dict[str, dict[str, tuple[Message, list[float]]]] = {}
        """Of each prompt, each answer's."""

    @property
    def num_prompts(self) -> int:
        return len(self._prompts)

    def add(self, said: Pair | Scored) -> None:
        self.num_rows += 1
        prompt = key_of(said.prompt)
        self._prompts.setdefault(prompt, said.prompt)
        if isinstance(said, Pair):
            self._pairs.append(said)
            return
        self._rankings.append(said)
        answers = self._ratings.setdefault(prompt, {})
        for answer, score in zip(said.answers, said.scores, strict=True):
            answers.setdefault(answer["content"], (answer, []))[1].append(score)

    def decided(self, asked: ToImport, layout: str) -> tuple[list[Pair], list[Label], dict[str, int]]:
        """Pairs, or labels where those are asked for, and what was left out."""
        counts = {"ties": 0, "repeated": 0, "contradicted": 0, "undecided": 0}
        if asked.good_from is not None and asked.bad_to is not None:
            labels: list[Label] = []
            for scored in self._by_prompt():
                some, undecided = labels_of_scores(scored, asked.good_from, asked.bad_to)
                labels += some
                counts["undecided"] += undecided
            return [], labels, counts
        pairs = self._all_pairs(asked, layout, counts)
        pairs, counts["repeated"], counts["contradicted"] = settled(pairs)
        if asked.form == "preference":
            return pairs, [], counts
        labels, counts["undecided"] = labels_of_pairs(pairs)
        return [], labels, counts

    def _all_pairs(self, asked: ToImport, layout: str, counts: dict[str, int]) -> list[Pair]:
        if layout == "pairs":
            near = [pair for pair in self._pairs if pair.gap is not None and pair.gap < asked.min_gap]
            counts["ties"] = len(near)
            return [pair for pair in self._pairs if pair.gap is None or pair.gap >= asked.min_gap]
        pairs: list[Pair] = []
        # A place in a ranking is one among the answers of its row; ratings are alike in all rows.
        pairing = "best-worst" if asked.form == "unpaired-preference" else asked.pairing
        for scored in self._rankings if layout == "rankings" else self._by_prompt():
            if len(scored.answers) < 2:
                continue
            some, num_ties = pairs_of(scored, pairing, asked.min_gap)
            pairs += some
            counts["ties"] += num_ties
        return pairs

    def _by_prompt(self) -> Iterable[Scored]:
        for prompt, answers in self._ratings.items():
            means = [sum(ratings) / len(ratings) for _, ratings in answers.values()]
            yield Scored(self._prompts[prompt], [answer for answer, _ in answers.values()], means)
