"""Several answers to each prompt, written by a model: what people or an AI judge compare. Called by `__main__`.

    in     {"prompt": "…" or […], "system"?: "…", …}
    out    the same row with "answers": […], all of them different

Sampling draws by numbers that follow from the seed, the row and the number of the answer, so batches and devices of
another size change nothing but rounding. Beams are the likeliest answers that a search finds: alike, and good for a
judge who is to tell small differences; samples show what the model does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.answers import Step
from finetune_api.failures import Problem
from finetune_api.preference_data import CandidatesReport, ToWrite
from finetune_api.progress import Stage
from finetune_api.spec import DataFormat
from finetune_trainers.answering import OnStep
from finetune_trainers.attention import PACKED_ATTENTION
from finetune_trainers.context import SingleProcessContext
from finetune_trainers.cpu_products import use_fast_products
from finetune_trainers.data.encoding import open_encoding
from finetune_trainers.data.faults import RowError
from finetune_trainers.data.template import Renderer
from finetune_trainers.data.turns import Message, Prompt
from finetune_trainers.errors import UserError
from finetune_trainers.evaluation import end_token_ids
from finetune_trainers.exporting import base_of_adapter
from finetune_trainers.gguf import is_gguf, unpack_gguf
from finetune_trainers.model_sources import locate_model
from finetune_trainers.places import cache_folder
from finetune_trainers.preference_data.reading import Names, Row, as_written, every_row, files_of, prompt_of
from finetune_trainers.preference_data.writing import new_file, write_data_set
from finetune_trainers.rollout import Request, Sampling
from finetune_trainers.rollout.in_process import InProcessEngine
from finetune_trainers.rollout.sampling import seed_of
from finetune_trainers.tuning import peft_warnings_off
from finetune_trainers.weights import file_digest

__all__ = ["write_candidates"]

_ANSWERS = "answers"
_WEIGHTS = (".safetensors", ".bin", "adapter_config.json")


@dataclass(frozen=True)
class _Question:
    number: int
    """Of its row."""
    messages: list[Message]
    fields: dict[str, Any]
    ids: list[int]


@dataclass(frozen=True)
class _Answer:
    text: str
    ended: bool


def write_candidates(asked: ToWrite, tell: OnStep) -> CandidatesReport:
    """Write answers to all prompts of the source. Raises UserError about the model, DataError with the places of rows
    that cannot be asked."""
    if asked.method == "beam" and asked.num_beams is not None and asked.num_beams < asked.num:
        raise UserError(f"--beams: {asked.num_beams} beams give no {asked.num} answers; raise it, or lower --num")
    new_file(asked)
    files = files_of(asked.source)
    model = _Model(asked, tell)
    questions = list(every_row(files, _Reader(asked, model).read, asked.max_rows))
    writer: Callable[[Sequence[_Question]], Iterator[list[_Answer]]]
    writer = model.samples if asked.method == "sample" else model.beams
    rows: list[dict[str, Any]] = []
    num_written = num_kept = num_cut = 0
    at_once = max(1, asked.batch_size // asked.num)
    for start in range(0, len(questions), at_once):
        some = questions[start : start + at_once]
        for question, answers in zip(some, writer(some), strict=True):
            texts = list(dict.fromkeys(one.text for one in answers if one.text))
            num_written += len(answers)
            num_kept += len(texts)
            num_cut += sum(not one.ended for one in answers)
            if len(texts) > 1:
                rows.append({**question.fields, "prompt": as_written(question.messages), _ANSWERS: texts})
        tell(Step(what="answers", done=num_written, total=len(questions) * asked.num))
    counts = {
        "rows_read": len(questions),
        "answers": num_written,
        "repeated": num_written - num_kept,
        "cut_off": num_cut,
        "left_out": len(questions) - len(rows),
    }
    told = {"model": model.provenance, "counts": counts}
    return CandidatesReport(data=write_data_set(asked, files, rows, told), **counts)


class _Reader:
    """Rows as the model is asked about them."""

    def __init__(self, asked: ToWrite, model: _Model) -> None:
        self._names = Names(asked.columns, ("prompt", "system"))
        self._model = model
        self._num_rows = 0

    def read(self, row: Row) -> _Question:
        number, self._num_rows = self._num_rows, self._num_rows + 1
        self._names.value(row, "prompt")
        found: Prompt = prompt_of(row, self._names)
        if _ANSWERS in found.fields:
            raise RowError("is where answers are written, and the row has it already; rename it", _ANSWERS)
        ids = self._model.encode(found.messages)
        most = self._model.longest_prompt
        if most is not None and len(ids) > most:
            raise RowError(
                f"has {len(ids)} tokens, and the model has room for {most} before an answer; shorten it, or lower"
                " --max-new-tokens",
                self._names["prompt"],
            )
        return _Question(number, found.messages, found.fields, ids)


class _Model:
    """Who writes."""

    def __init__(self, asked: ToWrite, tell: OnStep) -> None:
        folder = _folder(asked, tell)
        adapter = None if asked.adapter is None else Path(asked.adapter)
        texts = adapter if adapter is not None and (adapter / "tokenizer_config.json").is_file() else folder
        encoding = open_encoding(texts, "--model", str(asked.model or asked.adapter))
        renderer = encoding.renderer(DataFormat.PROMPT)
        assert renderer is not None, "prompts are rendered"
        self._asked, self._encoding, self._renderer = asked, encoding, renderer
        self._tokenizer: Any = AutoTokenizer.from_pretrained(texts, local_files_only=True)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = _load(folder, adapter, self._device)
        self._end_ids = end_token_ids(self._model, self._tokenizer)
        pad: int | None = self._tokenizer.pad_token_id
        self._pad_id = pad if pad is not None else self._end_ids[0]
        positions: int | None = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        self.longest_prompt = None if positions is None else positions - asked.max_new_tokens
        self.provenance = {
            "folder": str(folder),
            "adapter": asked.adapter,
            "digests": {
                "model": _digest(folder),
                "adapter": None if adapter is None else _digest(adapter),
            },
            "template": encoding.fingerprint,
        }

    def encode(self, messages: list[Message]) -> list[int]:
        renderer: Renderer = self._renderer
        text = renderer.prompt(messages)
        ids: list[int] = self._encoding.tokenizer.encode(text, add_special_tokens=renderer.adds_special_tokens).ids
        return ids

    def samples(self, questions: Sequence[_Question]) -> Iterator[list[_Answer]]:
        asked = self._asked
        sampling = Sampling(asked.max_new_tokens, asked.temperature, asked.top_p, asked.top_k)
        yield from self._written(questions, sampling)

    def beams(self, questions: Sequence[_Question]) -> Iterator[list[_Answer]]:
        asked, beams = self._asked, self._asked.num_beams or self._asked.num
        sampling = Sampling(asked.max_new_tokens, temperature=0.0, num_beams=beams, length_penalty=asked.length_penalty)
        yield from self._written(questions, sampling)

    def _written(self, questions: Sequence[_Question], sampling: Sampling) -> Iterator[list[_Answer]]:
        asked = self._asked
        engine = InProcessEngine(
            self._model, self._pad_id, self._end_ids, _Alone(self._device), batch_size=asked.batch_size
        )
        requests = [
            Request(question.ids, seed_of(asked.seed, question.number, number), place=number)
            for question in questions
            for number in range(asked.num)
        ]
        completions = engine.generate(requests, sampling)
        for start in range(0, len(completions), asked.num):
            yield [_Answer(self._text(one.ids), one.ended) for one in completions[start : start + asked.num]]

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True)).strip()


def _folder(asked: ToWrite, tell: OnStep) -> Path:
    if asked.model is None:
        assert asked.adapter is not None, "a model, or an adapter of one"
        return base_of_adapter(Path(asked.adapter))
    path = locate_model(asked.model, "--model")
    if is_gguf(path):

        def told(percent: float, what: str) -> None:
            tell(Step(what=what, done=int(percent), total=100))

        return unpack_gguf(path, file_digest(path), Path(asked.cache) if asked.cache else cache_folder(), told)
    if not (path / "config.json").is_file():
        problem = Problem(path="--model", value=asked.model, message="has no config.json; name the folder of a model")
        raise UserError(str(problem), [problem])
    return path


def _load(folder: Path, adapter: Path | None, device: torch.device) -> Any:
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", attn_implementation=PACKED_ATTENTION, local_files_only=True
    )
    model.to(device)
    if adapter is not None:
        from finetune_trainers.lean_peft import peft

        with peft_warnings_off():
            model = peft.PeftModel.from_pretrained(model, str(adapter))
    use_fast_products(model, model.dtype, device)
    return model.eval()


def _digest(folder: Path) -> str:
    """Of all files of weights: another training may leave others at the same path."""
    whole = blake3()
    for file in sorted(path for path in folder.iterdir() if path.name.endswith(_WEIGHTS)):
        whole.update(f"{file.name}\0{file_digest(file)}\n".encode())
    return whole.hexdigest()


class _Alone(SingleProcessContext):
    """The only worker there is, of no run: there is nobody to report to."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def report(self, stage: Stage, urgent: bool = False, **figures: Any) -> None:
        return None

    def should_stop(self) -> bool:
        return False
