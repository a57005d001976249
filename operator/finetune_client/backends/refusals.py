"""What an API server's refusal means to the person who submits jobs: a Problem with its field, or one of `errors`.

Pure; used by the backend for Kubernetes.
"""

from __future__ import annotations

import re

from finetune_api.base import API_VERSION
from finetune_api.failures import Problem
from finetune_api.problems import InvalidManifest
from finetune_client.commands import about, listing
from finetune_client.errors import ClientError, NoSuchJob, NotAllowed, NotInstalled, Refused, Unreachable
from finetune_operator.errors import AlreadyExists, ApiError, ClusterError, Forbidden, Invalid, NotFound
from finetune_operator.kinds import Key

__all__ = ["error_for"]

_VALUE = re.compile(r'^(?:Invalid|Unsupported|Duplicate) value: ("(?:[^"\\]|\\.)*"|\S+?): (.*)$', re.DOTALL)
_UNKNOWN = re.compile(r'unknown field "([^"]+)"')
_UNAUTHORIZED = 401
_BAD_REQUEST = 400


def error_for(error: ClusterError, host: str, key: Key, doing: str, place: str = "") -> Exception:
    """What to raise instead. `doing` is what was asked of job `key`, such as "create FineTuneJobs"; `place` is the
    backend's."""
    if not isinstance(error, ApiError):
        return Unreachable(
            f"{host} does not answer: {error}. Is the cluster up, and is it the one you mean? "
            "Choose another with --context or --kubeconfig"
        )
    if isinstance(error, Invalid) and error.causes:
        return InvalidManifest([_problem(field, message) for field, message in error.causes])
    if error.status == _BAD_REQUEST and (unknown := _UNKNOWN.findall(error.message)):
        return InvalidManifest([_unknown_field(path) for path in dict.fromkeys(unknown)])
    if isinstance(error, AlreadyExists):
        message = f"is the name of a job that is there already in namespace {key.namespace}; {_other_name(key, place)}"
        return InvalidManifest([Problem(path="metadata.name", value=f'"{key.name}"', message=message)])
    return _other(error, host, key, doing, place)


def _other(error: ApiError, host: str, key: Key, doing: str, place: str) -> ClientError:
    if isinstance(error, NotFound):
        return _not_found(error, host, key, place)
    if error.status == _UNAUTHORIZED:
        return NotAllowed(
            f"{host} does not know who you are: {error.message}. Log in anew, or choose another --context"
        )
    if isinstance(error, Forbidden) and "being terminated" not in error.message:
        return NotAllowed(
            f"you may not {doing} in namespace {key.namespace}: {error.message}. "
            "Ask for the right, or choose another --namespace or --context"
        )
    return Refused(f"{host} would not {doing}: {error.message}")


def _not_found(error: ApiError, host: str, key: Key, place: str) -> ClientError:
    """404 is the answer to an absent job, to an absent namespace, and to a kind that the server does not know."""
    if f'"{key.name}" not found' in error.message and key.name:
        return NoSuchJob(
            f"there is no job {key.name} in namespace {key.namespace}; "
            f"{listing(place, key.namespace)} shows those there are"
        )
    if f'namespaces "{key.namespace}" not found' in error.message:
        return Refused(f"there is no namespace {key.namespace}; kubectl create namespace {key.namespace} makes it")
    return NotInstalled(
        f"{host} knows no FineTuneJobs ({API_VERSION}): finetune-operator is not installed there. Install it with "
        "helm install finetune-operator helm/finetune-operator --namespace finetune-system --create-namespace, "
        "or choose another cluster with --context"
    )


def _problem(field: str, message: str) -> Problem:
    """The server's sentence, with the value that it found taken out of it."""
    found = _VALUE.match(message)
    if found is None:
        return Problem(path=field or None, message=message)
    value, said = found[1], found[2]
    # The server names the type of an object instead of showing it, and begins with the field's path once more.
    said = said.removeprefix(f"{field} in body ")
    return Problem(path=field or None, value=None if value == '"object"' else value, message=said)


def _unknown_field(path: str) -> Problem:
    message = (
        "is not known to the cluster's FineTuneJob: its finetune-operator is older than yours. Leave the field out, "
        "or have the cluster's upgraded (helm upgrade)"
    )
    return Problem(path=path, message=message)


def _other_name(key: Key, place: str) -> str:
    return f"choose another name, or remove that one first: {about('cancel', key, place)}"
