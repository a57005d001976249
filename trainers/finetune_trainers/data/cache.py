"""Tokenized sources on disk: content-addressed, complete or absent, memory-mapped by the workers.

    <cache>/data/<digest>/
        tokens.npy            int32 [T]    all rows end to end
        trained.npy           bool [T]     whether the token is inside the loss
        offsets.npy           int64 [n+1]  row r is tokens[offsets[r]:offsets[r + 1]]
        bin_rows.npy          int64 [n]    rows, sequence by sequence
        bin_offsets.npy       int64 [s+1]  sequence i is bin_rows[bin_offsets[i]:bin_offsets[i + 1]]
        sequence_tokens.npy   int64 [s]    tokens of each sequence
        sequence_trained.npy  int64 [s]    trained tokens of each sequence
        marks.npy             float32 [s]  what the data says of each sequence, where it says something: by how much
                                           the chosen answer of a pair is better; 1 for a good answer, 0 for a bad one
        rows.jsonl            of questions, for each sequence: {"messages": […], "fields": {…}}
        row_starts.npy        int64 [s+1]  sequence i is bytes row_starts[i]:row_starts[i + 1] of rows.jsonl
        manifest.json         figures, and size and blake3 digest of every file above

`prepare` writes an entry in a folder of its own and renames it, so two processes that prepare the same data
do not meet: the second finds the first one's entry and drops its own. `batches` reads. Nothing is pickled.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from finetune_api.base import Contract
from finetune_trainers.data.packing import Bins
from finetune_trainers.errors import StorageError

__all__ = [
    "CODE_VERSION",
    "FileRecord",
    "SourceArrays",
    "SourceManifest",
    "SourceWriter",
    "cache_key",
    "read_manifest",
]

CODE_VERSION = 1
"""Counts up with every change that makes other tokens, masks or sequences out of the same rows."""


ROWS = "rows.jsonl"
_CONTENT = ("tokens.npy", "trained.npy", "offsets.npy", "bin_rows.npy", "bin_offsets.npy", "marks.npy", ROWS)
"""What is learned from; the other files follow from these."""


class FileRecord(Contract):
    """What a file must be to be trusted."""

    bytes: int
    digest: str


class SourceManifest(Contract):
    """What an entry holds."""

    version: int = CODE_VERSION
    num_rows: int
    num_rows_dropped: int
    num_sequences: int
    num_tokens: int
    num_trained_tokens: int
    packing_efficiency: float
    notes: list[str] = Field(default_factory=list)
    """What a person should know about how the rows were read."""
    files: dict[str, FileRecord]

    @property
    def content(self) -> str:
        """Digest of what is learned from. Other code may come to the same by another key."""
        found = [[name, self.files[name].digest] for name in _CONTENT if name in self.files]
        return blake3(json.dumps(found).encode()).hexdigest()


def cache_key(files: Sequence[Path], facts: Mapping[str, Any]) -> str:
    """Digest of the files' contents, in order, and of all `facts` (JSON) that shape what is made of them.

    Raises OSError, with its filename, for a file that cannot be read."""
    key = blake3(json.dumps({"code": CODE_VERSION, **facts}, sort_keys=True).encode())
    for file in files:
        try:
            key.update(_digest(file).encode())
        except OSError as error:
            raise OSError(error.errno, error.strerror or str(error), str(file)) from error
    return key.hexdigest()


def _digest(file: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(file).hexdigest()


def read_manifest(folder: Path) -> SourceManifest | None:
    """The manifest of a complete and undamaged entry, else None. Reads every byte once."""
    try:
        manifest = SourceManifest.model_validate_json((folder / "manifest.json").read_bytes())
        for name, record in manifest.files.items():
            file = folder / name
            if file.stat().st_size != record.bytes or _digest(file) != record.digest:
                return None
    except (OSError, ValidationError):
        return None
    return manifest


class SourceWriter:
    """Writes one entry: `append` rows, then `publish`. As a context manager it leaves nothing behind on
    failure."""

    def __init__(self, folder: Path) -> None:
        """`folder` is where the entry will be."""
        self._folder = folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name[:16]}.tmp-", dir=folder.parent))
        # mkdtemp lets nobody else in, but the cache may be shared by users of one volume.
        self._temporary.chmod(0o755)
        self._tokens = _GrowingArray(self._temporary / "tokens.npy", np.dtype(np.int32))
        self._trained = _GrowingArray(self._temporary / "trained.npy", np.dtype(np.bool_))
        self._lengths: list[NDArray[np.int64]] = []
        self._num_trained: list[NDArray[np.int64]] = []
        self._rows = (self._temporary / ROWS).open("wb")
        self._row_starts = [0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._tokens.file.close()
        self._trained.file.close()
        self._rows.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def append(self, ids: NDArray[np.int32], trained: NDArray[np.bool_], lengths: NDArray[np.int64]) -> None:
        """Add rows: `ids` and `trained` [T] end to end, `lengths` [n] with none of them 0."""
        self._tokens.append(ids)
        self._trained.append(trained)
        self._lengths.append(lengths)
        upto = np.concatenate([[0], np.cumsum(trained)])
        ends = np.cumsum(lengths)
        self._num_trained.append(upto[ends] - upto[ends - lengths])

    def keep(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add what is kept of rows beside their tokens; JSON, one for each sequence, in order."""
        for row in rows:
            self._row_starts.append(self._row_starts[-1] + self._rows.write(json.dumps(row).encode() + b"\n"))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each row appended so far."""
        return np.concatenate(self._lengths) if self._lengths else np.empty(0, dtype=np.int64)

    def publish(
        self,
        bins: Bins,
        *,
        capacity: int,
        num_rows: int,
        num_rows_dropped: int,
        notes: list[str],
        marks: NDArray[np.float32] | None = None,
    ) -> SourceManifest:
        """Complete the entry and put it in place, unless another process has done so by now."""
        self._tokens.finish()
        self._trained.finish()
        self._rows.close()
        lengths = self.lengths
        num_trained = np.concatenate(self._num_trained)
        rows, offsets = bins
        arrays: dict[str, NDArray[Any]] = {
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "bin_rows": rows,
            "bin_offsets": offsets,
            "sequence_tokens": np.add.reduceat(lengths[rows], offsets[:-1]),
            "sequence_trained": np.add.reduceat(num_trained[rows], offsets[:-1]),
        }
        if marks is not None:
            arrays["marks"] = marks
        if len(self._row_starts) > 1:
            assert len(self._row_starts) == len(offsets), "one for each sequence"
            arrays["row_starts"] = np.array(self._row_starts, dtype=np.int64)
        else:
            (self._temporary / ROWS).unlink()
        for name, array in arrays.items():
            np.save(self._temporary / f"{name}.npy", array, allow_pickle=False)
        num_sequences = len(offsets) - 1
        num_tokens = int(lengths.sum())
        manifest = SourceManifest(
            num_rows=num_rows,
            num_rows_dropped=num_rows_dropped,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            num_trained_tokens=int(num_trained.sum()),
            packing_efficiency=num_tokens / (num_sequences * capacity),
            notes=notes,
            files={
                file.name: FileRecord(bytes=file.stat().st_size, digest=_digest(file))
                for file in sorted(self._temporary.iterdir())
            },
        )
        (self._temporary / "manifest.json").write_text(manifest.model_dump_json(by_alias=True, indent=1))
        return self._put_in_place(manifest)

    def _put_in_place(self, manifest: SourceManifest) -> SourceManifest:
        for _ in range(3):
            try:
                self._temporary.rename(self._folder)
                return manifest
            except OSError:
                # Something is there already: another process's entry, to be used, or a damaged one, to be
                # moved away.
                if (theirs := read_manifest(self._folder)) is not None:
                    return theirs
                with tempfile.TemporaryDirectory(prefix="damaged-", dir=self._folder.parent) as aside:
                    if self._folder.exists():
                        self._folder.rename(Path(aside) / "entry")
        raise StorageError(f"{self._folder} cannot be written: other processes keep putting damaged entries there")


class _GrowingArray:
    """A one-dimensional .npy file whose length is known at the end."""

    def __init__(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.file: BinaryIO = path.open("wb")
        self._dtype = dtype
        self._length = 0
        self._header_size = self._write_header()

    def _write_header(self) -> int:
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._length,),
        }
        self.file.seek(0)
        # numpy pads the header so that the length may grow in place.
        np.lib.format.write_array_header_1_0(self.file, header)
        return self.file.tell()

    def append(self, values: NDArray[Any]) -> None:
        self.file.write(values.astype(self._dtype, copy=False).tobytes())
        self._length += len(values)

    def finish(self) -> None:
        assert self._write_header() == self._header_size, "the header must fit where the first one was"
        self.file.close()


class SourceArrays:
    """An entry's arrays, memory-mapped; the small ones per sequence are read."""

    def __init__(self, folder: Path) -> None:
        """`folder` is `PreparedSource.folder`. Raises StorageError when it cannot be read."""
        try:
            self.tokens: NDArray[np.int32] = _map(folder / "tokens.npy")
            self.trained: NDArray[np.bool_] = _map(folder / "trained.npy")
            self.offsets: NDArray[np.int64] = _map(folder / "offsets.npy")
            self.bin_rows: NDArray[np.int64] = _map(folder / "bin_rows.npy")
            self.bin_offsets: NDArray[np.int64] = _map(folder / "bin_offsets.npy")
            self.sequence_tokens: NDArray[np.int64] = np.load(folder / "sequence_tokens.npy", allow_pickle=False)
            self.sequence_trained: NDArray[np.int64] = np.load(folder / "sequence_trained.npy", allow_pickle=False)
            marked = (folder / "marks.npy").exists()
            self.marks: NDArray[np.float32] | None = _map(folder / "marks.npy") if marked else None
            kept = (folder / ROWS).exists()
            self._rows = np.memmap(folder / ROWS, dtype=np.uint8, mode="r") if kept else None
            self._row_starts: NDArray[np.int64] | None = _map(folder / "row_starts.npy") if kept else None
        except (OSError, ValueError) as error:
            raise StorageError(f"{folder} cannot be read as prepared data: {error}") from error

    @property
    def num_sequences(self) -> int:
        return len(self.sequence_tokens)

    def rows_of(self, sequence: int) -> list[tuple[int, int]]:
        """[start, end) in `tokens` of each row of a sequence."""
        rows = self.bin_rows[self.bin_offsets[sequence] : self.bin_offsets[sequence + 1]]
        return [(int(self.offsets[row]), int(self.offsets[row + 1])) for row in rows]

    def kept(self, sequence: int) -> dict[str, Any]:
        """What was kept of a sequence beside its tokens, in a source of questions."""
        assert self._rows is not None, "only questions are kept"
        assert self._row_starts is not None, "the two files are written together"
        start, end = self._row_starts[sequence : sequence + 2]
        row: dict[str, Any] = json.loads(self._rows[start:end].tobytes())
        return row


def _map(file: Path) -> NDArray[Any]:
    array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    return array
