"""What talking to a cluster can end in.

    ClusterError
    ├── Unreachable             no answer: refused, cut off, or too slow
    └── ApiError                an answer of 400 and above
        ├── Forbidden           403
        ├── NotFound            404
        ├── Conflict            409: the object has changed since it was read
        ├── AlreadyExists       409: the name is taken
        ├── Gone                410: the list or watch must begin anew
        ├── Invalid             422: the object breaks a rule of its kind
        └── TooManyRequests     429

Raised by implementations of the `Cluster` protocol; caught by the runtime, which tries again.
"""

from __future__ import annotations

__all__ = [
    "AlreadyExists",
    "ApiError",
    "ClusterError",
    "Conflict",
    "Forbidden",
    "Gone",
    "Invalid",
    "NotFound",
    "TooManyRequests",
    "Unreachable",
    "api_error",
]


class ClusterError(Exception):
    """A request to the cluster did not succeed."""


class Unreachable(ClusterError):
    """There was no answer."""


class ApiError(ClusterError):
    """The server refused."""

    def __init__(self, status: int, reason: str, message: str, retry_after: float | None = None) -> None:
        """`reason` is Kubernetes' own word; `retry_after` is how many seconds the server asks to wait."""
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.retry_after = retry_after
        self.causes: list[tuple[str, str]] = []
        """Of an object that breaks rules: each field, and what is wrong with it."""


class Forbidden(ApiError):
    """The operator may not do this."""


class NotFound(ApiError):
    """The object, or its kind, is not there."""


class Conflict(ApiError):
    """The object has changed since it was read."""


class AlreadyExists(ApiError):
    """The name is taken."""


class Gone(ApiError):
    """The resource version is too old."""


class Invalid(ApiError):
    """The object breaks a rule of its kind."""


class TooManyRequests(ApiError):
    """The server asks for patience."""


_BY_STATUS: dict[int, type[ApiError]] = {
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    410: Gone,
    422: Invalid,
    429: TooManyRequests,
}


def api_error(status: int, reason: str, message: str, retry_after: float | None = None) -> ApiError:
    """The error for an answer, by its HTTP status, and by the reason where 409 means two things."""
    kind = AlreadyExists if reason == "AlreadyExists" else _BY_STATUS.get(status, ApiError)
    return kind(status, reason, message, retry_after)
