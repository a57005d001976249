"""Each end of an attempt, and the class that follows from its evidence. A row is a sentence of what was seen."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.failures import EXIT_CODES, Failure, FailureClass, Problem
from finetune_api.job import PostMortem
from finetune_api.progress import Outcome, Progress, Result, Stage
from finetune_operator import names
from finetune_operator.policies.classification import CANCELLED, SUCCEEDED, Ending, classify, evidence
from finetune_operator.policies.signatures import KUBERAY_REASONS, POD_SIGNS, TEXT_SIGNS
from finetune_operator.states import PodState, RayJobState, Report

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
LOGS = "Job entrypoint command failed with exit code {}, last available logs (truncated to 20,000 chars):\n"


def ray_job(deployment: str = "Running", job: str = "RUNNING", **changes: Any) -> RayJobState:
    whole: dict[str, Any] = {
        "name": "bot-2",
        "uid": "u2",
        "owner_uid": "u",
        "attempt": 2,
        "created_at": NOON,
        "suspended": False,
        "deployment_status": deployment,
        "job_status": job,
        "reason": "AppFailed" if deployment == "Failed" else "",
        "message": "",
        "started_at": NOON,
        "ended_at": None,
        "deleting": False,
    }
    return RayJobState(**(whole | changes))


def failed(message: str = "", **changes: Any) -> RayJobState:
    return ray_job("Failed", "FAILED", message=message, **changes)


def pod(name: str = "w0", **changes: Any) -> PodState:
    whole: dict[str, Any] = {
        "name": name,
        "attempt": 2,
        "role": names.WORKER,
        "phase": "Running",
        "node": "n1",
        "reason": "",
        "message": "",
        "waiting_reason": None,
        "terminated_reason": None,
        "exit_code": None,
        "disruption": None,
        "unschedulable": None,
        "ready": True,
        "deleting": False,
    }
    return PodState(**(whole | changes))


def head(**changes: Any) -> PodState:
    return pod("head", role=names.HEAD, **changes)


def told(outcome: Outcome | None = None, attempt: int = 2, at: datetime | None = None, step: int = 5) -> Report:
    moment = at if at is not None else NOON + timedelta(hours=1)
    return Report(attempt, Progress(stage=Stage.TRAINING, step=step, updated_at=moment), outcome)


def trainers_failed(kind: FailureClass, message: str = "it broke") -> Outcome:
    problems = [Problem(path="spec.x", message="mend it")] if kind is FailureClass.USER_ERROR else []
    return Outcome(
        result=Result.FAILED, failure=Failure(failure_class=kind, message=message, problems=problems), step=7
    )


def kind_of(ending: Ending | None) -> str | None:
    return ending.outcome if ending is not None else None


STOPPED = Outcome(result=Result.CANCELLED, step=7)
DONE = Outcome(result=Result.SUCCEEDED, step=9)
PREEMPTED = pod(disruption="PreemptionByScheduler")


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(ray_job("", ""), id="not begun"),
        pytest.param(ray_job("Initializing", ""), id="the cluster is being made"),
        pytest.param(ray_job("Running", "PENDING"), id="handed over"),
        pytest.param(ray_job(), id="training"),
        pytest.param(ray_job("Suspended", ""), id="in a queue"),
        pytest.param(None, id="no RayJob"),
    ],
)
def test_nothing_has_ended_while_it_goes_on(state: RayJobState | None) -> None:
    assert classify(state, [head(), pod()], told(), attempt=2) is None


# 1. the trainers' own word


@pytest.mark.parametrize("kind", [kind for kind in FailureClass if kind is not FailureClass.UNKNOWN])
def test_a_class_that_the_trainers_give_counts_at_once_and_before_all_else(kind: FailureClass) -> None:
    for state in (ray_job(), failed(LOGS.format(1) + "CUDA out of memory"), None):
        ending = classify(state, [PREEMPTED], told(trainers_failed(kind)), attempt=2)
        assert ending is not None
        assert (ending.failure_class, ending.exit_code, ending.reported) == (kind, EXIT_CODES[kind], True)


def test_the_trainers_message_comes_with_its_problems() -> None:
    ending = classify(ray_job(), [], told(trainers_failed(FailureClass.USER_ERROR)))
    assert ending is not None
    assert ending.message == "it broke\nspec.x: mend it"


def test_success_counts_at_once() -> None:
    for state in (ray_job(), ray_job("Complete", "SUCCEEDED"), failed("head died"), None):
        ending = classify(state, [PREEMPTED], told(DONE), attempt=2)
        assert ending == Ending(SUCCEEDED, exit_code=0, step=9, reported=True)


def test_what_another_attempt_reported_is_not_about_this_one() -> None:
    assert classify(ray_job(), [], told(DONE, attempt=1)) is None
    ending = classify(failed(), [], told(DONE, attempt=1))
    assert ending is not None
    assert (ending.outcome, ending.step) == ("Unknown", 0)


def test_a_report_that_names_no_attempt_is_about_none() -> None:
    assert classify(ray_job(attempt=None), [], Report(None, None, DONE)) is None


@pytest.mark.parametrize("outcome", [trainers_failed(FailureClass.UNKNOWN), STOPPED], ids=["unknown", "stopped"])
def test_what_the_trainers_cannot_know_waits_for_the_rayjobs_end(outcome: Outcome) -> None:
    assert classify(ray_job(), [], told(outcome)) is None
    assert classify(failed(), [], told(outcome)) is not None
    assert classify(None, [], told(outcome), attempt=2) is not None


@pytest.mark.parametrize(
    ("pods", "message", "log", "kind"),
    [
        pytest.param([pod(terminated_reason="OOMKilled", exit_code=137)], "Worker 0 died", "", "OutOfMemory", id="pod"),
        pytest.param([], "ncclRemoteError: a call failed", "", "NodeLost", id="its own words"),
        pytest.param([], "Worker 0 died", "OSError: No space left on device", "StorageError", id="the log"),
        pytest.param(
            [pod(phase="Failed", exit_code=1)], "it broke", "CUDA out of memory", "OutOfMemory", id="not mute"
        ),
        pytest.param([], "KeyError: 'x'", "", "Unknown", id="nobody knows"),
    ],
)
def test_a_failure_that_the_trainers_do_not_know_is_known_by_other_evidence(
    pods: list[PodState], message: str, log: str, kind: str
) -> None:
    outcome = trainers_failed(FailureClass.UNKNOWN, message)
    ending = classify(failed(LOGS.format(1) + log), pods, told(outcome))
    assert ending is not None
    assert ending.outcome == kind
    assert message in ending.message


def test_a_stop_by_a_person_is_cancelled() -> None:
    assert kind_of(classify(ray_job("Complete", "STOPPED"), [], told(STOPPED))) == CANCELLED
    assert kind_of(classify(ray_job("Complete", "STOPPED"), [], Report())) == CANCELLED
    assert kind_of(classify(None, [], told(STOPPED), attempt=2)) == CANCELLED


def test_a_stop_because_of_the_platform_is_a_preemption() -> None:
    assert kind_of(classify(failed(LOGS.format(130)), [PREEMPTED], told(STOPPED))) == "Preempted"
    assert kind_of(classify(ray_job("Complete", "STOPPED"), [PREEMPTED], told(STOPPED))) == "Preempted"


def test_a_pod_without_memory_is_why_trainers_stopped_unless_a_person_stopped_them() -> None:
    starved = pod(terminated_reason="OOMKilled")
    assert kind_of(classify(failed(LOGS.format(143)), [starved], Report())) == "OutOfMemory"
    assert kind_of(classify(ray_job("Complete", "STOPPED"), [starved], told(STOPPED))) == CANCELLED


@pytest.mark.parametrize("code", [130, 143, -15, -2])
def test_a_stop_that_nobody_asked_for_is_a_preemption(code: int) -> None:
    assert kind_of(classify(failed(LOGS.format(code)), [], Report())) == "Preempted"
    assert kind_of(classify(failed(LOGS.format(code)), [], told(STOPPED))) == "Preempted"


def test_a_queue_that_starts_the_rayjob_again_makes_the_first_end_history() -> None:
    before = told(STOPPED, at=NOON - timedelta(minutes=1))
    assert kind_of(classify(failed(LOGS.format(3)), [], before)) == "DataError"
    assert kind_of(classify(ray_job("Complete", "SUCCEEDED"), [], told(DONE, at=before.progress.updated_at))) == (  # type: ignore[union-attr]
        SUCCEEDED
    )


@pytest.mark.parametrize(
    "state",
    [
        ray_job("Suspending", ""),
        ray_job(suspended=True),
        ray_job(deleting=True),
    ],
    ids=["suspending", "to be suspended", "being deleted"],
)
def test_pods_that_end_because_their_rayjob_is_taken_down_tell_nothing(state: RayJobState) -> None:
    assert classify(state, [head(phase="Failed", exit_code=1), PREEMPTED], told(STOPPED)) is None


# 2. the entrypoint's exit code


@pytest.mark.parametrize("kind", [kind for kind in FailureClass if kind is not FailureClass.UNKNOWN])
def test_the_entrypoints_exit_code_gives_the_class_when_the_outcome_was_lost(kind: FailureClass) -> None:
    ending = classify(failed(LOGS.format(EXIT_CODES[kind]) + "last line"), [PREEMPTED], Report())
    assert ending is not None
    assert (ending.failure_class, ending.exit_code, ending.reported) == (kind, EXIT_CODES[kind], False)
    assert ending.message.endswith("last line")


@pytest.mark.parametrize(("said", "code"), [("1", 1), ("-9", 137), ("-11", 139), ("137", 137), ("255", 255)])
def test_other_codes_are_kept_and_say_nothing_of_the_class(said: str, code: int) -> None:
    ending = classify(failed(LOGS.format(said)), [], Report())
    assert ending is not None
    assert (ending.outcome, ending.exit_code) == ("Unknown", code)


def test_a_code_that_only_the_log_speaks_of_is_not_the_entrypoints() -> None:
    ending = classify(failed("Job supervisor died: some tool ended with exit code 3"), [], Report())
    assert ending is not None
    assert ending.exit_code is None


def test_killed_and_the_pod_tells_by_whom() -> None:
    ending = classify(failed(LOGS.format(-9)), [pod(terminated_reason="OOMKilled", exit_code=137)], Report())
    assert ending is not None
    assert (ending.outcome, ending.exit_code, ending.pod) == ("OutOfMemory", 137, "w0")


# 3. the pods

POD_EXAMPLES: dict[str, PodState] = {
    "was killed because it used more memory than it may": pod(terminated_reason="OOMKilled"),
    "was evicted because a volume in memory grew beyond its limit": pod(
        reason="Evicted", message='Usage of EmptyDir volume "shared-memory" exceeds the limit "4Gi". '
    ),
    "was evicted because it filled the node's disk": pod(
        reason="Evicted", message="The node was low on resource: ephemeral-storage. ", disruption="TerminationByKubelet"
    ),
    "gave way to a pod of higher priority": pod(disruption="PreemptionByScheduler"),
    "was evicted so that its node could be emptied": pod(disruption="EvictionByEvictionAPI"),
    "was taken off a node that is unreachable, not ready or tainted": pod(disruption="DeletionByTaintManager"),
    "was removed because its node is gone": pod(disruption="DeletionByPodGC"),
    "was ended because its node shuts down": pod(
        reason="Terminated",
        message="Pod was terminated in response to imminent node shutdown.",
        disruption="TerminationByKubelet",
    ),
    "gave way to a pod that its node cannot do without": pod(reason="Preempting", disruption="TerminationByKubelet"),
    "was evicted because its node ran short of something": pod(
        reason="Evicted", message="The node was low on resource: memory. ", disruption="TerminationByKubelet"
    ),
    "was ended by its node": pod(disruption="TerminationByKubelet"),
    "is on a node that no longer answers": pod(phase="Unknown"),
    "was lost from sight: its node came back without it": pod(terminated_reason="ContainerStatusUnknown"),
    "was turned away by its node": pod(phase="Failed", reason="OutOfnvidia.com/gpu"),
}
POD_CLASSES = {
    FailureClass.OUT_OF_MEMORY: 2,
    FailureClass.STORAGE_ERROR: 1,
    FailureClass.PREEMPTED: 6,
    FailureClass.NODE_LOST: 5,
}


@pytest.mark.parametrize("sign", POD_SIGNS, ids=lambda sign: f"pod {sign.says}")
def test_a_pod_that(sign: Any) -> None:
    example = POD_EXAMPLES[sign.says]
    ending = classify(failed(LOGS.format(1)), [pod("healthy"), example], Report())
    assert ending is not None
    assert (ending.failure_class, ending.pod) == (sign.failure_class, "w0")
    assert ending.message.startswith(f"Pod w0 {sign.says}")


def test_the_classes_of_pods_are_as_many_as_were_thought_about() -> None:
    assert {kind: sum(sign.failure_class is kind for sign in POD_SIGNS) for kind in POD_CLASSES} == POD_CLASSES


def test_a_container_that_only_failed_is_no_reason_by_itself() -> None:
    ending = classify(failed(LOGS.format(1)), [pod(phase="Failed", terminated_reason="Error", exit_code=1)], Report())
    assert ending is not None
    assert ending.outcome == "Unknown"


def test_pods_of_another_attempt_tell_nothing_of_this_one() -> None:
    assert kind_of(classify(failed(), [pod(attempt=1, terminated_reason="OOMKilled")], Report())) == "Unknown"


def test_pods_are_remembered_that_are_gone() -> None:
    seen = PostMortem(attempt=2, failure_class=FailureClass.PREEMPTED, pod="w1", reason="PreemptionByScheduler")
    ending = classify(failed(LOGS.format(1)), [], Report(), seen=seen)
    assert ending is not None
    assert (ending.outcome, ending.pod) == ("Preempted", "w1")
    of_the_one_before = seen.model_copy(update={"attempt": 1})
    assert kind_of(classify(failed(LOGS.format(1)), [], Report(), seen=of_the_one_before)) == "Unknown"


def test_a_pod_that_failed_without_a_reason_is_remembered_by_name() -> None:
    seen = PostMortem(attempt=2, failure_class=FailureClass.UNKNOWN, pod="w1", message="Pod w1 failed.")
    ending = classify(failed(LOGS.format(1) + "CUDA out of memory"), [], Report(), seen=seen)
    assert kind_of(ending) == "OutOfMemory"
    ending = classify(failed(LOGS.format(1)), [], Report(), seen=seen)
    assert ending is not None
    assert (ending.outcome, ending.pod) == ("Unknown", "w1")


def test_a_head_that_failed_ends_the_attempt_though_kuberay_waits_for_it() -> None:
    assert classify(ray_job(), [head(), pod()], Report()) is None
    ending = classify(ray_job(), [head(phase="Failed", disruption="EvictionByEvictionAPI"), pod()], Report())
    assert kind_of(ending) == "Preempted"
    ending = classify(ray_job(), [head(phase="Failed", exit_code=1), pod()], told())
    assert ending is not None
    assert (ending.outcome, ending.pod, ending.exit_code, ending.step) == ("Unknown", "head", 1, 5)


def test_a_head_that_is_gone_while_its_workers_stand_is_a_lost_node() -> None:
    assert kind_of(classify(ray_job(), [pod()], Report())) == "NodeLost"
    seen = PostMortem(attempt=2, failure_class=FailureClass.PREEMPTED)
    assert kind_of(classify(ray_job(), [pod()], Report(), seen=seen)) == "Preempted"


def test_no_pods_at_all_are_no_evidence_because_they_may_not_have_been_seen_yet() -> None:
    assert classify(ray_job(), [], Report()) is None


def test_before_it_runs_a_head_is_replaced_and_its_failure_is_not_the_end() -> None:
    assert classify(ray_job("Initializing", ""), [head(phase="Failed", exit_code=1), pod()], Report()) is None


def test_evidence_is_what_a_failed_pod_tells_while_the_attempt_goes_on() -> None:
    assert evidence([head(), pod(deleting=True)]) is None
    oom = evidence([pod(), pod("w1", terminated_reason="OOMKilled", exit_code=137)])
    assert oom is not None
    assert (oom.failure_class, oom.pod, oom.reason, oom.exit_code) == (
        FailureClass.OUT_OF_MEMORY,
        "w1",
        "OOMKilled",
        137,
    )
    plain = evidence([pod("w1", phase="Failed", terminated_reason="Error", exit_code=1)])
    assert plain is not None
    assert (plain.failure_class, plain.message) == (FailureClass.UNKNOWN, "Pod w1 failed with exit code 1.")


# 4. signatures

TEXT_EXAMPLES: dict[str, list[str]] = {
    "a GPU ran out of memory (PyTorch, cuBLAS)": [
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB",
        "torch.cuda.OutOfMemoryError: tried",
        "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling",
    ],
    "the machine ran out of memory (Ray's memory monitor, the allocator)": [
        "Task was killed due to the node running low on memory.",
        "DefaultCPUAllocator: can't allocate memory: you tried",
        "OSError: [Errno 12] Cannot allocate memory",
        "terminate called after throwing an instance of 'std::bad_alloc'",
    ],
    "the loss overflowed until its scale could not be lowered any more (DeepSpeed)": [
        "Exception: Current loss scale already at minimum - cannot decrease scale anymore. Exiting run."
    ],
    "a node was taken away (Ray, Ray Train)": [
        "Actor died by preemption.",
        "ray.train.v2.api.exceptions.PreemptionError: nodes 1",
    ],
    "a disk is full, gone or read-only (the kernel)": [
        "OSError: [Errno 28] No space left on device: '/mnt/pvc/runs/x'",
        "OSError: [Errno 116] Stale file handle",
    ],
    "the object store refuses the credentials or knows no such bucket (S3)": [
        "Server returned error response: 403 Forbidden: <Code>AccessDenied</Code>",
        "The specified bucket does not exist (NoSuchBucket)",
    ],
    "the object store is overloaded or out of reach (S3)": ["status 503 Service Unavailable", "<Code>SlowDown</Code>"],
    "the hub does not let this job have the model or data (Hugging Face)": [
        "huggingface_hub.errors.GatedRepoError: 401"
    ],
    "the image lacks the trainers, or Python": [
        "/usr/bin/python: No module named finetune_trainers",
        "ModuleNotFoundError: No module named 'finetune_trainers'",
        "sh: 1: python: not found",
    ],
    "Ray could not set up the entrypoint's environment": ["runtime_env setup failed: Failed to"],
    "the image's compiler or CUDA does not fit (DeepSpeed's builder)": [
        "Unable to JIT load the cpu_adam op due to ninja not being installed.",
    ],
    "a GPU is broken (CUDA, the driver)": ["CUDA error: uncorrectable ECC error encountered"],
    "ranks waited for each other until their patience ended (PyTorch's NCCL watchdog)": [
        "[Rank 3] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALLREDUCE)"
    ],
    "the network between workers, or one of them, went away (NCCL)": [
        "NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)",
        "ncclRemoteError: A call failed possibly due to a network error",
    ],
    "the network between workers, or one of them, went away (gloo)": [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.4]:2222",
    ],
    "a node or its Ray daemon died (Ray)": [
        "ray.exceptions.NodeDiedError: x",
        "The task's local raylet died. Check raylet.out",
        "Task failed because the node it was running on is dead or unavailable. Node IP: 10.0.0.4",
        "Job supervisor actor died: The actor died",
    ],
    "Ray found no room for the entrypoint in time": [
        "Job supervisor actor could not be scheduled: x",
        "Job supervisor actor failed to start within 900 seconds.",
    ],
}


@pytest.mark.parametrize("sign", TEXT_SIGNS, ids=lambda sign: sign.says)
def test_a_log_tells_that(sign: Any) -> None:
    for example in TEXT_EXAMPLES[sign.says]:
        for text in (example, example.upper()):
            ending = classify(failed(f"{LOGS.format(1)}Epoch 1\n{text}\nbye"), [], Report())
            assert ending is not None
            assert ending.failure_class is sign.failure_class, text
            assert ending.message.lower().startswith(sign.says.lower())


def test_an_ordinary_traceback_has_no_signature() -> None:
    ending = classify(failed(LOGS.format(1) + "KeyError: 'messages'\n"), [], Report())
    assert ending is not None
    assert ending.outcome == "Unknown"


# 5. KubeRay's reasons


@pytest.mark.parametrize("reason", KUBERAY_REASONS)
def test_kuberays_own_reason_counts_when_nothing_else_is_known(reason: str) -> None:
    ending = classify(ray_job("Failed", "", reason=reason, message="as it was"), [], Report())
    assert ending is not None
    assert (ending.failure_class, ending.reason) == (KUBERAY_REASONS[reason][0], reason)
    assert ending.message.endswith("as it was")


def test_a_rayjob_that_kuberay_refused_is_a_mistake_of_the_job() -> None:
    ending = classify(ray_job("ValidationFailed", "", reason="ValidationFailed", message="no"), [], Report())
    assert kind_of(ending) == "UserError"


def test_a_success_without_a_word_from_the_trainers_is_one_and_says_so() -> None:
    ending = classify(ray_job("Complete", "SUCCEEDED"), [PREEMPTED], told())
    assert ending == Ending(SUCCEEDED, exit_code=0, step=5, reported=False)


def test_an_end_without_any_evidence_is_unknown_and_still_has_a_sentence() -> None:
    ending = classify(failed(reason=""), [], Report())
    assert ending == Ending("Unknown", FailureClass.UNKNOWN, message="The RayJob failed and left no reason.")


def test_a_long_log_keeps_its_beginning_and_its_end() -> None:
    ending = classify(failed(LOGS.format(3) + "x" * 20_000 + "the last line"), [], Report())
    assert ending is not None
    assert len(ending.message) == 4096
    assert ending.message.startswith("Job entrypoint command failed")
    assert ending.message.endswith("the last line")


def test_every_signature_has_an_example() -> None:
    assert {sign.says for sign in POD_SIGNS} == POD_EXAMPLES.keys()
    assert {sign.says for sign in TEXT_SIGNS} == TEXT_EXAMPLES.keys()


WORDS = st.sampled_from(["", "Evicted", "OOMKilled", "Failed", "Running", "Complete", "STOPPED", "FAILED", "Unknown"])
OUTCOMES = st.sampled_from([None, DONE, STOPPED, trainers_failed(FailureClass.UNKNOWN), Outcome(result=Result.FAILED)])


@given(
    st.none()
    | st.builds(ray_job, WORDS, WORDS, message=st.text(), suspended=st.booleans(), attempt=st.none() | st.just(2)),
    st.lists(st.builds(pod, phase=WORDS, reason=WORDS, role=WORDS, exit_code=st.none() | st.integers()), max_size=3),
    st.builds(Report, st.none() | st.just(2), st.just(None), OUTCOMES),
    st.none() | st.just(2),
)
def test_no_evidence_makes_it_fail_and_every_failure_has_a_class(
    state: RayJobState | None, pods: list[PodState], report: Report, attempt: int | None
) -> None:
    ending = classify(state, pods, report, attempt=attempt)
    if ending is not None:
        assert (ending.failure_class is None) == (ending.outcome in (SUCCEEDED, CANCELLED))
        assert ending.failure_class is None or ending.outcome == ending.failure_class.value
