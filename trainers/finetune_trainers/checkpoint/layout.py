"""What everything in a checkpoint root is called. Pure; every name that is read or written comes from here.

    FENCE/<epoch>.json                  one per attempt, each created once; the highest may publish
    HEAD.json                           the last commit, for people and dashboards; nothing is decided by it
    ckpt/<step>-e<epoch>/
        INTENT.json                     what is being saved, written first
        shard-<rank>-<part>.safetensors flat slices of the tensors that the rank holds
        aux-<rank>-<name>.<suffix>      random number generators, data cursor, loss scaler, scheduler
        receipt-<rank>.json             written when all files of the rank are durable
        MANIFEST.json                   written last: from here on it is a checkpoint. Or the word that it never will be
        TOMBSTONE.json                  it is being deleted: from here on it is none
    busy/<epoch>-<rank>.json            a writer whose trainer is gone still writes; changes every other second
    pins/<step>-e<epoch>.json           somebody wants this one kept
    blobs/<digest>                      what several checkpoints share, named by its content

Names are relative, with `/` between parts, and the same on a disk and in an object store. Steps and epochs are padded
so that a plain listing is in order.
"""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = [
    "AUX_SUFFIXES",
    "BLOBS",
    "BUSY",
    "CHECKPOINTS",
    "FENCES",
    "HEAD",
    "PINS",
    "CheckpointId",
    "aux",
    "blob",
    "busy",
    "checkpoint_of",
    "epoch_of",
    "fence",
    "folder",
    "intent",
    "manifest",
    "pin",
    "pinned",
    "rank_of_receipt",
    "receipt",
    "shard",
    "tombstone",
]

AUX_SUFFIXES = ("json", "safetensors")
FENCES = "FENCE/"
HEAD = "HEAD.json"
CHECKPOINTS = "ckpt/"
PINS = "pins/"
BUSY = "busy/"
BLOBS = "blobs/"

_ID = re.compile(r"(\d{10,})-e(\d{5,})")
_RECEIPT = re.compile(r"receipt-(\d{5,})\.json")
_FENCE = re.compile(r"FENCE/(\d{10,})\.json")
_AUX_NAME = re.compile(r"[a-z0-9]+(?:-[a-z0-9]+)*")


class CheckpointId(NamedTuple):
    """A step of training as one attempt saved it. An epoch counts attempts, not passes over the data.

    Ids are in the order of the run: what a later attempt saved comes after everything that earlier ones left, also
    where it went back to an older step. Within an attempt they are in the order of steps.
    """

    epoch: int
    step: int

    def __str__(self) -> str:
        return f"{self.step:010d}-e{self.epoch:05d}"

    @classmethod
    def parse(cls, text: str) -> CheckpointId:
        """The inverse of `str`. Raises ValueError for anything else."""
        found = _ID.fullmatch(text)
        parsed = cls(int(found[2]), int(found[1])) if found else None
        if parsed is None or str(parsed) != text:
            raise ValueError(f"{text!r} is not the name of a checkpoint; it looks like 0000000200-e00001")
        return parsed


def fence(epoch: int) -> str:
    return f"{FENCES}{epoch:010d}.json"


def epoch_of(name: str) -> int | None:
    """The epoch of a fence's file, None for any other name."""
    found = _FENCE.fullmatch(name)
    return int(found[1]) if found else None


def folder(checkpoint: CheckpointId) -> str:
    """With a slash at its end: a prefix of the names of all files of the checkpoint and of no others."""
    return f"{CHECKPOINTS}{checkpoint}/"


def checkpoint_of(name: str) -> CheckpointId | None:
    """The checkpoint whose folder a file is in, None for a file anywhere else."""
    first, _, rest = name.partition("/")
    middle, _, last = rest.partition("/")
    if f"{first}/" != CHECKPOINTS or not last:
        return None
    try:
        return CheckpointId.parse(middle)
    except ValueError:
        return None


def intent(checkpoint: CheckpointId) -> str:
    return f"{folder(checkpoint)}INTENT.json"


def manifest(checkpoint: CheckpointId) -> str:
    return f"{folder(checkpoint)}MANIFEST.json"


def tombstone(checkpoint: CheckpointId) -> str:
    return f"{folder(checkpoint)}TOMBSTONE.json"


def receipt(checkpoint: CheckpointId, rank: int) -> str:
    return f"{folder(checkpoint)}receipt-{rank:05d}.json"


def busy(epoch: int, rank: int) -> str:
    return f"{BUSY}{epoch:010d}-{rank:05d}.json"


def rank_of_receipt(name: str) -> int | None:
    """The rank whose receipt a file in a checkpoint's folder is, None for any other file."""
    found = _RECEIPT.fullmatch(name.rpartition("/")[2])
    return int(found[1]) if found else None


def shard(checkpoint: CheckpointId, rank: int, part: int = 0) -> str:
    return f"{folder(checkpoint)}shard-{rank:05d}-{part:03d}.safetensors"


def aux(checkpoint: CheckpointId, rank: int, name: str, suffix: str) -> str:
    """`name` says what it holds (`rng`, `data-cursor`); `suffix` is json or safetensors. Others: ValueError."""
    if not _AUX_NAME.fullmatch(name) or suffix not in AUX_SUFFIXES:
        raise ValueError(
            f"{name}.{suffix} cannot name an auxiliary file: small letters and dashes, .json or .safetensors"
        )
    return f"{folder(checkpoint)}aux-{rank:05d}-{name}.{suffix}"


def pin(checkpoint: CheckpointId) -> str:
    return f"{PINS}{checkpoint}.json"


def pinned(name: str) -> CheckpointId | None:
    """The checkpoint that a file under `pins/` keeps, None for any other name."""
    if not (name.startswith(PINS) and name.endswith(".json")):
        return None
    try:
        return CheckpointId.parse(name[len(PINS) : -len(".json")])
    except ValueError:
        return None


def blob(digest: str) -> str:
    """`digest` is the blake3 of the content, in hexadecimal."""
    return f"{BLOBS}{digest}"
