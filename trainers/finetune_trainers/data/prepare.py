"""All data of a run, tokenized and packed into the cache before any worker starts. Called by the launcher and
`check`.

Every row of every source is read before anything is refused, so that one message lists what has to be mended.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_api.spec import DataFormat, DataSource, Supervised
from finetune_trainers.data.cache import SourceArrays, SourceManifest, SourceWriter, cache_key, read_manifest
from finetune_trainers.data.encoding import load_encoding
from finetune_trainers.data.faults import Faults, RowError
from finetune_trainers.data.formats import Row, RowFormat, choose_format
from finetune_trainers.data.judged import side_by_side
from finetune_trainers.data.limits import Limits, in_words, longest_row
from finetune_trainers.data.order import sequences_per_epoch_of
from finetune_trainers.data.packing import Bins, pack, rows_together
from finetune_trainers.data.prompts import EvalPrompt, eval_prompts
from finetune_trainers.data.readers import Chunk, read_chunks
from finetune_trainers.data.sources import DataFiles, find_files
from finetune_trainers.data.tokenize import RowTokenizer
from finetune_trainers.data.turns import Prompt
from finetune_trainers.errors import DataError, StorageError
from finetune_trainers.prepared import PreparedData, PreparedModel, PreparedSource

__all__ = ["EvalPrompt", "eval_prompts", "prepare_data"]

OnProgress = Callable[[float, str], None]
"""Told how far preparation is, in percent, and what it is doing, in a sentence."""


def prepare_data(plan: RunPlan, model: PreparedModel, cache: Path, on_progress: OnProgress) -> PreparedData:
    """Tokenize and pack every source of `plan` into `cache`, or find it there.

    Raises DataError with all that is wrong with files and rows (the first 20 listed), UserError when the
    model cannot be trained on such data at all.
    """
    return _Preparation(plan, model, cache, on_progress).run()


@dataclass(frozen=True)
class _Place:
    """One source of the job and where it stands in it."""

    path: str
    """spec.data.train[0]"""
    source: DataSource
    files: DataFiles


_BESIDE = 2
"""Counts up with every change of what stands beside KTO's answers."""


class _Preparation:
    def __init__(self, plan: RunPlan, model: PreparedModel, cache: Path, on_progress: OnProgress) -> None:
        self.plan = plan
        self.method = plan.method
        self.settings = plan.method.settings
        self.seed = plan.optimization.seed
        self.encoding = load_encoding(plan, model)
        self.fingerprint = self.encoding.fingerprint
        self.cache = cache
        self.on_progress = on_progress
        self.faults = Faults()
        self.bytes_done = 0
        self.bytes_total = 1

    def run(self) -> PreparedData:
        data = self.plan.data
        train = [self._find(f"spec.data.train[{index}]", source) for index, source in enumerate(data.train)]
        eval_ = [self._find(f"spec.data.eval[{index}]", source) for index, source in enumerate(data.eval)]
        found = [place for place in (*train, *eval_) if place]
        self.bytes_total = max(sum(place.files.num_bytes for place in found), 1)
        prepared = {place.path: self._prepare(place) for place in found}
        for place in train:
            source = prepared[place.path] if place else None
            if place and source and sequences_per_epoch_of(source) == 0:
                message = f"takes none of the source's {source.num_sequences} sequences; raise it"
                self.faults.add(message, path=f"{place.path}.weight", value=str(source.weight))
        self.faults.raise_if_any()

        def of(places: list[_Place | None]) -> list[PreparedSource]:
            return [source for place in places if place and (source := prepared[place.path])]

        found_data = PreparedData(train=of(train), eval=of(eval_))
        if self.method.kto is not None:
            _demand_both_kinds(found_data.train)
        return found_data

    def _find(self, path: str, source: DataSource) -> _Place | None:
        try:
            return _Place(path, source, find_files(source, path))
        except DataError as error:
            for problem in error.problems:
                self.faults.add(problem.message, file=problem.file, path=problem.path, value=problem.value)
            return None

    def _prepare(self, place: _Place) -> PreparedSource | None:
        """One source, from the cache or made now; None when it has faults."""
        try:
            folder = self.cache / "data" / self._key(place)
        except OSError as error:
            self.faults.add(f"cannot be read: {error.strerror}", file=error.filename, path=f"{place.path}.source")
            return None
        manifest = read_manifest(folder)
        from_cache = manifest is not None
        if manifest is None:
            try:
                manifest = self._make(place, folder)
            except OSError as error:  # readers report theirs; what is left is ours
                raise StorageError(f"the cache {self.cache} cannot be written: {error}") from error
        self.bytes_done += place.files.num_bytes
        if manifest is None:
            return None
        how = "from the cache" if from_cache else "tokenized"
        notes = "".join(f"; {note}" for note in manifest.notes)
        self._report(0.0, f"{place.source.source}: {manifest.num_rows} rows {how}{notes}")
        figures = manifest.model_dump(exclude={"version", "notes", "files"})
        return PreparedSource(
            folder=str(folder),
            source=place.source.source,
            weight=place.source.weight,
            from_cache=from_cache,
            content=manifest.content,
            **figures,
        )

    def _key(self, place: _Place) -> str:
        source = place.source
        facts: dict[str, Any] = {
            "encoding": self.fingerprint,
            "method": self._shaping(),
            "seed": self.seed,
            "kind": place.files.kind,
            "split": place.files.hub.split if place.files.hub else None,
            "format": source.format,
            "columns": source.columns.to_document() if source.columns else None,
            "max_rows": source.max_rows,
        }
        return cache_key(place.files.files, facts)

    def _shaping(self) -> dict[str, Any]:
        """What of the method shapes the rows: methods that learn from the same pairs share them."""
        if self.method.supervised is not None:
            shape = self.method.supervised.model_dump(mode="json", by_alias=True, include=set(Supervised.model_fields))
            return {**shape, "lossOn": self._loss_on}
        [form] = self.method.formats
        shape = {"rows": form, "maxSeqLength": longest_row(self.settings), "longRows": self.settings.long_rows}
        return shape if self.method.kto is None else {**shape, "beside": _BESIDE}

    def _make(self, place: _Place, folder: Path) -> SourceManifest | None:
        """Read, tokenize and pack one source into `folder`; None, with faults added, when that cannot be."""
        faults_before = self.faults.num_found
        rows = _SourceRows(place, self.cache, self.faults, self.method.formats)
        try:
            form = rows.format()
        except RowError as fault:
            self.faults.add(fault.message, file=rows.first_place, path=_join(place.path, fault.path), value=fault.value)
            return None
        if form is None:
            if self.faults.num_found == faults_before:
                self.faults.add(
                    "has no rows; fill it, or remove the source", path=f"{place.path}.source", value=place.source.source
                )
            return None
        try:
            items = side_by_side(rows.items())
        except RowError as fault:  # of all rows together, if each is sound
            if self.faults.num_found == faults_before:
                self.faults.add(fault.message, path=f"{place.path}.source", value=place.source.source)
            return None
        tokenizer = self._tokenizer(form.format)
        limits = Limits(self.settings, form.format, self.faults)
        marks: list[float] = []
        with SourceWriter(folder) as writer:
            for ((chunk, indices), of_chunk), encoded in tokenizer.encode_all(items):
                kept = limits.apply(chunk, indices, encoded)
                writer.append(kept.ids, kept.trained, kept.lengths)
                said = [of_chunk[item] for item in kept.items] if of_chunk is not None else []
                marks += [one for one in said if isinstance(one, float)]
                writer.keep({"messages": one.messages, "fields": one.fields} for one in said if isinstance(one, Prompt))
                self._report(chunk.share * place.files.num_bytes, f"tokenizing {place.source.source}")
            if self.faults.num_found > faults_before:
                return None
            lengths = writer.lengths
            if len(lengths) == 0:
                self.faults.add(
                    f"has no row that fits into {in_words(self.settings)}; raise it",
                    path=f"{place.path}.source",
                    value=place.source.source,
                )
                return None
            return writer.publish(
                self._sequences(lengths, limits.rows_each),
                capacity=self.settings.max_seq_length * limits.rows_each,
                num_rows=limits.num_kept,
                num_rows_dropped=limits.num_dropped,
                notes=[*_notes(tokenizer, limits), *_kinds(form.format, marks)],
                marks=np.array(marks, dtype=np.float32) if limits.rows_each > 1 else None,
            )

    def _tokenizer(self, form: DataFormat) -> RowTokenizer:
        return RowTokenizer(
            self.encoding.tokenizer,
            self.encoding.renderer(form),
            eos_id=self.encoding.eos_id,
            stop_ids=frozenset(self.encoding.stop_tokens.values()),
            loss_on=self._loss_on,
        )

    @property
    def _loss_on(self) -> Literal["assistant", "all", "last"]:
        """A teacher writes the last answer of a conversation anew."""
        supervised, distill = self.method.supervised, self.method.distill
        if supervised is None or (distill is not None and distill.teacher_answers is not None):
            return "last"
        return supervised.loss_on

    def _sequences(self, lengths: NDArray[np.int64], rows_each: int) -> Bins:
        """Which encoded rows make up each sequence."""
        supervised = self.method.supervised
        if supervised is not None and supervised.packing:
            return pack(lengths, supervised.max_seq_length, self.seed)
        return rows_together(len(lengths), rows_each)

    def _report(self, bytes_of_source: float, message: str) -> None:
        self.on_progress(min(100.0 * (self.bytes_done + bytes_of_source) / self.bytes_total, 100.0), message)


class _SourceRows:
    """The rows of one source as the method learns from them; the others become faults."""

    def __init__(self, place: _Place, cache: Path, faults: Faults, formats: Collection[DataFormat]) -> None:
        self._formats = formats
        self._source = place.source
        self._faults = faults
        self._chunks = self._limited(read_chunks(place.files, place.path, cache / "datasets", faults))
        self._first: Chunk | None = None
        self._format: RowFormat | None = None
        self.first_place: str | None = None
        """Where the row stands that the format was read from."""

    def format(self) -> RowFormat | None:
        """The source's format by its first row, None when there are no rows. Raises RowError."""
        self._first = next(self._chunks, None)
        if self._first is None:
            return None
        # A first row that is no object is a fault of its own, and tells nothing about the others.
        index = next((i for i, row in enumerate(self._first.rows) if isinstance(row, dict)), 0)
        self.first_place = self._first.place(index)
        self._format = choose_format(self._source, self._first.rows[index], self._formats)
        return self._format

    def items(self) -> Iterator[tuple[tuple[Chunk, list[int]], list[Row]]]:
        """((chunk, indices in it), rows in order)."""
        assert self._format is not None, "format() comes first"
        chunk: Chunk | None = self._first
        while chunk is not None:
            indices: list[int] = []
            items: list[Row] = []
            for index, row in enumerate(chunk.rows):
                try:
                    items.append(self._format.read(row))
                    indices.append(index)
                except RowError as fault:
                    self._faults.add_row(chunk.place(index), fault)
            yield (chunk, indices), items
            chunk = next(self._chunks, None)

    def _limited(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        left = self._source.max_rows
        for chunk in chunks:
            if left is None:
                yield chunk
                continue
            yield Chunk(chunk.file, chunk.numbers[:left], chunk.rows[:left], chunk.share)
            left -= len(chunk.rows)
            if left <= 0:
                return


def _notes(tokenizer: RowTokenizer, limits: Limits) -> list[str]:
    notes = []
    if tokenizer.num_stops_added:
        notes.append(
            f"the template ends {tokenizer.num_stops_added} answers without a stop token: an end-of-sequence "
            "token was appended"
        )
    if limits.num_truncated:
        notes.append(f"{limits.num_truncated} rows truncated")
    if limits.num_dropped:
        notes.append(f"{limits.num_dropped} rows dropped as too long")
    return notes


def _kinds(form: DataFormat, marks: list[float]) -> list[str]:
    """How many of each kind: whoever has few of one will want to weigh it."""
    if form is not DataFormat.UNPAIRED_PREFERENCE:
        return []
    good = sum(mark > 0.5 for mark in marks)
    return [f"{good} good and {len(marks) - good} bad answers"]


def _demand_both_kinds(sources: list[PreparedSource]) -> None:
    """KTO weighs good answers against bad ones; with one kind it would push all answers the same way."""
    marks = [mark for source in sources if (mark := SourceArrays(Path(source.folder)).marks) is not None]
    good = np.concatenate(marks) > 0.5
    if good.all() or not good.any():
        there, missing = ("true", "false") if good.all() else ("false", "true")
        problem = Problem(
            path="spec.data.train",
            message=f"has {len(good)} answers whose label is {there} and none whose label is {missing}, and KTO weighs"
            " one kind against the other; add rows of the other kind, or learn from good ones alone by sft",
        )
        raise DataError(str(problem), [problem])


def _join(path: str, below: str | None) -> str:
    return f"{path}.{below}" if below else path
