"""Whether a checkpoint is one of this very training: what must be the same, and what may differ. Pure.

The job, the base model, the adapter, the parameters, the data and its order, and the global batch must be the same; the
number of workers, the micro-batch, the ZeRO stage and the precision may differ. Called by `resuming` before it goes on
from one, and by those who decide what stays.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from pydantic import ValidationError

from finetune_api.spec import Lora
from finetune_trainers.checkpoint.manifest import DataState, Intent

__all__ = ["differences", "trainings"]


def differences(found: Intent, mine: Intent) -> list[str]:
    """Why the checkpoint of `found` cannot be gone on from by a training that would save `mine`; none when it can."""
    return list(_differences(found, mine))


def trainings(found: Iterable[Intent | None]) -> list[int]:
    """The number of the training of each: 0 is the first one's. Of None nothing is known; it counts with the first."""
    known: list[Intent] = []
    return [0 if intent is None else _number(intent, known) for intent in found]


def _number(intent: Intent, known: list[Intent]) -> int:
    """What a checkpoint says of its training's data counts for those that follow. One without data, such as an import,
    is of any training that is the same in all else."""
    for number, one in enumerate(known):
        if not differences(intent, one):
            known[number] = one.model_copy(update={"data": _joined(one.data, intent.data)})
            return number
    known.append(intent)
    return len(known) - 1


def _joined(one: DataState | None, other: DataState | None) -> DataState | None:
    if one is None or other is None:
        return one or other
    return one.model_copy(update={"digest": "+".join(sorted(one.digests | other.digests))})


def _differences(found: Intent, mine: Intent) -> Iterator[str]:
    if found.job != mine.job:
        yield f"it was made by another job ({found.job}, and this is {mine.job})"
    before, now = _digest(found), _digest(mine)
    if before != now:
        yield f"it was trained from another model (digest {before[:12]}, and this one's is {now[:12]})"
    if _adapter(found) != _adapter(mine) or _shapes(found) != _shapes(mine):
        yield "it trained other parameters (spec.tuning differs)"
    if found.global_batch != mine.global_batch:
        yield f"its global batch was {found.global_batch} sequences, and this one's is {mine.global_batch}"
    if found.data is not None and mine.data is not None:
        if found.data.seed != mine.data.seed:
            yield f"its data had the order of seed {found.data.seed}, and this one's seed is {mine.data.seed}"
        if not found.data.digests & mine.data.digests:
            yield "it was trained on other data (spec.data or spec.method differs)"


def _digest(intent: Intent) -> str:
    return intent.base_model.digest if intent.base_model is not None else ""


def _adapter(intent: Intent) -> object:
    """What an older release did not know is as its default has it; what this one does not know differs."""
    try:
        return None if intent.adapter is None else Lora.model_validate(intent.adapter)
    except ValidationError:
        return intent.adapter


def _shapes(intent: Intent) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(tensor.role, tensor.name): tensor.shape for tensor in intent.tensors}
