"""Multipart uploads that were begun in an S3 bucket and never completed: listed and aborted.

Their parts are invisible to a listing of objects and are paid for until somebody aborts them. The library below
`objects` has no word for that, so the two requests are made here, signed with AWS Signature Version 4
(https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html). That needs keys that are at hand: where
credentials come from an instance's role, and on GCS, there is no telling, and a lifecycle rule of the bucket that
aborts incomplete multipart uploads does it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import Request, urlopen
from xml.etree import ElementTree

from finetune_trainers.checkpoint.storage.errors import StorageUnavailableError

__all__ = ["Keys", "Upload", "Uploads", "signed_headers", "uploads_of"]

_SERVICE = "s3"
_ALGORITHM = "AWS4-HMAC-SHA256"
_EMPTY = hashlib.sha256(b"").hexdigest()
_TIMEOUT_SECONDS = 30.0
_BUSY = (429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Keys:
    """Who asks."""

    access_key: str
    secret_key: str
    token: str | None = None
    """Of keys that are lent for a time."""


@dataclass(frozen=True)
class Upload:
    """One that is not completed."""

    key: str
    id: str
    age_seconds: float
    """By the server's clock."""


def uploads_of(bucket: str, options: Mapping[str, Any]) -> Uploads | None:
    """As `options` (obstore's) and the environment say; None when the keys are not at hand."""

    def said(option: str, *names: str) -> str | None:
        found = options.get(option) or next((os.environ[name] for name in names if os.environ.get(name)), None)
        return None if found is None else str(found)

    access = said("access_key_id", "AWS_ACCESS_KEY_ID")
    secret = said("secret_access_key", "AWS_SECRET_ACCESS_KEY")
    region = said("region", "AWS_REGION", "AWS_DEFAULT_REGION") or "us-east-1"
    endpoint = said("endpoint", "AWS_ENDPOINT_URL", "AWS_ENDPOINT") or f"https://s3.{region}.amazonaws.com"
    by_host = str(options.get("virtual_hosted_style_request", os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "")))
    if access is None or secret is None:
        return None
    # Where the bucket is a part of the host's name, the endpoint names it already.
    root = endpoint.rstrip("/") if by_host.lower() == "true" else f"{endpoint.rstrip('/')}/{bucket}"
    return Uploads(root, region, Keys(access, secret, said("token", "AWS_SESSION_TOKEN")))


class Uploads:
    """Of one bucket, at `root`."""

    def __init__(self, root: str, region: str, keys: Keys) -> None:
        self._root, self._region, self._keys = root, region, keys

    def open(self, prefix: str) -> list[Upload] | None:
        """Those whose keys begin with `prefix`; None when the store does not tell, or not these keys. Raises
        StorageUnavailableError."""
        found: list[Upload] = []
        after: dict[str, str] = {}
        while True:
            answer = self._request("GET", "", {"uploads": "", "prefix": prefix, **after})
            if answer is None:
                return None
            page, now = answer
            found += _uploads(page, now)
            last = {name: page.findtext(f"{{*}}Next{mark}") or "" for name, mark in _MARKERS.items()}
            if page.findtext("{*}IsTruncated") != "true" or last == after:
                return found
            after = last

    def abort(self, key: str, upload: str) -> None:
        """One that is completed or aborted meanwhile is no error. Raises StorageUnavailableError."""
        self._request("DELETE", key, {"uploadId": upload})

    def _request(self, method: str, key: str, query: Mapping[str, str]) -> tuple[ElementTree.Element, datetime] | None:
        """The answer and the time there; None when it is refused."""
        path = f"/{quote(key, safe='/-_.~')}" if key else ""
        url = f"{self._root}{path}?{_canonical_query(query)}"
        headers = signed_headers(method, url, self._region, self._keys, datetime.now(UTC))
        try:
            with urlopen(Request(url, method=method, headers=headers), timeout=_TIMEOUT_SECONDS) as answer:
                content, date = answer.read(), answer.headers.get("Date")
        except HTTPError as error:
            if error.code in _BUSY:
                raise StorageUnavailableError(f"unfinished uploads: the store answers {error.code}") from None
            return None
        except (OSError, HTTPException) as error:
            raise StorageUnavailableError(f"unfinished uploads: {error}") from None
        now = parsedate_to_datetime(date) if date else datetime.now(UTC)
        return ElementTree.fromstring(content or b"<None/>"), now


_MARKERS = {"key-marker": "KeyMarker", "upload-id-marker": "UploadIdMarker"}


def _uploads(page: ElementTree.Element, now: datetime) -> Iterator[Upload]:
    for item in page.findall("{*}Upload"):
        key, id_, begun = (item.findtext(f"{{*}}{name}") or "" for name in ("Key", "UploadId", "Initiated"))
        yield Upload(key, id_, (now - datetime.fromisoformat(begun)).total_seconds())


def signed_headers(method: str, url: str, region: str, keys: Keys, now: datetime) -> dict[str, str]:
    """The headers of a request without a body, its signature among them. Pure."""
    parts, stamp = urlsplit(url), now.strftime("%Y%m%dT%H%M%SZ")
    headers = {"host": parts.netloc, "x-amz-content-sha256": _EMPTY, "x-amz-date": stamp}
    if keys.token is not None:
        headers["x-amz-security-token"] = keys.token
    names = ";".join(sorted(headers))
    lines = [f"{name}:{headers[name]}" for name in sorted(headers)]
    canonical = "\n".join([method, parts.path or "/", parts.query, *lines, "", names, _EMPTY])
    scope = f"{stamp[:8]}/{region}/{_SERVICE}/aws4_request"
    text = "\n".join([_ALGORITHM, stamp, scope, hashlib.sha256(canonical.encode()).hexdigest()])
    key = f"AWS4{keys.secret_key}".encode()
    for part in scope.split("/"):
        key = _mac(key, part)
    signature = _mac(key, text).hex()
    headers["authorization"] = (
        f"{_ALGORITHM} Credential={keys.access_key}/{scope},SignedHeaders={names},Signature={signature}"
    )
    return headers


def _mac(key: bytes, text: str) -> bytes:
    return hmac.new(key, text.encode(), hashlib.sha256).digest()


def _canonical_query(query: Mapping[str, str]) -> str:
    """Sorted by name, and encoded as signatures want it."""
    return urlencode(sorted(query.items()), quote_via=quote, safe="-_.~")
