"""What talking to the place where jobs run can end in, for people and programs that submit them.

    ClientError
    ├── Unreachable       no answer, or nothing says where to ask
    ├── NotAllowed        who one is may not do this
    ├── NotInstalled      what answers knows no FineTuneJobs
    ├── NoSuchJob         there is no job of that name, or no longer
    ├── NoLog             the job has written nothing that could still be read
    ├── NoModel           the job has written no model, or none on this machine
    ├── NotSupported      this backend cannot do that; the message names what can
    └── Refused           anything else that a server would not do

A job that is not what it should be raises `finetune_api.problems.InvalidManifest`, whoever finds that out: this machine
or the API server. Every message says what to do next.
"""

from __future__ import annotations

__all__ = [
    "ClientError",
    "NoLog",
    "NoModel",
    "NoSuchJob",
    "NotAllowed",
    "NotInstalled",
    "NotSupported",
    "Refused",
    "Unreachable",
]


class ClientError(Exception):
    """A request did not succeed."""


class Unreachable(ClientError):
    """There was no answer, or nothing says where to ask."""


class NotAllowed(ClientError):
    """Who one is may not do this."""


class NotInstalled(ClientError):
    """What answers knows no FineTuneJobs."""


class NoSuchJob(ClientError):
    """There is no job of that name."""


class NoLog(ClientError):
    """Nothing was written that could still be read."""


class NoModel(ClientError):
    """There is no model, or none on this machine."""


class NotSupported(ClientError):
    """This backend cannot do that."""


class Refused(ClientError):
    """A server would not do it."""
