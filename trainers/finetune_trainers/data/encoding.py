"""What a job's model says about its data: the tokenizer, its stop tokens, and the template. Used by `prepare`
and `prompts`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from tokenizers import Tokenizer

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_api.spec import DataFormat
from finetune_trainers.data.template import ChatTemplate, PlainText, Renderer
from finetune_trainers.errors import UserError
from finetune_trainers.prepared import PreparedModel

__all__ = ["TextEncoding", "load_encoding", "open_encoding"]

SEPARATORS = {DataFormat.PROMPT_COMPLETION: "", DataFormat.ALPACA: "\n\n"}
"""Between prompt and answer where there is no template. A prompt-completion row is joined as it stands. Preferences and
prompts need a template: they may be conversations."""


@dataclass(frozen=True)
class TextEncoding:
    """How text becomes tokens for one model."""

    tokenizer: Tokenizer
    """Neither truncates nor pads."""
    special_tokens: Mapping[str, Any]
    """Names that a template may use: bos_token, eos_token, ..."""
    stop_tokens: Mapping[str, int]
    """Every special token, text -> id: any of them may end a turn."""
    eos_id: int
    template: str | None

    @property
    def fingerprint(self) -> str:
        """Digest of all that decides which tokens a text becomes."""
        parts = [self.tokenizer.to_str(), repr(sorted(self.special_tokens.items())), repr(self.template)]
        return blake3("\0".join(parts).encode()).hexdigest()

    def renderer(self, form: DataFormat) -> Renderer | None:
        """What renders rows of format `form`; None for documents, which are text already. Raises
        UserError."""
        if form is DataFormat.TEXT:
            return None
        if self.template is not None:
            return ChatTemplate(self.template, self.special_tokens, list(self.stop_tokens))
        if form in SEPARATORS:
            return PlainText(SEPARATORS[form])
        problem = Problem(
            path="spec.model.chatTemplate",
            value="tokenizer",
            message=f"the model's tokenizer brings no chat template, which data of format {form} needs; "
            "set it to chatml (or plain)",
        )
        raise UserError(str(problem), [problem])


def load_encoding(plan: RunPlan, model: PreparedModel) -> TextEncoding:
    """The tokenizer of `model`. Raises UserError when it is of no use for training."""
    path = "spec.model.tokenizer" if plan.model.tokenizer else "spec.model.source"
    value = plan.model.tokenizer or plan.model.source
    tokenizer = _open(Path(model.tokenizer_folder), plan.model.trust_remote_code)
    return _encoding(tokenizer, model.chat_template, path, value)


def open_encoding(folder: Path, path: str, value: str) -> TextEncoding:
    """The tokenizer in `folder` with the template that it brings. Raises UserError about `path`, where `value`
    stands."""
    tokenizer = _open(folder)
    template = tokenizer.chat_template
    return _encoding(tokenizer, template.get("default") if isinstance(template, dict) else template, path, value)


def _open(folder: Path, trust_remote_code: bool = False) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)


def _encoding(tokenizer: Any, template: str | None, path: str, value: str) -> TextEncoding:
    if not tokenizer.is_fast:
        problem = Problem(path=path, value=value, message="has a tokenizer without tokenizer.json; convert it first")
        raise UserError(str(problem), [problem])
    if tokenizer.eos_token_id is None:
        message = "has a tokenizer without an eos_token, so the model could not learn to stop; set one"
        problem = Problem(path=path, value=value, message=message)
        raise UserError(str(problem), [problem])
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    special = {token.content: index for index, token in backend.get_added_tokens_decoder().items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return TextEncoding(
        tokenizer=backend,
        special_tokens=tokenizer.special_tokens_map,
        stop_tokens={**special, **named},
        eos_id=tokenizer.eos_token_id,
        template=template,
    )
