"""What a request to an API server asks for, read from its method and path as the server's own audit log would say.

Used by the fault-injecting proxy to choose requests and to count them.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qs, urlsplit

__all__ = ["WRITES", "Asked", "asked_by"]

WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})

_VERBS = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True)
class Asked:
    """One request. `resource` is the plural name, with the subresource: "finetunejobs/status"; "" for other paths."""

    verb: str
    resource: str = ""
    namespace: str | None = None
    name: str | None = None
    path: str = ""

    @property
    def writes(self) -> bool:
        """Whether it would change an object; questions that are asked by POST (access, tokens) do not."""
        return self.verb in WRITES and not self.resource.endswith("reviews") and not self.path.endswith("/token")


def asked_by(method: str, target: str) -> Asked:
    """`target` is the path with its query."""
    url = urlsplit(target)
    parts = [part for part in url.path.split("/") if part]
    # /api/v1/... or /apis/GROUP/VERSION/...; whatever has no resource after that is discovery, health or metrics.
    rest = parts[2:] if parts[:1] == ["api"] else parts[3:] if parts[:1] == ["apis"] else []
    namespace = None
    if rest[:1] == ["namespaces"] and len(rest) > 2:
        namespace, rest = rest[1], rest[2:]
    if not rest:
        return Asked(method.lower(), path=url.path)
    name = rest[1] if len(rest) > 1 else None
    resource = "/".join([rest[0], *rest[2:3]])
    return Asked(_verb(method, name, url.query), resource, namespace, name, url.path)


def _verb(method: str, name: str | None, query: str) -> str:
    if method != "GET":
        verb = _VERBS.get(method, method.lower())
        return "deletecollection" if verb == "delete" and name is None else verb
    if parse_qs(query).get("watch", ["false"])[-1] in ("1", "true"):
        return "watch"
    return "get" if name else "list"
