"""A model's or an adapter's folder: made beside its place, filled, sealed with digests, renamed. No torch is imported.

Called by `artifact` (what training leaves), `merge` and `exporting` (artifacts made of artifacts) and
`checkpoint.exports` (artifacts made of checkpoints).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from blake3 import blake3

from finetune_api.failures import Problem
from finetune_api.progress import Artifact
from finetune_api.spec import Precision
from finetune_trainers.errors import UserError
from finetune_trainers.places import appearing_whole, uri_of
from finetune_trainers.weights import file_digest

__all__ = [
    "ADAPTER_WEIGHTS",
    "CALIBRATION",
    "DIGESTS",
    "PEFT_PREFIX",
    "RUN_ARTIFACT",
    "TOKENIZER_FILES",
    "digest_list",
    "model_config",
    "new_folder",
    "seal",
    "write_config",
]

DIGESTS = "digests.json"
RUN_ARTIFACT = "artifact"
"""In a run's folder: what it has trained."""
ADAPTER_WEIGHTS = "adapter_model.safetensors"
CALIBRATION = "calibration.json"
"""Of a reward model: where its scores lie."""
PEFT_PREFIX = "base_model.model."
"""What PEFT puts before the names of the model that it wraps."""
TOKENIZER_FILES = ("chat_template.jinja", "token*", "special_tokens_map.json", "vocab*", "merges.txt", "*.model")
"""Patterns of whatever a tokenizer consists of."""
_DTYPES = {Precision.FP32: "float32", Precision.BF16: "bfloat16", Precision.FP16: "float16"}


@contextmanager
def new_folder(folder: Path, field: str = "spec.outputs") -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends well. `field` is what named it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        message = "holds something already; name a folder that is not there yet"
        problem = Problem(path=field, value=str(folder), message=message)
        raise UserError(str(problem), [problem])
    with appearing_whole(folder) as unfinished:
        yield unfinished


def seal(unfinished: Path, folder: Path, kind: str, base: dict[str, Any]) -> Artifact:
    """Write digests.json over all files of `unfinished`, which will be at `folder`, and describe the artifact."""
    paths = sorted(path for path in unfinished.rglob("*") if path.is_file())
    files = {}
    for path in paths:
        path.chmod(0o644)
        files[str(path.relative_to(unfinished))] = (path.stat().st_size, file_digest(path))
    data, artifact = digest_list(uri_of(folder), kind, base, files)
    (unfinished / DIGESTS).write_bytes(data)
    return artifact


def digest_list(
    uri: str, kind: str, base: Mapping[str, Any], files: Mapping[str, tuple[int, str]]
) -> tuple[bytes, Artifact]:
    """The content of digests.json, and the artifact that it makes. `files`: name -> (bytes, blake3)."""
    listed = {name: {"blake3": digest, "bytes": size} for name, (size, digest) in sorted(files.items())}
    data = (json.dumps({"kind": kind, "base": base, "files": listed}, indent=2) + "\n").encode()
    total = sum(size for size, _ in files.values()) + len(data)
    return data, Artifact(uri=uri, kind=kind, digest=blake3(data).hexdigest(), bytes=total)


def write_config(folder: Path, base: Path, precision: Precision, trust_remote_code: bool = False) -> None:
    """config.json with the type of the weights, and the base's generation_config.json."""
    (folder / "config.json").write_bytes(model_config(base, precision))
    if (base / "generation_config.json").is_file():
        shutil.copyfile(base / "generation_config.json", folder / "generation_config.json")
    for code in base.glob("*.py") if trust_remote_code else ():
        shutil.copyfile(code, folder / code.name)


def model_config(base: Path, precision: Precision) -> bytes:
    """The base's config.json, but for the type of the weights."""
    config = json.loads((base / "config.json").read_text())
    config.pop("torch_dtype", None)  # its name before transformers 5
    return (json.dumps(config | {"dtype": _DTYPES[precision]}, indent=2, sort_keys=True) + "\n").encode()
