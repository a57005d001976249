"""What whoever installs the operator can set: one frozen value, read once at the start.

`__main__` reads it from the environment and the command line; everything else is given it. The chart sets the same
variables. A flag wins over its variable, a variable over the default.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

__all__ = ["InvalidSettings", "Settings", "read_settings"]

_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_DISTRIBUTION = "finetune-operator"


class InvalidSettings(ValueError):
    """A variable or flag has a value that cannot be; the message names it, the value, and what would be right."""


def _default_image() -> str:
    try:
        version = metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        version = "latest"
    return f"ghcr.io/finetune-operator/trainer:{version}"


class Settings(BaseModel):
    """All settings. Their environment variables are FINETUNE_ and the name in capitals."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    operator_namespace: Annotated[str, Field(min_length=1, max_length=63)] = "finetune-system"
    """Namespace of the operator itself; the lease is kept there."""
    pod_name: Annotated[str, Field(min_length=1, max_length=253)] = Field(default_factory=socket.gethostname)
    """Name of this replica, as the lease and the events show it."""
    watch_namespaces: tuple[str, ...] = ()
    """Namespaces whose jobs are looked after, separated by commas; empty means all."""
    trainer_image: Annotated[str, Field(min_length=1, max_length=512)] = Field(default_factory=_default_image)
    """Image that jobs run in when neither the job nor its runtime names one."""
    ray_version: Annotated[str, Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+$")] = "2.60.0"
    """Version of Ray in that image."""
    leader_elect: bool = True
    """Elect one of several replicas to act; off only where a single one runs."""
    lease_name: Annotated[str, Field(min_length=1, max_length=253)] = "finetune-operator"
    """Name of the Lease that replicas compete for."""
    lease_seconds: Annotated[int, Field(ge=3, le=600)] = 15
    """Time after which a leader that fell silent is replaced."""
    workers: Annotated[int, Field(ge=1, le=128)] = 8
    """Jobs that are worked on at the same time."""
    qps: Annotated[float, Field(gt=0, le=100_000)] = 500
    """Requests a second to the API server, on average; watches and the lease are not counted."""
    burst: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    """Requests that may be made at once before `qps` applies."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """How much is logged."""
    metrics_host: str = "0.0.0.0"
    """Address that /metrics, /healthz and /readyz are served at."""
    metrics_port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port that they are served at; 0 takes a free one."""
    kubeconfig: Path | None = None
    """File that says how to reach the cluster; left out: $KUBECONFIG, then the pod's own service account."""
    context: str | None = None
    """Context in that file; left out: the current one."""

    @field_validator("watch_namespaces", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("watch_namespaces")
    @classmethod
    def _are_names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            if not _LABEL.fullmatch(name):
                raise ValueError(f"{name!r} is not the name of a namespace; write them as team-a,team-b")
        return tuple(dict.fromkeys(value))

    @field_validator("log_level", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value


_SWITCHES = {"leader_elect": "no_leader_election"}
"""Settings that a flag can only turn off."""


def read_settings(arguments: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> Settings:
    """The settings of `python -m finetune_operator ARGUMENTS`.

    Raises InvalidSettings. SystemExit comes from argparse: for --help, and with exit code 2 for a flag that it does
    not know.
    """
    environment = os.environ if environment is None else environment
    given: dict[str, tuple[str, Any]] = {}
    for name in Settings.model_fields:
        variable = _variable(name)
        if environment.get(variable, "") != "":
            given[name] = (variable, environment[variable])
    if "operator_namespace" not in given and _POD_NAMESPACE.is_file():
        given["operator_namespace"] = (str(_POD_NAMESPACE), _POD_NAMESPACE.read_text(encoding="utf-8").strip())
    for name, value in vars(_parser().parse_args(arguments)).items():
        given[name] = (_flag(name), value)
    try:
        return Settings(**{name: value for name, (_, value) in given.items()})
    except ValidationError as error:
        raise InvalidSettings("\n".join(_sentence(one, given) for one in error.errors())) from None


def _variable(name: str) -> str:
    return f"FINETUNE_{name.upper()}"


def _flag(name: str) -> str:
    return "--" + _SWITCHES.get(name, name).replace("_", "-")


def _sentence(error: Any, given: Mapping[str, tuple[str, Any]]) -> str:
    source, value = given[str(error["loc"][0])]
    return f"{source}: {error['msg'].removeprefix('Value error, ')} (found {str(value)!r})"


def _parser() -> argparse.ArgumentParser:
    """Flags that were not given leave no attribute, so that the environment shows through."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune_operator",
        description="Looks after the FineTuneJobs of a cluster: plans them, starts their Ray clusters, follows them.",
        epilog="Each flag can be set by the environment variable beside it; a flag wins.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for name, field in Settings.model_fields.items():
        shown = f"{field.description} [{_variable(name)}]".replace("%", "%%")
        if name in _SWITCHES:
            text = f"Act without asking other replicas; only where a single one runs. [{_variable(name)}=false]"
            parser.add_argument(_flag(name), dest=name, action="store_false", help=text)
        else:
            metavar = "FILE" if name == "kubeconfig" else "VALUE"
            parser.add_argument(_flag(name), dest=name, metavar=metavar, help=shown + _default(field))
    return parser


def _default(field: Any) -> str:
    value = field.get_default(call_default_factory=True)
    return "" if value in (None, ()) else f" (default: {value})".replace("%", "%%")
