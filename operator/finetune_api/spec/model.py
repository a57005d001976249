"""The model to start from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Contract
from finetune_api.spec.fields import ModelUri, TokenizerUri, only_for_hub

__all__ = ["Model"]


class Model(Contract):
    """The model to start from."""

    source: ModelUri
    """Where the model is: hf://org/name, a folder in Hugging Face layout or a GGUF file by file:///path,
    pvc://claim/path or package://python_package/path, what a job wrote into a bucket, by s3:// or gs://, or job://name:
    the model of another job of the namespace, which is waited for. A GGUF file is dequantized once."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Branch, tag or commit of an hf:// source. Pin a commit to make the job repeatable."""
    tokenizer: TokenizerUri | None = None
    """Where the tokenizer is, when it is not beside the model."""
    chat_template: Literal["tokenizer", "chatml", "plain"] = "tokenizer"
    """`tokenizer` uses the one that the tokenizer brings. `chatml` and `plain` are for a tokenizer without one; the
    template is saved with the artifact."""
    parameters: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?[MBT]$", max_length=12)] | None = None
    """Size such as 135M or 8B, for `learningRate: auto`. Left out: what the source's name says, else the model."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships. Leave it off unless you have read that code."""

    rules = (only_for_hub("revision", "remove it"),)
