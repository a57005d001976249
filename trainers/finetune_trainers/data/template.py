"""From a conversation to text, and which part of that text the model must learn to write.

Called by `tokenize` for every row and by `prompts`; the code that checks models takes `STORED_TEMPLATES`.

The trained parts ("spans") are the assistant's answers with the token that ends the turn. Where they lie is
asked of the template itself: what it renders up to the answer, with a generation prompt, must be how the
whole begins. That is exact for any template but costs renderings that grow with the square of the turns. So
it is done once for each sequence of roles, with marks in place of the contents; for a row the marks are
filled in, and a single rendering proves that the template did the same. Templates that look into the contents
fail the proof and go the exact way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError

from finetune_trainers.data.faults import RowError, shorten
from finetune_trainers.data.turns import Message

__all__ = ["STORED_TEMPLATES", "ChatTemplate", "PlainText", "Rendered", "Renderer"]

STORED_TEMPLATES: dict[str, str] = {
    # The assistant closes its turn with the tokenizer's own end-of-sequence token: `<|im_end|>` where that is
    # the one, otherwise a token that the model already knows how to stop with.
    # A bare line break after a tag would be dropped: transformers compiles templates with trim_blocks.
    "chatml": (
        "{% for message in messages %}"
        "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
        "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %}<|im_end|>{% endif %}{{ '\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # No space after the last colon: tokenizers join it with the first word of the answer.
    "plain": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
        "{% elif message['role'] == 'user' %}User: {{ message['content'] }}\n"
        "{% else %}Assistant: {{ message['content'] }}{{ eos_token }}\n{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}"
    ),
}

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""A template that has it marks its answers itself."""

TEMPLATE_ERRORS = (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a template may end with: its own raise_exception, or what the code in it runs into."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, cut after its last trained character."""

    text: str
    spans: list[tuple[int, int]]
    """[start, end) of each trained part, in characters, ascending."""


class Renderer(Protocol):
    """What turns a conversation into text."""

    adds_special_tokens: bool
    """Whether the tokenizer must add its own begin-of-sequence token: the text has none."""

    def render(self, messages: list[Message]) -> Rendered: ...

    def prompt(self, messages: list[Message]) -> str: ...


class PlainText:
    """For tokenizers without a template: prompt and answer one after the other, `separator` between them."""

    adds_special_tokens = True

    def __init__(self, separator: str) -> None:
        self.separator = separator

    def render(self, messages: list[Message]) -> Rendered:
        prompt = self.prompt(messages[:-1])
        text = prompt + messages[-1]["content"]
        return Rendered(text, [(len(prompt), len(text))])

    def prompt(self, messages: list[Message]) -> str:
        return "\n\n".join(message["content"] for message in messages) + self.separator


class ChatTemplate:
    """A Jinja chat template with the tokenizer's special tokens."""

    adds_special_tokens = False

    def __init__(self, template: str, special_tokens: Mapping[str, Any], stop_tokens: Sequence[str]) -> None:
        """`special_tokens` is what the template may name (eos_token, ...); `stop_tokens` are the texts of all
        special tokens: one that follows an answer at once ends the turn and belongs to it."""
        # transformers' own compiler: the same sandbox, filters and {% generation %} tag as at inference.
        from transformers.utils.chat_template_utils import _compile_jinja_template

        self._template = _compile_jinja_template(template)
        # Jinja copies them for every row, and copying a chain of mappings took two fifths of a rendering.
        self._template.globals = dict(self._template.globals)
        self._variables = {"tools": [], "documents": None, **special_tokens}
        self._stop_tokens = tuple(sorted((token for token in stop_tokens if token), key=len, reverse=True))
        self._marks_answers = GENERATION_TAG.search(template) is not None
        self._skeletons: dict[tuple[str, ...], Skeleton | None] = {}

    def render(self, messages: list[Message]) -> Rendered:
        """Text and trained spans of a conversation that ends with the assistant. Raises RowError when the
        template refuses the conversation, or does not tell where its answers are."""
        if self._marks_answers:
            return self._cut(*self._render_tagged(messages))
        text = self._text(messages)
        roles = tuple(message["role"] for message in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._skeleton(messages)
        skeleton = self._skeletons[roles]
        filled = skeleton.fill(messages, text) if skeleton else None
        return filled or self._cut(text, self._find_spans(messages, text))

    def prompt(self, messages: list[Message]) -> str:
        """The text before the answer to `messages`."""
        return self._text(messages, add_generation_prompt=True)

    def _text(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        try:
            text: str = self._template.render(
                messages=messages, add_generation_prompt=add_generation_prompt, **self._variables
            )
        except TEMPLATE_ERRORS as error:
            raise _refused(error) from None
        return text

    def _render_tagged(self, messages: list[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and [start, end) in characters of each {% generation %} block."""
        from transformers.utils.chat_template_utils import _render_with_assistant_indices

        render: Any = _render_with_assistant_indices  # untyped
        try:
            text, spans = render(self._template, messages, add_generation_prompt=False, **self._variables)
        except TEMPLATE_ERRORS as error:
            raise _refused(error) from None
        return text, spans

    def _find_spans(self, messages: list[Message], text: str) -> list[tuple[int, int]]:
        """The spans by rendering every beginning of the conversation; exact, and quadratic in the turns."""
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._start_of_answer(messages[:index], text)
                spans.append((start, self._end_of_answer(messages[: index + 1], text, start)))
        return spans

    def _start_of_answer(self, before: list[Message], text: str) -> int:
        prompt = self._text(before, add_generation_prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        # Some generation prompts open a block of reasoning that a finished answer does not have. Up to there
        # both agree, and what differs is the model's to write.
        pairs = enumerate(zip(prompt, text, strict=False))
        agreed = next((at for at, (one, other) in pairs if one != other), min(len(prompt), len(text)))
        if agreed > len(self._text(before)):
            return agreed
        raise RowError(
            "the model's chat template writes earlier messages differently once an answer follows, so the "
            "answer cannot be told from the prompt; set model.chatTemplate to chatml",
            value=shorten(text[agreed : agreed + 60]),
        )

    def _end_of_answer(self, messages: list[Message], text: str, start: int) -> int:
        upto = self._text(messages)
        if text.startswith(upto):
            return max(len(upto.rstrip()), start)
        # The answer is written differently when it comes last (an empty block of reasoning, say): then it
        # must stand word for word after the prompt, and be closed in the same way.
        answer = messages[-1]["content"].strip()
        closing = upto[upto.rfind(answer) + len(answer) :].rstrip() if answer in upto else None
        found = text.find(answer, start)
        if closing is not None and found >= 0 and text.startswith(closing, found + len(answer)):
            return found + len(answer) + len(closing)
        raise RowError(
            "the model's chat template changes an answer once further messages follow, so it cannot be "
            "trained on; make each answer the last of a row of its own, or set model.chatTemplate to chatml",
            path=f"messages[{len(messages) - 1}]",
            value=shorten(messages[-1]["content"]),
        )

    def _cut(self, text: str, spans: list[tuple[int, int]]) -> Rendered:
        """Let each span take in the stop token that follows it at once, and drop what comes after the
        last."""
        closed = []
        for start, end in spans:
            stop = next((token for token in self._stop_tokens if text.startswith(token, end)), "")
            closed.append((start, end + len(stop)))
        return Rendered(text[: closed[-1][1]] if closed else text, closed)

    def _skeleton(self, messages: list[Message]) -> Skeleton | None:
        """What the template puts around contents for these roles, or None when it does not treat marks
        alike."""
        marks = [f"\ue000{index}\ue001" for index in range(len(messages))]
        marked = [{"role": message["role"], "content": mark} for message, mark in zip(messages, marks, strict=True)]
        try:
            text = self._text(marked)
            rendered = self._cut(text, self._find_spans(marked, text))
        except RowError:
            return None
        pieces, at = [], 0
        for mark in marks:
            if text.count(mark) != 1 or (found := text.find(mark, at)) < 0:
                return None
            pieces.append(text[at:found])
            at = found + len(mark)
        tail = text[at:]
        spans = [
            (start - text.index(marks[index]), end - text.index(marks[index]) - len(marks[index]))
            for index, (start, end) in zip(
                (index for index, message in enumerate(messages) if message["role"] == "assistant"),
                rendered.spans,
                strict=True,
            )
        ]
        return Skeleton(pieces, tail, spans, [m["role"] == "assistant" for m in messages])


def _refused(error: Exception) -> RowError:
    """What the template itself says, and whose it is to change."""
    return RowError(f"the model's chat template refuses the conversation: {error}; change the row, or the chatTemplate")


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A rendering with holes for the contents."""

    pieces: list[str]
    """What stands before each content."""
    tail: str
    spans: list[tuple[int, int]]
    """Of each answer: (start from the beginning of its content, end from the end of its content)."""
    is_answer: list[bool]

    def fill(self, messages: list[Message], text: str) -> Rendered | None:
        """The rendering of `messages`, if filling the holes gives `text`; templates may strip contents."""
        contents = [message["content"] for message in messages]
        return self._fill(contents, text) or self._fill([content.strip() for content in contents], text)

    def _fill(self, contents: list[str], text: str) -> Rendered | None:
        parts: list[str] = []
        spans: list[tuple[int, int]] = []
        at = 0
        for piece, content, is_answer in zip(self.pieces, contents, self.is_answer, strict=True):
            at += len(piece)
            if is_answer:
                start, end = self.spans[len(spans)]
                spans.append((at + start, at + len(content) + end))
            at += len(content)
            parts += (piece, content)
        parts.append(self.tail)
        if "".join(parts) != text:
            return None
        return Rendered(text[: spans[-1][1]], spans)
