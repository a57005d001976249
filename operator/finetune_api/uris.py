"""Where things are: one parser for every URI that a job may name.

hf://org/name              a repository on the Hugging Face Hub
s3://bucket/key            an object store
gs://bucket/key
pvc://claim/path           a folder on a PersistentVolumeClaim of the job's namespace
file:///path               this machine; `file://./path` is relative to the manifest's folder,
                           or to the working directory where there is no manifest
package://package/path     a resource inside an installed Python package
job://name                 the artifact of another FineTuneJob in the namespace
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["BUCKETS", "Scheme", "Uri", "in_bucket", "parse_uri"]


class Scheme(StrEnum):
    """The kinds of place."""

    HF = "hf"
    S3 = "s3"
    GS = "gs"
    PVC = "pvc"
    FILE = "file"
    PACKAGE = "package"
    JOB = "job"


BUCKETS = (Scheme.S3, Scheme.GS)
"""Object stores: what lies there is reached by requests, and nothing is mounted."""

_SHAPES: dict[Scheme, tuple[re.Pattern[str], str]] = {
    Scheme.HF: (re.compile(r"[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?"), "hf://org/name"),
    Scheme.S3: (re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?:/.*)?"), "s3://bucket/key"),
    Scheme.GS: (re.compile(r"[a-z0-9][\w.-]{1,220}[a-z0-9](?:/.*)?"), "gs://bucket/key"),
    Scheme.PVC: (re.compile(r"[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?(?:/.*)?"), "pvc://claim/path"),
    Scheme.FILE: (re.compile(r"(?:/|\./|\.\./).+"), "file:///absolute/path or file://./relative/path"),
    Scheme.PACKAGE: (re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*/.+"), "package://python_package/path"),
    Scheme.JOB: (re.compile(r"[a-z](?:[-a-z0-9]{0,38}[a-z0-9])?"), "job://name"),
}


@dataclass(frozen=True)
class Uri:
    """A parsed URI: `authority` is the bucket, claim, package, organisation or job; `path` has no leading slash
    except for `file`, where it is the file system path."""

    scheme: Scheme
    authority: str
    path: str

    def __str__(self) -> str:
        rest = "/".join(part for part in (self.authority, self.path) if part)
        return f"{self.scheme}://{rest}"


def in_bucket(text: str | None) -> bool:
    """Whether a URI, or the lack of one, names a place in an object store. `text` is not looked at otherwise."""
    return text is not None and text.partition("://")[0] in BUCKETS


def parse_uri(text: str, allowed: tuple[Scheme, ...] = tuple(Scheme)) -> Uri:
    """Parse `text`, refusing schemes outside `allowed`. Raises ValueError with what would be right."""
    scheme_text, separator, rest = text.partition("://")
    choices = ", ".join(f"{scheme}://" for scheme in allowed)
    if not separator:
        raise ValueError(f"is not a URI; start it with one of {choices} (a local file is file:///path)")
    if scheme_text not in tuple(Scheme):
        raise ValueError(f"has the unknown scheme {scheme_text}://; use one of {choices}")
    scheme = Scheme(scheme_text)
    if scheme not in allowed:
        raise ValueError(f"cannot be {scheme}:// here; use one of {choices}")
    shape, example = _SHAPES[scheme]
    if not shape.fullmatch(rest) or "\n" in rest:
        raise ValueError(f"is not of the form {example}")
    if ".." in rest.split("/") and scheme is not Scheme.FILE:
        raise ValueError("must not contain '..'")
    if scheme is Scheme.FILE:
        return Uri(scheme, "", rest)
    authority, _, path = rest.partition("/")
    return Uri(scheme, authority, path)
