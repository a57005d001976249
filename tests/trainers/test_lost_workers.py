"""What the end of a group of workers comes from: workers that are gone are replaced, a reason of their own is not."""

from __future__ import annotations

import pytest
from ray.exceptions import OutOfMemoryError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from finetune_api.failures import FailureClass
from finetune_trainers.errors import DataError, PeerLostError, TrainerError, classified
from finetune_trainers.lost_workers import first_cause, is_loss, is_unexplained, killed_by_kernel

DEAD = OSError("as Ray tells of an actor that died")
LOST = PeerLostError("Connection closed by peer")
ODD = TrainerError("ValueError: odd")
KILLED = OutOfMemoryError("2 worker(s) were killed due to the node running low on memory.\nMuch more of it.")
SILENT = WorkerHealthCheckFailedError("A worker health check failed.", KILLED)
"""How Ray Train tells what Ray has told it of a worker."""


class GroupError(Exception):
    """As Ray Train raises it."""

    def __init__(self, *failures: Exception) -> None:
        super().__init__("training failed")
        self.worker_failures = dict(enumerate(failures))


class PreemptionError(Exception):
    """Has the name of Ray Train's."""


class ControllerError(Exception):
    def __init__(self, failure: Exception) -> None:
        super().__init__("training failed")
        self.controller_failure = failure


class WorkerGroupStartupTimeoutError(Exception):
    """Has the name of Ray Train's."""


@pytest.mark.parametrize(
    ("what", "error", "replaced"),
    [
        ("one has died", GroupError(DEAD), True),
        ("one has died, and another one says so", GroupError(DEAD, LOST), True),
        ("one has died, and it makes another one stumble", GroupError(DEAD, ODD), True),
        ("one is gone, and only the others have noticed", GroupError(LOST, LOST), True),
        ("one fails by a mistake, and the others lose it", GroupError(ODD, LOST), False),
        ("one reads bad data, and the others lose it", GroupError(DataError("row 3"), LOST), False),
        ("one has died, and another one reads bad data", GroupError(DEAD, DataError("row 3")), False),
        ("one was killed because memory ran out", GroupError(OutOfMemoryError("2 GiB"), LOST), False),
        ("one was killed by Ray, which tells Ray Train", GroupError(SILENT, LOST), False),
        ("their machine was taken away", PreemptionError("in 30 s"), True),
        ("others took the room", ControllerError(WorkerGroupStartupTimeoutError("60 s")), True),
        ("Ray Train fails", ControllerError(ValueError("odd")), False),
        ("something else", ValueError("odd"), False),
    ],
)
def test_workers_are_replaced_that_are_gone(what: str, error: Exception, replaced: bool) -> None:
    assert is_loss(error) is replaced, what


@pytest.mark.parametrize(
    ("what", "error", "asked"),
    [
        ("one has died, and another one says so", GroupError(LOST, DEAD), True),
        ("one is gone, and only the others have noticed", GroupError(LOST, LOST), True),
        ("one fails by a mistake", GroupError(ODD, ODD), False),
        ("one has died, and another one reads bad data", GroupError(DEAD, DataError("row 3")), False),
        ("one was killed by Ray, which says so", GroupError(SILENT, LOST), False),
        ("their machine was taken away", PreemptionError("in 30 s"), False),
    ],
)
def test_whether_the_kernel_is_asked_about_workers_that_are_gone(what: str, error: Exception, asked: bool) -> None:
    assert is_unexplained(error) is asked, what


def test_a_worker_that_the_kernel_killed_is_named_with_what_to_do() -> None:
    error = killed_by_kernel(GroupError(LOST, DEAD))
    assert error.failure_class is FailureClass.OUT_OF_MEMORY
    assert error.message.startswith("Worker 1 was killed by the kernel")
    assert "spec.cluster.workers.memory" in error.message


@pytest.mark.parametrize(
    ("error", "who"),
    [
        (GroupError(LOST, SILENT), "Worker 1"),
        (GroupError(DEAD, SILENT), "Worker 1"),
        (ControllerError(KILLED), "A process of this run"),
    ],
)
def test_a_worker_that_ray_killed_for_want_of_memory_is_named_with_what_ray_says_and_what_to_do(
    error: Exception, who: str
) -> None:
    cause = first_cause(error)
    assert cause.failure_class is FailureClass.OUT_OF_MEMORY
    assert cause.message.startswith(f"{who} was killed by Ray for want of memory: 2 worker(s) were killed")
    assert "Much more" not in cause.message
    assert "spec.cluster.workers.memory" in cause.message


@pytest.mark.parametrize(
    "said",
    [
        "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:8594.",
        "NCCL error: remote process exited or there was a network error",
        "NCCL error in: NCCLUtils.cpp:77, ncclRemoteError: A call failed. Connection closed by remote peer",
    ],
)
def test_who_loses_the_connection_to_another_one_says_so(said: str) -> None:
    error = classified(RuntimeError(said))
    assert isinstance(error, PeerLostError)
    assert said in error.message
