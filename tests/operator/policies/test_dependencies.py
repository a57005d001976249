"""Jobs that need other jobs' models wait for them, and fail with them."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.names import OUTPUTS_ANNOTATION
from finetune_operator.policies.dependencies import dependency_names, dependency_paths, misfits, resolve, with_plan
from tests.factories import job_document
from tests.operator.decide_factories import ARTIFACT, another_job

WRITTEN = [ARTIFACT.to_document()]


def ended(kind: str, reason: str = "Succeeded", message: str = "", **more: Any) -> dict[str, Any]:
    condition = {"type": kind, "status": "True", "reason": reason, "message": message}
    return {"phase": "Succeeded" if kind == "Complete" else "Failed", "conditions": [condition], **more}


@pytest.mark.parametrize(
    ("source", "names"),
    [("job://sft", ("sft",)), ("hf://org/name", ()), ("file:///job://x", ())],
)
def test_the_jobs_that_a_job_names(source: str, names: tuple[str, ...]) -> None:
    assert dependency_names(job_document({"model.source": source})) == names


def test_a_teacher_and_rewards_are_waited_for_like_the_model_and_each_job_once() -> None:
    rewards = [{"model": {"source": "job://judge"}}, {"metric": {"kind": "bleu"}}, {"model": {"source": "job://sft"}}]
    document = job_document({"model.source": "job://sft", "method": {"ppo": {"rewards": rewards}}})
    assert dependency_names(document) == ("sft", "judge")
    assert dependency_paths(document)["spec.method.ppo.rewards[0].model.source"] == "judge"
    document = job_document({"method": {"distill": {"teacher": {"source": "job://big"}}}})
    assert dependency_paths(document) == {"spec.method.distill.teacher.source": "big"}


def test_a_setting_of_a_reward_function_that_looks_like_a_job_is_none() -> None:
    function = {"call": "a:b", "settings": {"source": "job://sft"}}
    assert dependency_names(job_document({"method": {"grpo": {"rewards": [{"function": function}]}}})) == ()


@pytest.mark.parametrize(
    "document",
    [
        None,
        [],
        {},
        {"spec": None},
        {"spec": {"model": []}},
        {"spec": {"model": {"source": 1}}},
        {"spec": {"method": {"ppo": {"rewards": {"0": 1}}}}},
        {"spec": {"method": {"distill": []}}},
    ],
)
def test_a_document_that_is_no_job_names_none(document: Any) -> None:
    assert dependency_names(document) == ()


POLICY = {"ppo": {"rewards": [{"model": {"source": "job://other"}}]}}
FULL: dict[str, Any] = {"tuning": {"full": {}}}
LORA: dict[str, Any] = {"tuning": {"lora": {}}}
MERGED = LORA | {"outputs": [{"to": "file:///out", "merge": True}]}
NEEDS_MODEL = {"model.source": "job://other"}
NO_WRITER = "is a job of method reward, whose model gives scores and writes nothing; name a job of another method"
NO_JUDGE = "is a job of method sft, whose model gives no scores; name a job of method reward"
NOT_WHOLE = "will be an adapter and not a whole model; give other an output with merge: true"


@pytest.mark.parametrize(
    ("job", "other", "field", "message"),
    [
        pytest.param({"method": POLICY}, FULL, "method.ppo.rewards[0].model.source", NO_JUDGE, id="SFT as a reward"),
        pytest.param(NEEDS_MODEL, FULL | {"method": {"reward": {}}}, "model.source", NO_WRITER, id="reward as a model"),
        pytest.param(NEEDS_MODEL, LORA, "model.source", NOT_WHOLE, id="adapter as a model"),
        pytest.param(
            {"method": {"distill": {"teacher": {"source": "job://other"}}}},
            LORA,
            "method.distill.teacher.source",
            NOT_WHOLE,
            id="adapter as a teacher",
        ),
    ],
)
def test_a_job_whose_model_will_not_do_is_told_before_it_has_trained(
    job: dict[str, Any], other: dict[str, Any], field: str, message: str
) -> None:
    [problem] = misfits(job_document(job), {"other": job_document(other, name="other")})
    assert (problem.path, problem.value, problem.message) == (f"spec.{field}", '"job://other"', message)


def test_an_adapter_that_is_written_becomes_no_model_any_more() -> None:
    adapter = {**WRITTEN[0], "kind": "adapter"}
    other = job_document(LORA, name="other") | {"status": ended("Complete", artifacts=[adapter])}
    [problem] = misfits(job_document(NEEDS_MODEL), {"other": other})
    assert problem.message.startswith("wrote an adapter and not a whole model; submit other anew, by another name")


@pytest.mark.parametrize(
    ("job", "other"),
    [
        pytest.param(NEEDS_MODEL, job_document(FULL), id="a whole model to start from"),
        pytest.param(NEEDS_MODEL, job_document(MERGED), id="an adapter that will be merged"),
        pytest.param({"method": POLICY}, job_document(LORA | {"method": {"reward": {}}}), id="an adapter that judges"),
        pytest.param(NEEDS_MODEL, None, id="a job that is not there"),
        pytest.param(NEEDS_MODEL, {"spec": {"method": [], "tuning": 3}}, id="a document that is no job"),
        pytest.param(
            NEEDS_MODEL,
            job_document(LORA) | {"status": ended("Complete", artifacts=WRITTEN)},
            id="an adapter that was merged, by an output that is no longer there",
        ),
    ],
)
def test_a_job_whose_model_will_do_is_told_nothing(job: dict[str, Any], other: Any) -> None:
    assert misfits(job_document(job), {"other": other}) == []


def test_a_job_that_is_done_gives_its_model() -> None:
    found = resolve(["sft"], {"sft": another_job("sft", ended("Complete", artifacts=WRITTEN))})
    assert (found.artifacts, found.waiting, found.failed) == ({"sft": ARTIFACT}, (), ())


def test_a_whole_model_is_preferred_to_an_adapter() -> None:
    adapter = {**WRITTEN[0], "kind": "adapter"}
    found = resolve(["sft"], {"sft": another_job("sft", ended("Complete", artifacts=[adapter, *WRITTEN]))})
    assert found.artifacts["sft"].kind == "model"


def test_what_only_a_pod_had_is_no_model_for_others() -> None:
    lost = {**WRITTEN[0], "uri": "file:///var/finetune/run/artifact"}
    bucket = {**WRITTEN[0], "uri": "s3://models/sft"}
    found = resolve(["sft"], {"sft": another_job("sft", ended("Complete", artifacts=[lost, bucket]))})
    assert found.artifacts["sft"].uri == "s3://models/sft"
    [failed] = resolve(["sft"], {"sft": another_job("sft", ended("Complete", artifacts=[lost]))}).failed
    assert "its model went with its pods: give it spec.outputs, or a runtime with a storage" in failed


@pytest.mark.parametrize(
    ("other", "says"),
    [
        pytest.param(None, "there is no FineTuneJob of that name", id="does not exist"),
        pytest.param(another_job("sft"), "is Pending", id="has not begun"),
        pytest.param(another_job("sft", {"phase": "Running"}), "is Running", id="runs"),
        pytest.param(
            another_job("sft", {"phase": "Suspended", "conditions": "x"}), "is Suspended", id="makes no sense"
        ),
    ],
)
def test_a_job_that_has_not_ended_is_waited_for(other: Any, says: str) -> None:
    found = resolve(["sft"], {"sft": other})
    assert found.waiting[0].startswith("job://sft")
    assert says in found.waiting[0]
    assert (found.failed, found.artifacts) == ((), {})


def test_a_job_that_nobody_looked_up_is_waited_for() -> None:
    assert resolve(["sft"], {}).waiting


def test_a_failed_job_takes_its_reason_along() -> None:
    other = another_job("sft", ended("Failed", "NonFiniteLoss", "the loss became NaN at step 7"))
    assert resolve(["sft"], {"sft": other}).failed == (
        "job://sft failed: NonFiniteLoss: the loss became NaN at step 7",
    )


@pytest.mark.parametrize("artifacts", [[], [{"uri": 1}], "none"])
def test_a_success_without_a_model_is_a_failure_for_those_that_need_it(artifacts: Any) -> None:
    found = resolve(["sft"], {"sft": another_job("sft", ended("Complete", artifacts=artifacts))})
    assert found.failed == ("job://sft succeeded without writing a model.",)


def test_one_artifact_that_cannot_be_read_does_not_hide_the_others() -> None:
    found = resolve(["sft"], {"sft": another_job("sft", ended("Complete", artifacts=[{"uri": 1}, *WRITTEN]))})
    assert found.artifacts == {"sft": ARTIFACT}


def planned_with(outputs: str, uid: str = "1") -> dict[str, Any]:
    """The plan's ConfigMap of the job's first attempt."""
    owners = [{"uid": uid, "controller": True}]
    return {
        "metadata": {"name": "other-1-plan", "ownerReferences": owners, "annotations": {OUTPUTS_ANNOTATION: outputs}}
    }


@pytest.mark.parametrize(
    ("attempt", "plan", "fits"),
    [
        pytest.param({"number": 1}, planned_with('[{"to": "s3://b/a", "merge": false}]'), False, id="it trains"),
        pytest.param({"number": 1, "endedAt": "now"}, planned_with("[]"), True, id="the attempt has ended"),
        pytest.param({"number": 2}, planned_with("[]"), True, id="a plan of another attempt"),
        pytest.param({"number": 1}, planned_with("[]", uid="2"), True, id="of a job that had its name before"),
        pytest.param({"number": 1}, planned_with("no JSON"), True, id="somebody's hand"),
        pytest.param({"number": 1}, {"metadata": {"name": "other-1-plan"}}, True, id="nothing noted"),
        pytest.param("what", planned_with("[]"), True, id="no attempt"),
    ],
)
def test_of_a_job_that_trains_the_present_attempts_outputs_count(
    attempt: Any, plan: dict[str, Any], fits: bool
) -> None:
    other = job_document(MERGED, name="other") | {"status": {"attempts": [attempt]}}
    other["metadata"]["uid"] = "1"
    found = misfits(job_document(NEEDS_MODEL), {"other": with_plan(other, [plan])})
    assert (found == []) is fits
