"""What `finetune data` asks of `python -m finetune_trainers.preference_data`, and what it is told.

One request a process, as JSON; each line of the answer is a `Told`. Reports are printed as they are with `-o json`:
keys are only ever added, and every key is always there, null where nothing is known.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, TypeAdapter

from finetune_api.base import Contract
from finetune_api.spec.fields import DataUri

__all__ = [
    "DENIED",
    "UNREACHABLE",
    "CandidatesReport",
    "DataReport",
    "DataRequest",
    "ImportReport",
    "JudgeReport",
    "Layout",
    "Pairing",
    "ToImport",
    "ToJudge",
    "ToWrite",
    "Written",
    "parse_request",
]

UNREACHABLE = 22
"""Exit code: the judge does not answer."""
DENIED = 23
"""Exit code: the judge does not let us ask."""

Layout: TypeAlias = Literal["auto", "pairs", "ratings", "rankings"]
Pairing: TypeAlias = Literal["all", "adjacent", "best-worst"]
Columns: TypeAlias = dict[str, str]
"""A column's own name -> its name in the data."""
Count = Annotated[int, Field(ge=1)]


class _Request(Contract):
    source: DataUri
    to: str
    """The file of rows that is written; what it was made of is told beside it."""
    columns: Columns = Field(default_factory=dict)
    overwrite: bool = False
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0


class ToImport(_Request):
    """People's judgements become a data set."""

    verb: Literal["import"] = "import"
    layout: Layout = "auto"
    form: Literal["preference", "unpaired-preference"] = "preference"
    pairing: Pairing = "all"
    min_gap: Annotated[float, Field(ge=0)] = 0.0
    margins: bool = False
    """The difference of two ratings is written as their pair's margin."""
    good_from: float | None = None
    bad_to: float | None = None


class ToJudge(_Request):
    """A model says which of two answers is better."""

    verb: Literal["judge"] = "judge"
    url: Annotated[str, Field(pattern=r"^https?://[^/?#@\s]+([/?][^#\s]*)?$", max_length=1024)]
    model: Annotated[str, Field(min_length=1)]
    key_env: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)] | None = None
    """Name of the environment variable that holds the key."""
    instructions: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 0.0
    max_tokens: Count = 1024
    timeout_seconds: Annotated[float, Field(gt=0, le=3600)] = 120.0
    retries: Annotated[int, Field(ge=0, le=20)] = 5
    concurrency: Annotated[int, Field(ge=1, le=256)] = 8
    pairs_per_row: Count | None = None
    """Drawn by the seed; null: every pair of a row's answers."""


class ToWrite(_Request):
    """A model writes several answers to each prompt."""

    verb: Literal["candidates"] = "candidates"
    model: str | None = None
    """URI of a model's folder or GGUF file; null: the one that the adapter is of."""
    adapter: str | None = None
    """Folder of an adapter."""
    num: Annotated[int, Field(ge=2, le=1024)] = 4
    method: Literal["sample", "beam"] = "sample"
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    num_beams: Annotated[int, Field(ge=2, le=1024)] | None = None
    """null: as many as answers."""
    length_penalty: float = 1.0
    max_new_tokens: Annotated[int, Field(ge=1, le=131_072)] = 256
    batch_size: Annotated[int, Field(ge=1, le=4096)] = 64
    max_rows: Count | None = None
    cache: str | None = None
    """Where a GGUF file is unpacked; null: as in a run."""


DataRequest = ToImport | ToJudge | ToWrite
_REQUEST: TypeAdapter[DataRequest] = TypeAdapter(Annotated[DataRequest, Field(discriminator="verb")])


def parse_request(text: str) -> DataRequest:
    """The request in a JSON text. Raises pydantic's ValidationError."""
    return _REQUEST.validate_json(text)


class Written(Contract):
    """A data set that was written."""

    path: str
    rows: int
    bytes: int
    digest: str
    """sha256:… of the file."""
    provenance: str
    """The file that says what it was made of, and how."""


class ImportReport(Contract):
    data: Written
    layout: str
    rows_read: int
    prompts: int
    ties: int
    """Pairs of answers that are alike, or nearer than the least gap: left out."""
    repeated: int
    """The same judgement again: written once."""
    contradicted: int
    """Judgements that another one says the opposite of: left out, both."""
    undecided: int
    """Answers that are neither good nor bad: left out."""


class JudgeReport(Contract):
    data: Written
    rows_read: int
    pairs: int
    asked: int
    """Requests of this run; each pair needs two."""
    remembered: int
    """Verdicts that were on disk already."""
    preferred: int
    ties: int
    """Pairs that the judge calls a tie both times: left out."""
    changed: int
    """Pairs whose verdict changes with the order of the answers: ties too, and left out."""
    unreadable: int
    """Pairs without two verdicts that can be read, or that the judge refuses: left out."""
    disagreement: float | None
    """changed, as a share of the pairs with two verdicts."""
    first_preferred: float | None
    """Share of the verdicts for an answer that are for the one shown first; 0.5 where the order does not matter."""
    agreement: float | None
    """Where the data says which answer is better: share of the preferred pairs in which the judge says so too."""
    prompt_tokens: int
    completion_tokens: int
    """Of this run, as the service counts."""
    verdicts: str
    """The file with every verdict."""


class CandidatesReport(Contract):
    data: Written
    rows_read: int
    answers: int
    repeated: int
    """Answers that were written before for the same prompt: left out."""
    cut_off: int
    """Answers that are as long as they may be."""
    left_out: int
    """Prompts with fewer than two different answers."""


DataReport = ImportReport | JudgeReport | CandidatesReport
