"""What each command of `finetune data` does: options -> a request -> its answer, shown -> the exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from finetune_api import preference_data as api
from finetune_api.answers import Refusal
from finetune_api.base import Contract
from finetune_client.cli.artifacts import find_artifact
from finetune_client.cli.asking import Asked, Tell, ask, refuse, show
from finetune_client.cli.exits import INVALID

__all__ = ["candidates", "import_", "judge"]

WORKER = Asked(
    "finetune_trainers.preference_data",
    needs=("finetune_trainers", "numpy", "tokenizers"),
    what_it_does="makes the data",
)

_GGUF = ".gguf"


def import_(source: str, to: Path, columns: Sequence[str], options: dict[str, Any], as_json: bool) -> int:
    """`options` are the other fields of the request."""

    def request() -> Contract:
        return api.ToImport(source=_uri(source), to=str(to), columns=_columns(columns), **options)

    def tell(report: dict[str, Any]) -> Iterable[str]:
        found = api.ImportReport.model_validate(report)
        yield from _written(found.data)
        yield f"From {found.rows_read} rows of {found.layout} about {_counted(found.prompts, 'prompt')}."
        left = [
            _counted(found.ties, "tie") if found.ties else "",
            f"{found.repeated} repeated" if found.repeated else "",
            f"{found.contradicted} contradicted by others" if found.contradicted else "",
            f"{found.undecided} neither good nor bad" if found.undecided else "",
        ]
        if any(left):
            yield f"Left out: {', '.join(filter(None, left))}."

    return _run(request, tell, as_json)


def judge(
    source: str,
    to: Path,
    columns: Sequence[str],
    instructions: Path | None,
    options: dict[str, Any],
    as_json: bool,
) -> int:
    """`options` are the other fields of the request."""

    def request() -> Contract:
        text = None if instructions is None else _text(instructions)
        return api.ToJudge(source=_uri(source), to=str(to), columns=_columns(columns), instructions=text, **options)

    def tell(report: dict[str, Any]) -> Iterable[str]:
        found = api.JudgeReport.model_validate(report)
        yield from _written(found.data)
        yield (
            f"{_counted(found.pairs, 'pair')}: {found.preferred} preferred, {found.ties} tied, {found.changed} changed"
            f" with the order of the answers, {found.unreadable} without a verdict."
        )
        if found.disagreement is not None:
            yield f"The judge disagrees with itself in {found.disagreement:.1%} of the pairs."
        if found.first_preferred is not None:
            yield f"It is for the answer that it sees first in {found.first_preferred:.1%} of its verdicts."
        if found.agreement is not None:
            yield f"Where it prefers one, it is the one that the data prefers in {found.agreement:.1%}."
        yield (
            f"Asked {_counted(found.asked, 'time')}, {found.remembered} verdicts were known; {found.prompt_tokens} +"
            f" {found.completion_tokens} tokens. Every verdict is in {found.verdicts}"
        )

    return _run(request, tell, as_json)


def candidates(
    source: str, to: Path, columns: Sequence[str], model: str, options: dict[str, Any], as_json: bool
) -> int:
    """`options` are the other fields of the request."""

    def request() -> Contract:
        return api.ToWrite(source=_uri(source), to=str(to), columns=_columns(columns), **_model(model), **options)

    def tell(report: dict[str, Any]) -> Iterable[str]:
        found = api.CandidatesReport.model_validate(report)
        yield from _written(found.data)
        yield (
            f"{_counted(found.answers, 'answer')} to {_counted(found.rows_read, 'prompt')}: {found.repeated} repeated,"
            f" {found.cut_off} cut off. {found.left_out} prompts have fewer than two different answers and are left"
            " out."
        )

    return _run(request, tell, as_json)


def _model(given: str) -> dict[str, str | None]:
    """A URI; or a run's folder, an artifact, a model's folder, a GGUF file. Raises ValueError."""
    if "://" in given:
        return {"model": given, "adapter": None}
    path = Path(given)
    if path.suffix == _GGUF and path.is_file():
        return {"model": f"file://{path.absolute()}", "adapter": None}
    found = find_artifact(path)
    folder = found.folder.absolute()
    return (
        {"model": None, "adapter": str(folder)} if found.is_adapter else {"model": f"file://{folder}", "adapter": None}
    )


def _uri(source: str) -> str:
    return source if "://" in source else f"file://{Path(source).absolute()}"


def _columns(given: Sequence[str]) -> dict[str, str]:
    """Raises ValueError."""
    columns = {}
    for text in given:
        name, equals, theirs = text.partition("=")
        if not equals or not name or not theirs:
            raise ValueError(f"--column: {text!r} is not of the form NAME=COLUMN, such as prompt=question")
        columns[name] = theirs
    return columns


def _text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--instructions: {file} cannot be read: {error}") from None
    if not text:
        raise ValueError(f"--instructions: {file} is empty")
    return text


def _run(make: Callable[[], Contract], tell: Tell, as_json: bool) -> int:
    try:
        request = make()
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        return _refuse(f"{_option(first['loc'])}: {first['msg']} (found {first['input']!r})", as_json)
    except ValueError as error:
        return _refuse(str(error), as_json)
    return show(ask(WORKER, request), tell, as_json)


def _refuse(message: str, as_json: bool) -> int:
    return refuse(Refusal(message=message, exit_code=INVALID), as_json)


def _option(place: Sequence[int | str]) -> str:
    name = "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in str(place[0]))
    return "SOURCE" if name == "source" else f"--{name}"


def _written(data: api.Written) -> Iterable[str]:
    yield f"{_counted(data.rows, 'row')} in {data.path}; what they were made of is in {data.provenance}"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
