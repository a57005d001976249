"""An administrator's client of one API server, for tests: plain JSON, no cache, no retries, every refusal raised."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["ApiError", "Client", "write_kubeconfig"]


class ApiError(Exception):
    """The server refused: `code` is the HTTP status, `causes` are pairs of (field, sentence)."""

    def __init__(self, code: int, status: dict[str, Any]) -> None:
        self.code = code
        self.reason = str(status.get("reason", ""))
        self.message = str(status.get("message", status))
        listed = (status.get("details") or {}).get("causes") or []
        self.causes = [(cause.get("field", ""), cause.get("message", "")) for cause in listed]
        super().__init__(f"{code}: {self.message}")


@dataclass(frozen=True)
class Client:
    """JSON requests to one API server, as an administrator."""

    url: str
    token: str
    tls: ssl.SSLContext

    def get(self, path: str, accept: str = "application/json") -> Any:
        """The object or list at `path`."""
        return self.request("GET", path, accept=accept)

    def find(self, path: str) -> Any:
        """The object at `path`, None when there is none."""
        try:
            return self.get(path)
        except ApiError as error:
            if error.code != 404:
                raise
            return None

    def items(self, path: str) -> list[dict[str, Any]]:
        """The objects in the list at `path`."""
        found: list[dict[str, Any]] = self.get(path)["items"]
        return found

    def create(self, path: str, body: dict[str, Any]) -> Any:
        """The object as the server stored it (or would, with ?dryRun=All)."""
        return self.request("POST", path, body)

    def replace(self, path: str, body: dict[str, Any]) -> Any:
        """PUT: the whole object, resourceVersion included."""
        return self.request("PUT", path, body)

    def merge(self, path: str, body: dict[str, Any]) -> Any:
        """PATCH by JSON merge patch: what `body` leaves out stays, null removes."""
        return self.request("PATCH", path, body, content_type="application/merge-patch+json")

    def apply(self, path: str, body: dict[str, Any] | str) -> Any:
        """PATCH by server-side apply, as field manager "tests", which wins every conflict. A string is YAML."""
        # JSON is YAML. The server takes objects this way that are too large for an annotation, as KubeRay's CRDs are.
        query = "fieldManager=tests&force=true"
        return self.request("PATCH", f"{path}?{query}", body, content_type="application/apply-patch+yaml")

    def delete(self, path: str) -> None:
        """Asks for the object's deletion, dependents in the background; one that is absent is fine."""
        try:
            self.request("DELETE", f"{path}?propagationPolicy=Background")
        except ApiError as error:
            if error.code != 404:
                raise

    def request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | str | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Any:
        """Raises ApiError for every answer of 400 and above."""
        headers = {"Authorization": f"Bearer {self.token}", "Accept": accept, "Content-Type": content_type}
        text = body if isinstance(body, str | None) else json.dumps(body)
        data = None if text is None else text.encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, context=self.tls, timeout=60) as answer:
                told: str = answer.read().decode()
        except urllib.error.HTTPError as error:
            raise ApiError(error.code, _status(error.read().decode())) from None
        return json.loads(told) if told[:1] in ("{", "[") else told


def write_kubeconfig(file: Path, url: str, token: str, ca_file: Path) -> Path:
    """Writes what real programs read to reach a server: its address, whom to trust, who we are. Returns `file`."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "tests", "cluster": {"server": url, "certificate-authority": str(ca_file)}}],
        "users": [{"name": "tests", "user": {"token": token}}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests", "namespace": "default"}}],
        "current-context": "tests",
    }
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    file.chmod(0o600)
    return file


def _status(text: str) -> dict[str, Any]:
    """A Kubernetes Status; the few answers that are none become one."""
    try:
        status = json.loads(text)
    except ValueError:
        status = None
    return status if isinstance(status, dict) else {"message": text.strip()}
