"""Container images as files: layers are tar archives of folders, an image is a few lines of JSON that name them.

Written as the image specification has it (github.com/opencontainers/image-spec), uncompressed, so that a layer's digest
is the digest of its contents too. Called by tests.cluster.images.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

__all__ = ["Image", "Layer", "Start", "compressed_size", "write_archive", "write_layer"]

_EPOCH = 315532800
"""1980: zip files, which some of the contents are, know no time before."""
_TYPE = "application/vnd.oci.image"
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Layer:
    """One layer: its digest, and its size in bytes."""

    digest: str
    size: int


@dataclass(frozen=True)
class Start:
    """How a container of an image starts, unless a pod says otherwise."""

    command: Sequence[str] = ()
    user: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Image:
    """An image by its full name."""

    name: str
    layers: Sequence[Layer]
    start: Start = field(default_factory=Start)

    def config(self) -> bytes:
        """Its configuration, a blob of its own."""
        environment = [f"{name}={value}" for name, value in self.start.environment.items()]
        if "PATH" not in self.start.environment:
            environment.insert(0, _PATH)
        container = {"Env": environment, "User": self.start.user, "WorkingDir": "/", "Labels": dict(self.start.labels)}
        if self.start.command:
            container["Cmd"] = list(self.start.command)
        rootfs = {"type": "layers", "diff_ids": [layer.digest for layer in self.layers]}
        return _json({"architecture": "amd64", "os": "linux", "config": container, "rootfs": rootfs})

    def manifest(self) -> bytes:
        """What names its configuration and its layers."""
        layers = [_descriptor("layer.v1.tar", layer.digest, layer.size) for layer in self.layers]
        config = _describe("config.v1+json", self.config())
        return _json({"schemaVersion": 2, "mediaType": f"{_TYPE}.manifest.v1+json", "config": config, "layers": layers})


def write_layer(file: Path, folders: Mapping[str, Path]) -> Layer:
    """Writes the contents of `folders` as one layer, each at the path that it is named by.

    Everything belongs to root, and nothing tells when it was written: the same contents are the same layer.
    """
    with file.open("wb") as raw:
        digesting = _Digesting(raw)
        with tarfile.open(fileobj=digesting, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
            for prefix, folder in folders.items():
                for name in _parents(prefix):
                    tar.addfile(_folder(name))
                for path in _walk(folder):
                    _add(tar, path, f"{prefix.strip('/')}/{path.relative_to(folder)}".lstrip("/"))
    return Layer(f"sha256:{digesting.digest.hexdigest()}", digesting.size)


def write_archive(out: IO[bytes], images: Sequence[Image], blobs: Mapping[str, Path]) -> None:
    """Writes `images` as an archive that containerd imports. `blobs` are files of layers by digest; a layer that is
    not among them must be there already."""
    index = {
        "schemaVersion": 2,
        "mediaType": f"{_TYPE}.index.v1+json",
        "manifests": [
            _describe("manifest.v1+json", image.manifest())
            | {
                "annotations": {"io.containerd.image.name": image.name},
                "platform": {"architecture": "amd64", "os": "linux"},
            }
            for image in images
        ],
    }
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
        _put(tar, "oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        _put(tar, "index.json", _json(index))
        for content in {part for image in images for part in (image.config(), image.manifest())}:
            _put(tar, _blob(_digest(content)), content)
        for digest, path in blobs.items():
            info = tarfile.TarInfo(_blob(digest))
            info.size = path.stat().st_size
            with path.open("rb") as file:
                tar.addfile(info, file)


def compressed_size(archive: Path, name: str, blobs: Path) -> int:
    """Bytes of an image's layers as registries keep them, by gzip. `blobs` is a folder of containerd's that has those
    which are not in the archive."""
    with tarfile.open(archive) as tar:
        index = json.loads(_read(tar, "index.json"))
        (named,) = (one for one in index["manifests"] if one["annotations"]["io.containerd.image.name"] == name)
        layers = [_blob(one["digest"]) for one in json.loads(_read(tar, _blob(named["digest"])))["layers"]]
        size = 0
        for path in layers:
            inside = tar.extractfile(path) if path in tar.getnames() else None
            with inside or (blobs / path.removeprefix("blobs/")).open("rb") as file:
                size += _zipped(file)
    return size


def _read(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    assert file is not None
    return file.read()


def _zipped(file: IO[bytes]) -> int:
    packer = zlib.compressobj(wbits=31)  # gzip's format
    size = sum(len(packer.compress(chunk)) for chunk in iter(lambda: file.read(1 << 20), b""))
    return size + len(packer.flush())


class _Digesting(io.RawIOBase):
    """Counts and digests what passes on its way into a file."""

    def __init__(self, out: IO[bytes]) -> None:
        self._out = out
        self.digest = hashlib.sha256()
        self.size = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.size += len(data)
        return self._out.write(data)


def _walk(folder: Path) -> Iterator[Path]:
    """Everything in it, folders before what is in them; links are not followed."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        yield Path(entry.path)
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))


def _add(tar: tarfile.TarFile, path: Path, name: str) -> None:
    info = tar.gettarinfo(path, name)
    if info.islnk():  # the same file under two names: two files, as neither layer nor folder promises the other one
        info.type, info.linkname, info.size = tarfile.REGTYPE, "", path.stat().st_size
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    info.mtime = _EPOCH
    if info.isreg():
        with path.open("rb") as file:
            tar.addfile(info, file)
    elif not info.isdev():
        tar.addfile(info)


def _parents(prefix: str) -> list[str]:
    """Folders that must be there for `prefix`, from the outermost on: /opt/a is opt, opt/a."""
    parts = [part for part in prefix.split("/") if part]
    return ["/".join(parts[: count + 1]) for count in range(len(parts))]


def _folder(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.mtime = tarfile.DIRTYPE, 0o755, _EPOCH
    return info


def _put(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def _describe(kind: str, content: bytes) -> dict[str, Any]:
    return _descriptor(kind, _digest(content), len(content))


def _descriptor(kind: str, digest: str, size: int) -> dict[str, Any]:
    return {"mediaType": f"{_TYPE}.{kind}", "digest": digest, "size": size}


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _blob(digest: str) -> str:
    return f"blobs/{digest.replace(':', '/')}"


def _json(document: Any) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
