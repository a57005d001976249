"""Makes the images that a cluster with real nodes runs, on a machine without Docker, and keeps them for its nodes.

`python -m tests.cluster images` makes what the cache lacks. What Docker would make of operator/Dockerfile and
trainers/Dockerfile is made here from the same lines by debootstrap and uv: a layer of Debian, a layer of what uv.lock
pins, a layer of our code. The first two are imported once into a folder of containerd's, and every node begins with a
copy of it that shares the files: six gigabytes are kept twice, not six times. Layers of code are a few megabytes, which
a node imports while it runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.build import BuildError, Say, cache_folder, cached, program_path
from tests.cluster.dockerfile import Dockerfile, read_dockerfile
from tests.cluster.layers import Image, Layer, Start, compressed_size, write_archive, write_layer
from tests.cluster.processes import started, wait_until

__all__ = [
    "COREDNS",
    "KUBERAY",
    "OPERATOR",
    "SANDBOX",
    "TRAINER",
    "Images",
    "copy_store",
    "import_images",
    "ready_images",
]

_ROOT = Path(__file__).resolve().parents[2]
_VERSION = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]

OPERATOR = f"ghcr.io/finetune-operator/operator:{_VERSION}"
TRAINER = f"ghcr.io/finetune-operator/trainer:{_VERSION}"
"""Ours have the names that the chart gives them by itself."""
SANDBOX = "localhost/finetune-tests/sandbox:1"
"""What holds the namespaces of a pod."""
COREDNS = "localhost/finetune-tests/coredns:1"
KUBERAY = "localhost/finetune-tests/kuberay:1"

_DOCKERFILES = {"operator": _ROOT / "operator" / "Dockerfile", "trainer": _ROOT / "trainers" / "Dockerfile"}
_PYTHON = "python3.11"
"""Debian's, at the same path here and in the images."""
_HOME = "opt/finetune"
_LIBRARY = f"{_HOME}/lib/{_PYTHON}/site-packages"
_LAYERS = "layers.json"
_OF_DEBIAN = ("DEBIAN", "PACKAGES", "ACCOUNT", "LEFT_OUT")
_USED = (*_OF_DEBIAN, "EXTRAS", "CYCLONEDX")
"""Arguments of the Dockerfiles that are followed here; the others choose what only Docker makes."""


@dataclass(frozen=True)
class Images:
    """`store` is a folder of containerd's with all packages; `archive` has the images on top of them."""

    store: Path
    archive: Path

    def compressed_size(self, name: str) -> int:
        """Bytes of one image as a registry keeps it."""
        blobs = self.store / "containerd" / "io.containerd.content.v1.content" / "blobs"
        return compressed_size(self.archive, name, blobs)


def ready_images(say: Say) -> Images:
    """All images. The first call on a machine takes minutes, one after a change of code seconds.

    Raises BuildError when they cannot be made.
    """
    store = cached(f"packages-{_packages_key()}", lambda into: _make_packages(into, say))
    programs = {COREDNS: program_path("coredns", say), KUBERAY: program_path("kuberay", say)}
    key = _key([store.name, *(path.parent.name for path in programs.values()), *map(_text, _DOCKERFILES.values())])
    folder = cached(f"images-{key}-{_digest_of_code()}", lambda into: _make_images(into, store, programs, say))
    _forget_others("packages-", store)
    _forget_others("images-", folder)
    return Images(store, folder / "images.tar")


def copy_store(images: Images, target: Path) -> None:
    """A folder for a containerd of its own: files of images are shared, for nobody changes them; its databases are
    not."""
    shutil.rmtree(target, ignore_errors=True)
    _run(["cp", "--archive", "--link", images.store / "containerd", target])
    for database in target.rglob("*.db"):
        if "snapshots" not in database.relative_to(target).parts:  # in there it is an image's file
            original = images.store / "containerd" / database.relative_to(target)
            database.unlink()
            shutil.copy2(original, database)


def import_images(images: Images, socket: Path) -> None:
    """Gives them to the containerd that listens on `socket` and began with a copy of the store, in the place of older
    ones of the same names. Raises BuildError."""
    _run([*_ctr(socket), "images", "import", images.archive])


def _make_packages(into: Path, say: Say) -> None:
    """Images of Debian and packages, without our code."""
    layers: dict[str, list[Layer]] = {}
    files: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(dir=into) as temporary:
        for name, path in _DOCKERFILES.items():
            work = Path(temporary) / name
            work.mkdir()
            read = read_dockerfile(path)
            debian, debian_file = _debian_layer(read, say)
            say(f"image of the {name}: packages by uv.lock, {read.arguments['EXTRAS']}")
            packages = write_layer(work / "packages.tar", {_HOME: _packages(read, work)})
            layers[name] = [debian, packages]
            files |= {debian.digest: debian_file, packages.digest: work / "packages.tar"}
        images = [Image(f"localhost/finetune-tests/packages-{name}:1", stack) for name, stack in layers.items()]
        say("importing them")
        _import(into / "containerd", images, files)
    _write_layers(into, layers)


def _debian_layer(dockerfile: Dockerfile, say: Say) -> tuple[Layer, Path]:
    """The layer of Debian, and its file, which is kept: it changes with the list of packages alone."""
    asked = [dockerfile.arguments[name] for name in _OF_DEBIAN]

    def make(into: Path) -> None:
        say(f"Debian {asked[0]} with {asked[1]}")
        with tempfile.TemporaryDirectory(dir=into) as temporary:
            layer = write_layer(into / "layer.tar", {"": _debian(dockerfile, Path(temporary))})
        _write_layers(into, {"debian": [layer]})

    folder = cached(f"debian-{_key(asked)}", make)
    return _read_layers(folder)["debian"][0], folder / "layer.tar"


def _write_layers(folder: Path, layers: Mapping[str, Sequence[Layer]]) -> None:
    document = {name: [[layer.digest, layer.size] for layer in stack] for name, stack in layers.items()}
    (folder / _LAYERS).write_text(json.dumps(document), encoding="utf-8")


def _read_layers(folder: Path) -> dict[str, list[Layer]]:
    known = json.loads((folder / _LAYERS).read_text(encoding="utf-8"))
    return {name: [Layer(digest, size) for digest, size in stack] for name, stack in known.items()}


def _make_images(into: Path, store: Path, programs: Mapping[str, Path], say: Say) -> None:
    """An archive of the cluster's images, without the layers that `store` has."""
    stacks = _read_layers(store)
    with tempfile.TemporaryDirectory(dir=into) as temporary:
        work = Path(temporary)
        say("our code as a layer, and images of programs")
        code = write_layer(work / "code.tar", {_LIBRARY: _code(work)})
        files = {code.digest: work / "code.tar"}
        images = [Image(SANDBOX, stacks["operator"][:1], Start(["sleep", "infinity"]))]
        for name, tag in (("operator", OPERATOR), ("trainer", TRAINER)):
            images.append(Image(tag, [*stacks[name], code], _start(read_dockerfile(_DOCKERFILES[name]))))
        for tag, program in programs.items():
            folder = work / program.name
            folder.mkdir()
            shutil.copy(program, folder / "manager")
            layer = write_layer(work / f"{program.name}.tar", {"": folder})
            files[layer.digest] = work / f"{program.name}.tar"
            images.append(Image(tag, [layer], Start(["/manager"], user="65532:65532")))
        with (into / "images.tar").open("wb") as archive:
            write_archive(archive, images, files)


def _start(dockerfile: Dockerfile) -> Start:
    return Start(dockerfile.command, dockerfile.user, dockerfile.environment, dockerfile.labels)


def _debian(dockerfile: Dockerfile, work: Path) -> Path:
    folder = work / "debian"
    include = ",".join(dockerfile.words("PACKAGES"))
    suite = dockerfile.arguments["DEBIAN"]
    _run(["debootstrap", "--variant=minbase", f"--include={include}", suite, folder])
    leave_out(folder, ["/dev", "/debootstrap", *dockerfile.words("LEFT_OUT")])
    for name in ("dev", "proc", "sys"):
        (folder / name).mkdir(exist_ok=True)
    (folder / "etc" / "resolv.conf").unlink(missing_ok=True)  # of this machine
    with (folder / "etc" / "passwd").open("a", encoding="utf-8") as passwd:
        passwd.write(f"{dockerfile.arguments['ACCOUNT']}\n")
    return folder


def leave_out(root: Path, patterns: Iterable[str]) -> None:
    """As `rm -rf` does in a container whose root this folder is."""
    for path in [path for pattern in patterns for path in root.glob(pattern.lstrip("/"))]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _packages(dockerfile: Dockerfile, work: Path) -> Path:
    """An environment that does not mind where it lies: its programs find their interpreter beside them."""
    folder = work / "packages"
    _uv("venv", "--quiet", "--relocatable", f"--python=/usr/bin/{_PYTHON}", folder)
    extras = dockerfile.words("EXTRAS")
    _uv("sync", "--quiet", "--locked", "--no-dev", "--no-install-project", *extras, UV_PROJECT_ENVIRONMENT=str(folder))
    bill = ("cyclonedx-py", "environment", "--output-reproducible", "--output-file", folder / "sbom.cdx.json")
    _uv("tool", "run", "--from", f"cyclonedx-bom=={dockerfile.arguments['CYCLONEDX']}", *bill, folder / "bin/python")
    return folder


def _code(work: Path) -> Path:
    wheels, folder = work / "wheels", work / "code"
    _uv("build", "--quiet", "--wheel", "--out-dir", wheels)
    _uv("pip", "install", "--quiet", "--no-deps", f"--python={_PYTHON}", "--target", folder, *wheels.glob("*.whl"))
    return folder


def _uv(*arguments: str | Path, **environment: str) -> str:
    """What it prints. Bytecode is made now, as nobody may write where it lies later, and is taken as it is: files in
    layers carry no time of their own."""
    uv = shutil.which("uv", path=os.pathsep.join([str(_ROOT / ".tools" / "bin"), os.environ.get("PATH", "")]))
    if uv is None:
        raise BuildError("there is no uv: `make install` fetches it into .tools")
    compiled = {"UV_COMPILE_BYTECODE": "1", "PYC_INVALIDATION_MODE": "UNCHECKED_HASH", "UV_SYSTEM_CERTS": "1"}
    return _run([uv, *arguments], compiled | environment)


def _run(command: Sequence[str | Path], environment: Mapping[str, str] | None = None) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    done = subprocess.run(
        list(command),
        cwd=_ROOT,
        env=inherited | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise BuildError(f"{' '.join(map(str, command))}: exit code {done.returncode}\n{done.stdout.strip()[-2000:]}")
    return done.stdout


def _import(root: Path, images: Sequence[Image], blobs: Mapping[str, Path]) -> None:
    """Has a containerd take `images` into its folder `root`, and unpack them."""
    with _containerd(root) as ctr:
        with subprocess.Popen([*ctr, "images", "import", "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as one:
            assert one.stdin is not None
            write_archive(one.stdin, images, blobs)
            one.stdin.close()
        if one.returncode:
            raise BuildError(f"containerd could not import {', '.join(image.name for image in images)}")


@contextmanager
def _containerd(root: Path) -> Iterator[list[str]]:
    """A containerd for as long as it takes to import images: `ctr` and how to reach it."""
    with tempfile.TemporaryDirectory(prefix="finetune-images-") as temporary:
        socket, config = Path(temporary) / "sock", Path(temporary) / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{root}"\nstate = "{temporary}/state"\noom_score = 0\n'
            f'disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]\n'
            f'[grpc]\naddress = "{socket}"\n',
            encoding="utf-8",
        )
        with started(["containerd", "--config", config], Path(temporary) / "log") as process:
            wait_until(socket.exists, "containerd to listen", process)
            yield _ctr(socket)


def _ctr(socket: Path) -> list[str]:
    """containerd's own command, in the namespace of Kubernetes' images."""
    return ["ctr", "--address", str(socket), "--namespace", "k8s.io"]


def _packages_key() -> str:
    """Follows from what the layers below our code are made of. Of uv.lock that is what it pins for an image: what only
    the tests need may change."""
    parts = []
    for path in _DOCKERFILES.values():
        read = read_dockerfile(path)
        pinned = _uv(
            "export", "--quiet", "--locked", "--no-header", "--no-dev", "--no-emit-project", *read.words("EXTRAS")
        )
        parts += [*(read.arguments[name] for name in _USED), pinned]
    return _key(parts)


def _digest_of_code() -> str:
    files = [_ROOT / "pyproject.toml"]
    for folder in (_ROOT / "operator", _ROOT / "trainers"):
        files += [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(_ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _key(parts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _forget_others(prefix: str, kept: Path) -> None:
    """Of these only the newest is kept: they are large."""
    for path in cache_folder().glob(f"{prefix}*"):
        if path.is_dir() and path != kept:
            shutil.rmtree(path, ignore_errors=True)
