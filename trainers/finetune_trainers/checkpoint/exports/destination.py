"""Where an export goes: a new folder of this machine, or a place in a bucket, sealed with digests.

A folder is made beside its place and renamed when it is whole. In a bucket digests.json comes last: where it is, all
that it lists is. Digests are taken while files are written; nothing is read again.

A writer with a name, such as a job, puts a mark into the bucket before anything else and takes it away at the end. What
it finds under a mark of its own is left of itself, from an attempt that died, and gives way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from blake3 import blake3

from finetune_api.failures import Problem
from finetune_api.progress import Artifact
from finetune_api.spec import Precision
from finetune_api.uris import Scheme, parse_uri
from finetune_trainers.artifact_folder import DIGESTS, digest_list, model_config, new_folder
from finetune_trainers.checkpoint.exports.streaming import ExportedFile
from finetune_trainers.checkpoint.storage.opening import open_storage
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.errors import UserError
from finetune_trainers.model_sources import local_path
from finetune_trainers.places import uri_of

__all__ = ["UNFINISHED", "Destination", "left_behind", "local_folder", "new_destination"]

UNFINISHED = ".unfinished"
"""The mark; the writer's name is in it."""
_BLOCK_BYTES = 8 << 20


class Destination:
    """Takes files and remembers their digests."""

    def __init__(self, sink: Storage, uri: str) -> None:
        self.sink = sink
        self._uri = uri
        self._files: dict[str, ExportedFile] = {}

    def add(self, name: str, data: bytes) -> None:
        """A small file."""
        self.sink.create(name, data)
        self._files[name] = ExportedFile(len(data), blake3(data).hexdigest())

    def add_file(self, name: str, path: Path) -> None:
        """A file of this machine, of any size."""
        size = path.stat().st_size
        digest = blake3()
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
        self.sink.write(name, partial(_blocks, path), size)
        self._files[name] = ExportedFile(size, digest.hexdigest())

    def record(self, files: Mapping[str, ExportedFile]) -> None:
        """Files that were written into the sink by others."""
        self._files |= files

    def add_config(self, base: Path, dtype: Precision) -> None:
        """config.json with the type of the weights, and the base's generation_config.json."""
        self.add("config.json", model_config(base, dtype))
        if (base / "generation_config.json").is_file():
            self.add("generation_config.json", (base / "generation_config.json").read_bytes())

    def seal(self, kind: str, base: Mapping[str, Any]) -> Artifact:
        """The last act: digests.json over all files."""
        files = {name: (file.bytes, file.digest) for name, file in self._files.items()}
        data, artifact = digest_list(self._uri, kind, base, files)
        self.sink.create(DIGESTS, data)
        return artifact


def local_folder(to: str) -> Path | None:
    """The folder of this machine that a path or URI stands for; None for a place in a bucket."""
    if "://" not in to:
        return Path(to).absolute()
    uri = parse_uri(to, (Scheme.FILE, Scheme.PVC, Scheme.S3, Scheme.GS))
    return local_path(to) if uri.scheme in (Scheme.FILE, Scheme.PVC) else None


def left_behind(storage: Storage, to: str, field: str, writer: str | None) -> Sequence[str]:
    """Names of what `writer` has left at `to` unfinished. Raises UserError when anything else is there."""
    names = [stored.name for stored in storage.list("")]
    if not names or (writer is not None and UNFINISHED in names and storage.read(UNFINISHED) == writer.encode()):
        return names
    problem = Problem(path=field, value=to, message="holds something already; name a place that is empty")
    raise UserError(str(problem), [problem])


@contextmanager
def new_destination(to: str, field: str = "--to", writer: str | None = None) -> Iterator[Destination]:
    """`to` is a path or a URI; `field` named it. Raises UserError when something is there already that is not left of
    `writer` itself."""
    folder = local_folder(to)
    if folder is not None:
        with new_folder(folder, field) as unfinished:
            yield Destination(PosixStorage(str(unfinished)), uri_of(folder))
        return
    storage = open_storage(to)
    if old := left_behind(storage, to, field, writer):
        storage.delete(old)
    if writer is not None:
        storage.replace(UNFINISHED, writer.encode())
    yield Destination(storage, to)
    if writer is not None:
        storage.delete([UNFINISHED])


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block
