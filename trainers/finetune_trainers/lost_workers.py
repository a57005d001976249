"""What the end of a group of workers comes from, of all that Ray Train tells of it. Used by `ray_workers`.

When one worker fails, the others lose it, and each of them tells something: the cause is the one that has a reason of
its own. Workers that are merely gone are replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from finetune_api.failures import FailureClass
from finetune_trainers.errors import OutOfMemoryError, PeerLostError, TrainerError, classified, first_line
from finetune_trainers.worker_process import LOG_FILE

__all__ = ["first_cause", "is_loss", "is_unexplained", "killed_by_kernel"]

_LOSSES = ("PreemptionError", "WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError")
"""Of a group as a whole: its machine was taken away, or others were faster when there was room for it."""


def _failures(error: BaseException) -> dict[int, BaseException]:
    """What ended each worker, by rank. Ray Train wraps what Ray says of one that does not answer any more; where Ray
    says that it killed it for want of memory, that is a reason like any that a worker tells itself."""
    failures: Mapping[int, BaseException] = getattr(error, "worker_failures", {})
    plain = {rank: getattr(one, "health_check_failure", one) for rank, one in sorted(failures.items())}
    return {rank: _killed_by_ray(f"Worker {rank}", one) or one for rank, one in plain.items()}


def is_loss(error: BaseException) -> bool:
    """Whether workers are gone, for no reason that would hold for their successors: memory that is too small would."""
    failures = _failures(error)
    if not failures:
        return any(type(one).__name__ in _LOSSES for one in (error, getattr(error, "controller_failure", None)))
    typed = [failure for failure in failures.values() if isinstance(failure, TrainerError)]
    lost = (FailureClass.NODE_LOST, TrainerError.failure_class)
    if len(typed) < len(failures):
        return all(failure.failure_class in lost for failure in typed)
    return all(isinstance(failure, PeerLostError) for failure in typed)  # the one that is gone is not yet missed


def is_unexplained(error: BaseException) -> bool:
    """Whether workers are gone, and neither they nor Ray have said why."""
    failures = _failures(error).values()
    typed = [one for one in failures if isinstance(one, TrainerError)]
    is_plain = len(typed) < len(failures) or any(isinstance(one, PeerLostError) for one in typed)
    return is_plain and all(one.failure_class == TrainerError.failure_class for one in typed)


def _killed_by_ray(who: str, failure: object) -> OutOfMemoryError | None:
    """Where Ray ended a process itself before the memory of its machine or container ran out."""
    ray_exceptions = sys.modules.get("ray.exceptions")
    if ray_exceptions is None or not isinstance(failure, ray_exceptions.OutOfMemoryError):
        return None
    return _killed_for_memory(who, "Ray", first_line(failure).rstrip("."))


def killed_by_kernel(error: BaseException) -> OutOfMemoryError:
    dead = [rank for rank, failure in _failures(error).items() if not isinstance(failure, TrainerError)]
    return _killed_for_memory(f"Worker {dead[0]}" if dead else "A worker", "the kernel", "it had run out")


def _killed_for_memory(who: str, by: str, why: str) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"{who} was killed by {by} for want of memory: {why}. Raise spec.cluster.workers.memory, lower"
        " spec.training.microBatchSize or the method's maxSeqLength, or have ZeRO split more"
        " (spec.deepspeed.zeroStage)."
    )


def first_cause(error: BaseException) -> TrainerError:
    """What the failure of a group comes from. One worker fails for a reason, the others because it is gone."""
    failures = _failures(error)
    typed = [failure for failure in failures.values() if isinstance(failure, TrainerError)]
    known = [failure for failure in typed if failure.failure_class != TrainerError.failure_class]
    if known:
        return known[0]
    dead = [(rank, failure) for rank, failure in failures.items() if not isinstance(failure, TrainerError)]
    if dead:
        return _died(*dead[0])
    behind = _killed_by_ray("A process of this run", getattr(error, "controller_failure", None))
    return behind or (typed[0] if typed else classified(error))


def _died(rank: int, error: BaseException) -> TrainerError:
    return TrainerError(
        f"Worker {rank} died without saying why, as a process does that was killed: by a person, or by the kernel when"
        f" memory ran out. The end of {LOG_FILE} and the kernel's log may tell. Ray says: {first_line(error)}"
    )
