"""A GGUF file as a folder in Hugging Face layout: unpacked once, kept in the cache under the file's digest.

Called by `models.prepare_model` on the driver. transformers does the conversion; what is added here is that the
file's header is read once instead of once per part (config, tokenizer, weights), and without numpy's memmap
bookkeeping on each of its hundred thousand entries, which is most of the time that loading takes.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from finetune_api.failures import Problem
from finetune_trainers.errors import UserError
from finetune_trainers.places import appearing_whole
from finetune_trainers.weights import write_tensors

__all__ = ["is_gguf", "unpack_gguf"]

LAYOUT = "bf16-1"
"""Part of the cache's folder name; changed when what is written into it changes."""


def is_gguf(path: Path) -> bool:
    """Whether `path` is a single file that is meant to be GGUF, by its name or its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return path.suffix == ".gguf" or file.read(4) == b"GGUF"


def unpack_gguf(path: Path, digest: str, cache_root: Path, on_progress: Callable[[float, str], None]) -> Path:
    """The folder with `path` as bf16 safetensors, tokenizer, chat template and generation config.

    `digest` is that of the file's content. The folder appears whole, by a rename; of two processes that unpack the
    same file at once one wins and both get the same folder. Raises UserError for a file that cannot be read.
    """
    folder = cache_root / "models" / f"{digest}-{LAYOUT}"
    if folder.is_dir():
        return folder
    on_progress(0.0, f"Unpacking {path.name}, once for this file")
    with appearing_whole(folder, others_will_do=True) as unfinished:
        _convert(path, unfinished)
    on_progress(100.0, f"Unpacked {path.name}")
    return folder


def _convert(path: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    try:
        with _header_read_once():
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(
                **where, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
            )
    except (ValueError, LookupError, TypeError, OSError, RuntimeError, struct.error) as error:
        # the readers check little: a cut-off file ends in whichever of these their arithmetic reaches
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        problem = Problem(
            path="spec.model.source",
            value=str(path),
            message=f"is not a whole GGUF file of an architecture that transformers knows: {reason}; copy it again",
        )
        raise UserError(str(problem), [problem]) from error
    # not model.save_pretrained, which imports every training engine that is installed: ten seconds on a cold machine
    names = dict(model.named_parameters()) | dict(model.named_buffers())
    saved = model.state_dict()
    write_tensors(folder, ((name, saved[name]) for name in names if name in saved))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _header_read_once() -> Iterator[None]:
    """For the time of the block, let transformers share one parsed header and one table of tensor names."""
    import gguf

    class Reader(gguf.GGUFReader):
        """Sees the file as a plain array: a slice of a memmap costs many times more, and there are millions."""

        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            self._bytes = mapped.view(np.ndarray)

    original_reader, original_names = gguf.GGUFReader, gguf.get_tensor_name_map
    # setattr: for mypy the one is a class and the other a function; transformers only calls them
    setattr(gguf, "GGUFReader", cache(Reader))  # noqa: B010
    setattr(gguf, "get_tensor_name_map", cache(original_names))  # noqa: B010
    try:
        yield
    finally:
        setattr(gguf, "GGUFReader", original_reader)  # noqa: B010
        setattr(gguf, "get_tensor_name_map", original_names)  # noqa: B010
