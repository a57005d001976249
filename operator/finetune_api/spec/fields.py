"""Types of single fields that several blocks of the spec share, and those that Kubernetes has no type for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, PlainValidator, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from finetune_api.base import Rule
from finetune_api.uris import BUCKETS, Scheme, parse_uri

__all__ = [
    "DataUri",
    "DnsLabel",
    "Glob",
    "ImageName",
    "LearningRate",
    "Memory",
    "MicroBatchSize",
    "ModelUri",
    "OutputUri",
    "TokenizerUri",
    "memory_bytes",
    "only_for_hub",
]


TOKENIZER_SCHEMES = (Scheme.HF, Scheme.FILE, Scheme.PVC, Scheme.PACKAGE)
MODEL_SCHEMES = (*TOKENIZER_SCHEMES, *BUCKETS, Scheme.JOB)
DATA_SCHEMES = (Scheme.HF, Scheme.FILE, Scheme.PVC, Scheme.PACKAGE)
OUTPUT_SCHEMES = (Scheme.FILE, Scheme.PVC, *BUCKETS)
_URI_LENGTH = 1024


@dataclass(frozen=True)
class UriOf:
    """Marks a string that must be a URI of one of `schemes`; the CRD checks the scheme by a pattern."""

    schemes: tuple[Scheme, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": f"^({'|'.join(self.schemes)})://.+$", "maxLength": _URI_LENGTH}

    def _check(self, text: str) -> str:
        if len(text) > _URI_LENGTH:
            raise ValueError(f"must have at most {_URI_LENGTH} characters")
        parse_uri(text, self.schemes)
        return text


ModelUri = Annotated[str, UriOf(MODEL_SCHEMES)]
TokenizerUri = Annotated[str, UriOf(TOKENIZER_SCHEMES)]
DataUri = Annotated[str, UriOf(DATA_SCHEMES)]
OutputUri = Annotated[str, UriOf(OUTPUT_SCHEMES)]
DnsLabel = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Glob = Annotated[str, Field(min_length=1, max_length=200)]
ImageName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][-a-zA-Z0-9._/:@]*$", max_length=512)]
Memory = Annotated[str, Field(pattern=r"^[1-9][0-9]*(Mi|Gi|Ti)$", max_length=16)]
"""A Kubernetes quantity in binary units."""
_BINARY_UNITS = {"Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40}


def memory_bytes(memory: Memory) -> int:
    return int(memory[:-2]) * _BINARY_UNITS[memory[-2:]]


def _micro_batch_size(value: object) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65_536):
        return value
    raise ValueError("must be a whole number from 1 to 65536, or auto")


_EVERY_STEPS = "must be a whole number from 1 to 1000000, or auto"


def _every_steps(value: object) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 1_000_000):
        return value
    raise ValueError(_EVERY_STEPS)


def _learning_rate(value: object) -> float | str:
    if value == "auto":
        return "auto"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise ValueError("must be a number above 0 and at most 1, or auto")


# A union would give two errors for one fault; OpenAPI as Kubernetes has it knows no "number or text", so the
# API server takes any value for the rate and the operator judges it.
MicroBatchSize = Annotated[
    int | Literal["auto"],
    PlainValidator(_micro_batch_size),
    WithJsonSchema({"x-kubernetes-int-or-string": True}),
]
EverySteps = Annotated[
    int | Literal["auto"],
    PlainValidator(_every_steps),
    WithJsonSchema(
        {
            "x-kubernetes-int-or-string": True,
            "x-kubernetes-validations": [
                {"rule": "type(self) == int ? self >= 1 && self <= 1000000 : self == 'auto'", "message": _EVERY_STEPS}
            ],
        }
    ),
]
LearningRate = Annotated[
    float | Literal["auto"],
    PlainValidator(_learning_rate),
    WithJsonSchema({"x-kubernetes-preserve-unknown-fields": True}),
]


def only_for_hub(field: str, instead: str) -> Rule:
    """The rule that `field` stands only beside an hf:// `source`."""
    return Rule(
        cel=f"!has(self.{field}) || self.source.startsWith('hf://')",
        message=f"{field} is only for an hf:// source; {instead}",
        holds=lambda value: getattr(value, field) is None or value.source.startswith("hf://"),
        field=field,
    )
