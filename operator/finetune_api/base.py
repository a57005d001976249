"""The base of every model in the contract, and the one place where cross-field rules are declared.

A `Rule` says the same thing twice, once for each judge: `cel` is what the API server evaluates (it goes into
the CRD), `holds` is what pydantic evaluates on a laptop. Both share one message, which says what to set instead.
Tests feed the same objects to both and demand the same verdict.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

__all__ = ["API_VERSION", "GROUP", "VERSION", "Choice", "Contract", "Rule", "exactly_one"]

GROUP = "finetune-operator.io"
VERSION = "v1alpha1"
API_VERSION: Literal["finetune-operator.io/v1alpha1"] = "finetune-operator.io/v1alpha1"


@dataclass(frozen=True)
class Rule:
    """A cross-field rule of one object.

    `field` is the child (camelCase) that the message is about, None when it is the object as a whole. `holds` is
    None for a rule that only an update can break (`oldSelf` in `cel`): there is no old object in a file.
    """

    cel: str
    message: str
    holds: Callable[[Any], bool] | None = None
    field: str | None = None


class Contract(BaseModel):
    """A frozen object of the contract: camelCase outside, snake_case inside, unknown keys refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        use_attribute_docstrings=True,
        validate_default=False,
        allow_inf_nan=False,
    )

    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        for rule in self.rules:
            if rule.holds is not None and not rule.holds(self):
                context = {"text": rule.message, "field": rule.field, "found": self._child(rule.field)}
                raise PydanticCustomError("rule", "{text}", context)
        return self

    def _child(self, path: str | None) -> Any:
        """The value at a dotted camelCase `path` below this object, defaults included; None for no path."""
        here: Any = self
        for step in path.split(".") if path else ():
            here = next(getattr(here, name) for name, field in type(here).model_fields.items() if field.alias == step)
        if isinstance(here, list):
            return [item.to_document() if isinstance(item, Contract) else item for item in here]
        return None if here is self else here.to_document() if isinstance(here, Contract) else here

    def to_document(self) -> dict[str, Any]:
        """The object as it stands in YAML or JSON: camelCase, absent fields left out."""
        return self.model_dump(mode="json", by_alias=True, exclude_none=True)


class Choice(Contract):
    """An object of which one branch is set."""

    @property
    def chosen(self) -> str:
        """The name (camelCase) of the first field that is set."""
        fields = type(self).model_fields.items()
        return next(field.alias or name for name, field in fields if getattr(self, name) is not None)


def exactly_one(*fields: str) -> Rule:
    """The rule that one, and only one, of the optional `fields` (snake_case) is set."""
    names = [to_camel(field) for field in fields]
    listed = ", ".join(names)
    return Rule(
        cel="[" + ", ".join(f"has(self.{name})" for name in names) + "].filter(x, x).size() == 1",
        message=f"set exactly one of: {listed}",
        holds=lambda value: sum(getattr(value, field) is not None for field in fields) == 1,
    )
