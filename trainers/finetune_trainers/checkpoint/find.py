"""The newest checkpoint that is whole: what an attempt resumes from, and what retention never touches.

Only manifests count. Candidates are tried newest first (`CheckpointId`: the latest attempt that has committed anything,
and of it the highest step); one that fails verification is named with its reasons, and the next older is tried.
HEAD.json is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.documents import BadDocumentError
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import Listing, listed
from finetune_trainers.checkpoint.manifest import Abandoned, Manifest, parse_manifest
from finetune_trainers.checkpoint.storage.errors import StorageMissingError, StorageTornError
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.verify import Damage, deep_damages, quick_damages

__all__ = ["Rejected", "Search", "find_newest", "newest_first", "read_manifest", "verified"]


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that was published and is not whole any more."""

    checkpoint: CheckpointId
    damages: tuple[Damage, ...]

    def __str__(self) -> str:
        first = "; ".join(map(str, self.damages[:3]))
        more = f"; and {len(self.damages) - 3} more" if len(self.damages) > 3 else ""
        return f"checkpoint {self.checkpoint} was rejected: {first}{more}"


@dataclass(frozen=True)
class Search:
    """What was found, and what was passed over on the way."""

    manifest: Manifest | None
    rejected: tuple[Rejected, ...]


def find_newest(storage: Storage, deep: bool = False) -> Search:
    """The newest checkpoint that passes verification, every byte of it if `deep`.

    Raises StorageUnavailableError and StorageDeniedError rather than reject what could not be looked at.
    """
    rejected: list[Rejected] = []
    for found in newest_first(storage, deep):
        if isinstance(found, Manifest):
            return Search(found, tuple(rejected))
        rejected.append(found)
    return Search(None, tuple(rejected))


def newest_first(storage: Storage, deep: bool = False) -> Iterator[Manifest | Rejected]:
    """Every checkpoint that was published, each verified when it is asked for. Raises as `find_newest` does."""
    for listing in listed(storage).values():
        if listing.is_settled:
            found = verified(storage, listing, deep)
            if not isinstance(found, Abandoned):
                yield found


def verified(storage: Storage, listing: Listing, deep: bool = False) -> Manifest | Abandoned | Rejected:
    """What a settled folder is."""
    manifest = read_manifest(storage, listing.checkpoint)
    if not isinstance(manifest, Manifest):
        return manifest
    damages = quick_damages(storage, manifest, listing.sizes)
    if deep and not damages:
        damages = deep_damages(storage, manifest)
    return Rejected(listing.checkpoint, tuple(damages)) if damages else manifest


def read_manifest(storage: Storage, checkpoint: CheckpointId) -> Manifest | Abandoned | Rejected:
    """The manifest as it stands, which may promise files that are not there."""
    name = layout.manifest(checkpoint)
    try:
        manifest = parse_manifest(storage.read(name))
    except StorageMissingError:
        return Rejected(checkpoint, (Damage(name, "is missing"),))
    except StorageTornError as error:
        return Rejected(checkpoint, (Damage(name, error.message),))
    except BadDocumentError as error:
        return Rejected(checkpoint, (Damage(name, str(error)),))
    if isinstance(manifest, Manifest) and manifest.id != checkpoint:
        return Rejected(checkpoint, (Damage(name, f"is the manifest of {manifest.id}"),))
    return manifest
