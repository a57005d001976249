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
    """Where the model is: hf://org/name, a folder in Hugging Face layout or a single GGUF file by file:///path,
    pvc://claim/path or package://python_package/path; what a job wrote into a bucket, by s3:// or gs://; or the model
    that another job of the namespace writes, by job://name: this job then waits for that one. A GGUF file is
    dequantized once, before training."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Branch, tag or commit of an hf:// source. Pin a commit to make the job repeatable."""
    tokenizer: TokenizerUri | None = None
    """Where the tokenizer is, when it is not beside the model."""
    chat_template: Literal["tokenizer", "chatml", "plain"] = "tokenizer"
    """`tokenizer` uses the template that the tokenizer brings. `chatml` and `plain` are stored templates for a
    tokenizer without one; the template is saved with the artifact."""
    parameters: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?[MBT]$", max_length=12)] | None = None
    """Size hint such as 135M or 8B, for `learningRate: auto`. Left out: what the source's name says, or the model
    itself before training starts."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships. Leave it off unless you have read that code."""

    rules = (only_for_hub("revision", "remove it"),)
