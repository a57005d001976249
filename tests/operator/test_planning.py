"""Planning: what `auto` and left-out fields become, with reasons; what cannot be, refused with what would be right."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
from hypothesis import assume, event, given
from hypothesis import strategies as st
from pydantic import ValidationError

from finetune_api.failures import Problem
from finetune_api.job import FineTuneJob
from finetune_api.plan import CheckpointInterval, Device, RunPlan
from finetune_api.problems import InvalidManifest
from finetune_api.progress import Artifact
from finetune_api.runtime import FineTuneRuntime
from finetune_api.spec import KeepBest
from finetune_operator.planning import plan_run
from tests.factories import job, job_document, runtime

Changes = dict[str, Any]


def plan(changes: Changes | None = None, on: Changes | None = None) -> RunPlan:
    """The plan of the default job with `changes`, on a runtime with the changes `on` when they are given."""
    if on is None:
        return plan_run(job(changes))
    return plan_run(job({"runtimeRef": {"name": "pool"}, **(changes or {})}), runtime(on))


def problems(changes: Changes | None = None, on: Changes | None = None) -> list[Problem]:
    """What planning refuses."""
    with pytest.raises(InvalidManifest) as refused:
        plan(changes, on)
    return refused.value.problems


def decided(planned: RunPlan) -> dict[str, tuple[str, str]]:
    """What planning decided: field (without spec.) to value and reason."""
    return {decision.field.removeprefix("spec."): (decision.value, decision.reason) for decision in planned.decisions}


ELASTIC = {"cluster.workers": {"replicas": 4, "minReplicas": 1}, "checkpoint": {}, "training.globalBatchSize": 64}


class TestElasticWorkers:
    def test_numbers_that_do_not_divide_the_batch_are_left_out(self) -> None:
        planned = plan(ELASTIC)
        assert planned.workers.sizes == [4, 2, 1]
        assert decided(planned)["cluster.workers.minReplicas"] == ("2, 1", "workers that can share 64 sequences evenly")

    def test_those_below_the_least_are_left_out(self) -> None:
        assert plan(ELASTIC | {"cluster.workers.minReplicas": 2}).workers.sizes == [4, 2]

    def test_each_gpu_of_a_worker_takes_its_share(self) -> None:
        changes = {"cluster.workers": {"replicas": 4, "minReplicas": 1, "gpus": 8}, "training.globalBatchSize": 96}
        assert plan(ELASTIC | changes).workers.sizes == [4, 3, 2, 1]
        assert plan(ELASTIC | changes | {"training.globalBatchSize": 64}).workers.sizes == [4, 2, 1]

    @pytest.mark.parametrize("least", [None, 4])
    def test_a_job_that_needs_all_of_them_is_not_elastic(self, least: int | None) -> None:
        planned = plan(ELASTIC | {"cluster.workers": {"replicas": 4} | ({"minReplicas": least} if least else {})})
        assert planned.workers.elastic is None
        assert planned.workers.sizes == [4]

    @pytest.mark.parametrize("replicas", [4, 2, 1])
    def test_the_batch_stays_and_no_pass_is_larger(self, replicas: int) -> None:
        whole = plan(ELASTIC | {"training.microBatchSize": 8, "deepspeed.zeroStage": 2})
        on = whole.on(replicas)
        assert on.batch.global_batch_size == whole.batch.global_batch_size == 64
        assert (on.workers.replicas, on.workers.world_size, on.batch.world_size) == (replicas,) * 3
        assert on.batch.micro_batch_size == 8
        assert on.batch.gradient_accumulation_steps == 64 // 8 // replicas
        config = on.deepspeed.config
        assert config["train_batch_size"] == 64
        assert config["train_micro_batch_size_per_gpu"] == on.batch.micro_batch_size
        assert config["gradient_accumulation_steps"] == on.batch.gradient_accumulation_steps
        assert on.deepspeed.zero_stage == whole.deepspeed.zero_stage

    def test_a_pass_that_does_not_divide_a_larger_share_becomes_smaller(self) -> None:
        whole = plan(ELASTIC | {"training.globalBatchSize": 36, "training.microBatchSize": 9})
        batches = [whole.on(size).batch for size in (4, 3, 2, 1)]
        passes = [(one.micro_batch_size, one.gradient_accumulation_steps) for one in batches]
        assert passes == [(9, 1), (6, 2), (9, 2), (9, 4)]

    def test_a_plan_on_all_of_them_is_the_plan(self) -> None:
        planned = plan(ELASTIC)
        assert planned.on(4) is planned

    @pytest.mark.parametrize(("batch", "right"), [(64, "set it to 4"), (7, "set it to 1")])
    def test_a_least_number_that_nothing_follows_from_is_refused(self, batch: int, right: str) -> None:
        changes = {"cluster.workers": {"replicas": 8 if batch == 64 else 7, "minReplicas": 5}}
        [problem] = problems(ELASTIC | changes | {"training.globalBatchSize": batch})
        assert problem.path == "spec.cluster.workers.minReplicas"
        assert problem.message.endswith(right)

    def test_a_configuration_that_is_no_mapping_is_left_to_those_who_judge_it(self) -> None:
        assert problems(ELASTIC | {"deepspeed.config": {"zero_optimization": 3}})


class TestWorkers:
    def test_one_cpu_process_is_the_default(self) -> None:
        planned = plan()
        assert (planned.workers.world_size, planned.workers.device) == (1, Device.CPU)
        assert decided(planned)["cluster.workers.gpus"] == ("0", "no runtime named")

    @pytest.mark.parametrize(("replicas", "gpus", "world"), [(1, 0, 1), (4, 0, 4), (1, 8, 8), (4, 8, 32)])
    def test_each_gpu_runs_one_process_and_a_worker_without_gpus_runs_one(
        self, replicas: int, gpus: int, world: int
    ) -> None:
        planned = plan({"cluster.workers": {"replicas": replicas, "gpus": gpus}})
        assert planned.workers.world_size == planned.batch.world_size == world
        assert planned.workers.device == (Device.CUDA if gpus else Device.CPU)

    def test_a_number_that_the_job_names_is_no_decision(self) -> None:
        assert "cluster.workers.gpus" not in decided(plan({"cluster.workers.gpus": 0}))


class TestBatch:
    @pytest.mark.parametrize(
        ("total", "micro", "world", "accumulation"), [(32, 4, 1, 8), (32, 4, 8, 1), (128, 2, 16, 4), (7, 7, 1, 1)]
    )
    def test_accumulation_makes_up_for_what_one_pass_does_not_hold(
        self, total: int, micro: int, world: int, accumulation: int
    ) -> None:
        batch = plan(
            {
                "training.globalBatchSize": total,
                "training.microBatchSize": micro,
                "cluster.workers": {"replicas": world, "gpus": 0},
            }
        ).batch
        assert batch.gradient_accumulation_steps == accumulation
        assert batch.micro_batch_size == micro

    @pytest.mark.parametrize(
        ("length", "gpus", "micro"),
        [
            (2048, 0, 1),  # 2,048 tokens a pass on a CPU
            (512, 0, 4),
            (256, 0, 8),
            (300, 0, 4),  # 6 would fit, and 4 is the largest that divides 32
            (16, 0, 32),  # 128 would fit, and there are 32
            (4096, 0, 1),  # never less than one
            (2048, 1, 8),  # 16,384 on a GPU
            (4096, 1, 4),
            (1_048_576, 1, 1),
        ],
    )
    def test_auto_fills_a_pass_with_as_many_sequences_as_divide_the_batch(
        self, length: int, gpus: int, micro: int
    ) -> None:
        planned = plan({"method.sft.maxSeqLength": length, "cluster.workers.gpus": gpus})
        assert planned.batch.micro_batch_size == micro
        value, reason = decided(planned)["training.microBatchSize"]
        assert value == str(micro)
        assert f"sequences of {length} tokens" in reason

    def test_a_batch_that_the_processes_cannot_share_is_refused_with_the_nearest_that_they_can(self) -> None:
        (problem,) = problems({"training.globalBatchSize": 32, "cluster.workers": {"replicas": 3, "gpus": 0}})
        assert str(problem) == (
            "spec.training.globalBatchSize: must be a multiple of the 3 training processes; set it to 33 (found 32)"
        )

    def test_the_nearest_batch_is_never_zero(self) -> None:
        (problem,) = problems({"training.globalBatchSize": 1, "cluster.workers": {"replicas": 8, "gpus": 0}})
        assert problem.message.endswith("set it to 8")

    def test_a_micro_batch_that_does_not_divide_is_refused_with_those_that_do(self) -> None:
        # The job leaves gpus to the runtime, so no rule of the spec could see it.
        (problem,) = problems({"training.globalBatchSize": 32, "training.microBatchSize": 16}, on={"workers.gpus": 8})
        assert problem.path == "spec.training.microBatchSize"
        assert problem.message == (
            "must divide the 4 sequences that each of 8 training processes has per step; set it to one of 1, 2, 4"
        )


class TestZeroStage:
    FULL: ClassVar[Changes] = {"tuning": {"full": {}}}
    TWO: ClassVar[Changes] = {"cluster.workers": {"replicas": 2, "gpus": 0}}

    @pytest.mark.parametrize(
        ("changes", "stage", "reason"),
        [
            ({}, 0, "one training process"),
            (FULL, 0, "one training process"),
            (TWO, 2, "adapters are small"),
            (FULL | TWO, 3, "split over the workers"),
            ({"tuning": {"freeze": {"train": ["lm_head.*"]}}} | TWO, 3, "split over the workers"),
            ({"deepspeed.offload.optimizer": "cpu"}, 2, "host's memory"),
            (FULL | TWO | {"deepspeed.offload.optimizer": "cpu"}, 2, "host's memory"),
        ],
        ids=["lora alone", "full alone", "lora", "full", "freeze", "offload alone", "offload"],
    )
    def test_a_stage_that_is_left_out_follows_from_what_is_trained_and_where(
        self, changes: Changes, stage: int, reason: str
    ) -> None:
        planned = plan(changes)
        assert planned.deepspeed.zero_stage == stage
        value, why = decided(planned)["deepspeed.zeroStage"]
        assert value == str(stage)
        assert reason in why

    @pytest.mark.parametrize("stage", [0, 1, 2, 3])
    def test_a_stage_that_the_job_names_is_kept_and_is_no_decision(self, stage: int) -> None:
        planned = plan({"deepspeed.zeroStage": stage} | self.TWO)
        assert planned.deepspeed.zero_stage == stage
        assert planned.deepspeed.config["zero_optimization"] == {"stage": stage}
        assert "deepspeed.zeroStage" not in decided(planned)

    def test_one_process_that_splits_nothing_needs_no_deepspeed(self) -> None:
        assert plan().deepspeed.model_dump() == {"engine": "torch", "zero_stage": 0, "config": {}}

    @pytest.mark.parametrize(
        "changes", [TWO, {"deepspeed.zeroStage": 1}, {"deepspeed.config": {"wall_clock_breakdown": True}}], ids=str
    )
    def test_anything_more_is_deepspeeds(self, changes: Changes) -> None:
        planned = plan(changes)
        assert planned.deepspeed.engine == "deepspeed"
        assert planned.deepspeed.config["train_batch_size"] == 32

    def test_the_runtimes_stage_cannot_split_a_quantized_base(self) -> None:
        (problem,) = problems({"tuning.lora.quantization": "nf4"}, on={"zeroStage": 3})
        assert (problem.path, problem.value) == ("spec.deepspeed.zeroStage", "3")
        assert "quantized base" in problem.message

    def test_the_runtimes_stage_cannot_take_away_what_offload_needs(self) -> None:
        (problem,) = problems({"deepspeed.offload.optimizer": "cpu"}, on={"zeroStage": 0})
        assert problem.path == "spec.deepspeed.offload.optimizer"


class TestPrecision:
    @pytest.mark.parametrize(
        ("gpus", "asked", "precision"),
        [(0, "auto", "fp32"), (1, "auto", "bf16"), (0, "bf16", "bf16"), (1, "fp16", "fp16"), (1, "fp32", "fp32")],
    )
    def test_auto_is_what_the_device_is_good_at(self, gpus: int, asked: str, precision: str) -> None:
        planned = plan({"cluster.workers.gpus": gpus, "training.precision": asked})
        assert planned.precision == precision
        assert ("training.precision" in decided(planned)) == (asked == "auto")

    def test_fp16_on_a_cpu_is_refused(self) -> None:
        (problem,) = problems({"training.precision": "fp16"})
        assert problem.path == "spec.training.precision"
        assert "needs a GPU" in problem.message

    def test_the_runtimes_precision_stands_in_for_auto(self) -> None:
        planned = plan(on={"precision": "fp32", "workers.gpus": 1})
        assert planned.precision == "fp32"
        assert decided(planned)["training.precision"] == ("fp32", "runtime pool")

    def test_fp16_from_the_runtime_of_a_cpu_pool_is_refused_too(self) -> None:
        assert [problem.path for problem in problems(on={"precision": "fp16"})] == ["spec.training.precision"]


class TestRuntime:
    POOL: ClassVar[Changes] = {
        "workers": {"gpus": 8, "cpus": 96, "maxReplicas": 4},
        "storage": "pvc://runs/team/",
        "zeroStage": 1,
    }

    def test_what_the_job_leaves_out_is_the_runtimes(self) -> None:
        planned = plan({"cluster.workers.replicas": 2}, on=self.POOL)
        assert (planned.workers.gpus, planned.workers.cpus, planned.workers.world_size) == (8, 96, 16)
        assert planned.deepspeed.zero_stage == 1
        assert decided(planned)["cluster.workers.gpus"] == ("8", "runtime pool")
        assert decided(planned)["deepspeed.zeroStage"] == ("1", "runtime pool")

    def test_what_the_job_says_stands(self) -> None:
        changes = {"cluster.workers": {"gpus": 0, "cpus": 2}, "deepspeed.zeroStage": 2, "training.precision": "fp32"}
        planned = plan(changes, on=self.POOL | {"precision": "bf16"})
        assert (planned.workers.gpus, planned.workers.cpus) == (0, 2)
        assert planned.deepspeed.zero_stage == 2
        assert planned.precision == "fp32"

    def test_a_job_gets_a_folder_of_its_own(self) -> None:
        document = job_document({"runtimeRef": {"name": "pool"}})
        document["metadata"] |= {"namespace": "team-a"}
        planned = plan_run(FineTuneJob.model_validate(document), runtime({"storage": "pvc://runs/team/"}))
        assert planned.storage == "pvc://runs/team/team-a/example"

    def test_without_storage_a_run_keeps_to_its_working_folder(self) -> None:
        assert plan().storage is None

    def test_more_workers_than_the_runtime_allows_are_refused(self) -> None:
        (problem,) = problems({"cluster.workers.replicas": 8, "training.globalBatchSize": 64}, on=self.POOL)
        assert str(problem) == (
            "spec.cluster.workers.replicas: is more than runtime pool allows; ask for at most 4 (found 8)"
        )


class TestLearningRate:
    @pytest.mark.parametrize(
        ("changes", "peak"),
        [
            ({}, 5.7e-4),  # SmolLM2-135M with LoRA
            ({"tuning": {"full": {}}}, 5.7e-5),
            ({"model.parameters": "8B"}, 1.1e-4),  # the hint is believed before the name
            ({"model": {"source": "hf://org/unsized"}}, None),
            ({"training.learningRate": 3e-4}, 3e-4),
            ({"training.learningRate": 1}, 1.0),
        ],
        ids=str,
    )
    def test_the_peak_is_the_jobs_or_follows_from_the_size(self, changes: Changes, peak: float | None) -> None:
        assert plan(changes).optimization.learning_rate.peak == peak

    def test_a_size_that_is_not_known_yet_is_said_to_come_later(self) -> None:
        value, reason = decided(plan({"model": {"source": "hf://org/unsized"}}))["training.learningRate"]
        assert value == "auto"
        assert "model's size" in reason

    def test_a_rate_that_the_job_sets_is_no_decision(self) -> None:
        assert "training.learningRate" not in decided(plan({"training.learningRate": 3e-4}))


class TestTheRest:
    def test_the_plan_carries_what_the_job_asked_for(self) -> None:
        changes = {
            "training": {
                "maxSteps": 10,
                "seed": 7,
                "maxGradNorm": 0.5,
                "evalEverySteps": 5,
                "earlyStopping": {"patience": 2},
                "warmupFraction": 0.5,
                "minLearningRateFraction": 0.1,
                "schedule": "linear",
                "activationCheckpointing": True,
                "logEverySteps": 3,
            },
            "outputs": [{"to": "file:///out"}],
        }
        asked, planned = job(changes), plan(changes)
        assert (planned.model, planned.data, planned.method, planned.tuning) == (
            asked.spec.model,
            asked.spec.data,
            asked.spec.method,
            asked.spec.tuning,
        )
        assert (planned.outputs, planned.tracking) == (asked.spec.outputs, asked.spec.tracking)
        optimization, rate = planned.optimization, planned.optimization.learning_rate
        assert (optimization.epochs, optimization.max_steps, optimization.seed) == (None, 10, 7)
        assert (optimization.max_grad_norm, optimization.log_every_steps) == (0.5, 3)
        assert optimization.activation_checkpointing
        assert (rate.schedule, rate.warmup_fraction, rate.min_fraction) == ("linear", 0.5, 0.1)
        assert planned.evaluation.every_steps == 5
        assert planned.evaluation.early_stopping is not None
        assert planned.evaluation.early_stopping.patience == 2

    def test_reserved_keys_are_refused_by_name(self) -> None:
        (problem,) = problems({"deepspeed.config": {"zero_optimization": {"stage": 1}}})
        assert problem.path == "spec.deepspeed.config.zero_optimization.stage"

    def test_everything_that_is_wrong_is_said_at_once(self) -> None:
        changes = {
            "cluster.workers.replicas": 3,
            "training.precision": "fp16",
            "deepspeed.config": {"optimizer": {"type": "Lamb"}},
        }
        assert {problem.path for problem in problems(changes, on={"workers.maxReplicas": 2})} == {
            "spec.cluster.workers.replicas",
            "spec.training.precision",
            "spec.training.globalBatchSize",
            "spec.deepspeed.config.optimizer",
        }

    def test_a_plan_reads_back_from_its_json(self) -> None:
        planned = plan({"cluster.workers": {"replicas": 2, "gpus": 4}, "deepspeed.config": {"a": {"b": [1]}}})
        assert RunPlan.model_validate_json(planned.model_dump_json(by_alias=True)) == planned

    def test_planning_twice_gives_the_same_plan(self) -> None:
        assert plan() == plan()


SIZES = st.sampled_from([1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 48, 60, 64, 96, 100, 128, 1000, 4096, 1_048_576])
REPLICAS = st.sampled_from([1, 1, 2, 3, 4, 8, 1024])
GPUS = st.sampled_from([0, 1, 2, 3, 4, 8, 16])
CONFIGS = st.dictionaries(
    st.sampled_from(["zero_optimization", "stage", "bf16", "optimizer", "x"]),
    st.recursive(
        st.none() | st.integers() | st.just("cpu"), lambda v: st.dictionaries(st.sampled_from(["stage", "x"]), v)
    ),
    max_size=2,
)
JOBS = st.fixed_dictionaries(
    {},
    optional={
        "training.globalBatchSize": SIZES,
        "training.microBatchSize": SIZES | st.just("auto"),
        "training.precision": st.sampled_from(["auto", "bf16", "fp16", "fp32"]),
        "training.learningRate": st.just("auto") | st.floats(1e-9, 1),
        "method.sft.maxSeqLength": st.integers(16, 1_048_576),
        "model.parameters": st.sampled_from(["1M", "0B", "135M", "8B", "1.2T", "999999999999", "99999999999T"]),
        "model.source": st.sampled_from(["hf://org/m", "hf://org/m-7B", "file:///" + "9" * 400 + "B"]),
        "tuning": st.sampled_from([{"full": {}}, {"lora": {"quantization": "int8"}}, {"freeze": {"train": ["*"]}}]),
        "cluster.workers": st.fixed_dictionaries({"replicas": REPLICAS}, optional={"gpus": GPUS}),
        "deepspeed.zeroStage": st.integers(0, 3),
        "deepspeed.offload": st.fixed_dictionaries(
            {}, optional={"optimizer": st.just("cpu"), "parameters": st.just("cpu")}
        ),
        "deepspeed.config": CONFIGS,
    },
)
RUNTIMES = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "workers": st.fixed_dictionaries({"gpus": GPUS}, optional={"maxReplicas": REPLICAS}),
        "precision": st.sampled_from(["auto", "bf16", "fp16", "fp32"]),
        "zeroStage": st.integers(0, 3),
        "storage": st.sampled_from(["file:///runs", "pvc://claim/"]),
    },
)


def _valid(changes: Changes, on: Changes | None) -> tuple[FineTuneJob, FineTuneRuntime | None]:
    """The objects, if the API server would hold them."""
    try:
        return job(changes), None if on is None else runtime(on)
    except ValidationError:
        assume(False)
        raise


def _plan_or_problems(asked: FineTuneJob, pool: FineTuneRuntime | None) -> RunPlan | list[Problem]:
    """Anything else that planning might raise is a fault of ours."""
    try:
        return plan_run(asked, pool)
    except InvalidManifest as refused:
        return refused.problems


@given(JOBS, RUNTIMES)
def test_every_valid_job_is_planned_exactly_or_refused_with_problems(changes: Changes, on: Changes | None) -> None:
    asked, pool = _valid(changes, on)
    planned = _plan_or_problems(asked, pool)
    event("planned" if isinstance(planned, RunPlan) else "refused")
    if not isinstance(planned, RunPlan):
        assert planned
        assert all(problem.path and problem.message for problem in planned)
        return
    batch = planned.batch
    assert batch.micro_batch_size * batch.gradient_accumulation_steps * batch.world_size == batch.global_batch_size
    assert batch.global_batch_size == asked.spec.training.global_batch_size
    assert planned.precision != "auto"
    assert RunPlan.model_validate_json(planned.model_dump_json()) == planned


def model_artifact(**changes: Any) -> Artifact:
    return Artifact.model_validate(
        {"uri": "file:///models/first", "kind": "model", "digest": "d", "bytes": 1} | changes
    )


def test_another_jobs_model_takes_the_place_of_its_name() -> None:
    after = job({"model.source": "job://first"})
    assert plan_run(after).model.source == "job://first"
    assert plan_run(after, artifacts={"first": model_artifact()}).model.source == "file:///models/first"


@pytest.mark.parametrize(
    ("artifacts", "right"),
    [
        ({}, "has written no model yet"),
        ({"first": model_artifact(kind="adapter")}, "give first an output with merge: true"),
    ],
)
def test_another_jobs_model_must_be_there_and_whole(artifacts: dict[str, Artifact], right: str) -> None:
    with pytest.raises(InvalidManifest) as refused:
        plan_run(job({"model.source": "job://first"}), artifacts=artifacts)
    [problem] = refused.value.problems
    assert problem.path == "spec.model.source"
    assert right in problem.message


DISTILL = {"method": {"distill": {"teacher": {"source": "job://first"}}}}


def test_another_jobs_model_can_be_the_teacher() -> None:
    planned = plan_run(job(DISTILL), artifacts={"first": model_artifact()})
    assert planned.method.distill is not None
    assert planned.method.distill.teacher.source == "file:///models/first"
    assert decided(planned)["method.distill.teacher.source"] == ("file:///models/first", "what job://first wrote")


def test_a_teacher_must_be_a_whole_model() -> None:
    with pytest.raises(InvalidManifest) as refused:
        plan_run(job(DISTILL), artifacts={"first": model_artifact(kind="adapter")})
    [problem] = refused.value.problems
    assert problem.path == "spec.method.distill.teacher.source"
    assert "give first an output with merge: true" in problem.message


@pytest.mark.parametrize(
    ("stage", "value", "reason"),
    [
        (2, "held whole in bf16", "each of 8 processes needs its words; zeroStage 3 splits it"),
        (3, "split over the processes in bf16", "zeroStage 3 splits every model"),
    ],
)
def test_the_plan_says_how_much_of_the_teacher_a_process_holds(stage: int, value: str, reason: str) -> None:
    workers = {"cluster.workers": {"replicas": 2, "gpus": 4}}
    planned = plan({**DISTILL, **workers, "deepspeed.zeroStage": stage})
    assert decided(planned)["method.distill.teacher"] == (value, reason)


@pytest.mark.parametrize(("stage", "where"), [(2, "held whole in each training"), (3, "split over the training")])
def test_the_plan_says_how_much_of_the_reference_a_process_holds(stage: int, where: str) -> None:
    ppo = {"method": {"ppo": {"rewards": [{"metric": {"kind": "bleu"}}]}}, "tuning": {"full": {}}}
    workers = {"cluster.workers": {"replicas": 2, "gpus": 4}}
    value, reason = decided(plan({**ppo, **workers, "deepspeed.zeroStage": stage}))["method.ppo"]
    assert value == "reference"
    assert where in reason


def test_a_reward_model_may_be_another_jobs_adapter() -> None:
    rewards = [{"metric": {"kind": "bleu"}}, {"model": {"source": "job://first"}}]
    asked = job({"method": {"grpo": {"rewards": rewards}}})
    planned = plan_run(asked, artifacts={"first": model_artifact(kind="adapter")})
    assert planned.method.grpo is not None
    assert planned.method.grpo.rewards[1].model is not None
    assert planned.method.grpo.rewards[1].model.source == "file:///models/first"


@pytest.mark.parametrize(
    ("sampling", "chosen", "why"),
    [
        ({"numBeams": 4}, "numBeams 4", "biased: the likeliest answers of a search stand in the place of draws"),
        ({"topP": 0.9}, "topP 0.9, topK 0", "biased: unlikely tokens are never drawn"),
        ({"topK": 50}, "topP 1, topK 50", "biased: unlikely tokens are never drawn"),
    ],
)
def test_the_plan_says_what_rollouts_that_are_no_draws_of_the_policy_do_to_it(
    sampling: dict[str, Any], chosen: str, why: str
) -> None:
    def planned(sampling: dict[str, Any]) -> RunPlan:
        return plan({"method": {"ppo": {"rewards": [{"metric": {"kind": "bleu"}}], "sampling": sampling}}})

    value, reason = decided(planned(sampling))["method.ppo.sampling"]
    assert value == chosen
    assert reason.startswith(why)
    assert "method.ppo.sampling" not in decided(planned({"temperature": 0.7}))


def test_the_processes_that_share_a_vllm_are_of_one_worker() -> None:
    def asking(size: int) -> Changes:
        grpo = {"rewards": [{"metric": {"kind": "bleu"}}], "vllm": {"tensorParallelSize": size}}
        return {"method": {"grpo": grpo}, "cluster.workers": {"replicas": 3, "gpus": 8}, "training.globalBatchSize": 48}

    assert plan(asking(4)).method.online is not None
    (problem,) = problems(asking(3))
    assert problem.path == "spec.method.grpo.vllm.tensorParallelSize"
    assert "a worker has 8" in problem.message
    assert "set it to one of 1, 2, 4, 8" in problem.message


@pytest.mark.parametrize(("asked", "micro"), [(4, 4), (3, 2), (64, 32)])
def test_after_out_of_memory_the_micro_batch_is_the_given_one_or_the_next_smaller_divisor(
    asked: int, micro: int
) -> None:
    batch = plan_run(job({"training.globalBatchSize": 32, "training.microBatchSize": 16}), micro_batch_size=asked).batch
    assert (batch.micro_batch_size, batch.gradient_accumulation_steps) == (micro, 32 // micro)


class TestCheckpoints:
    def test_a_job_that_does_not_ask_has_none(self) -> None:
        assert plan().checkpoint is None

    def test_they_are_below_the_runtimes_storage(self) -> None:
        planned = plan({"checkpoint": {"everySteps": 50}}, {"storage": "pvc://runs/all"})
        assert planned.checkpoint is not None
        assert planned.checkpoint.uri == f"{planned.storage}/checkpoints"
        assert decided(planned)["checkpoint"] == (planned.checkpoint.uri, "storage of runtime pool")
        assert (planned.checkpoint.every_steps, planned.checkpoint.keep_last, planned.checkpoint.resume) == (
            50,
            3,
            True,
        )

    def test_a_storage_may_be_a_bucket(self) -> None:
        planned = plan({"checkpoint": {}}, {"storage": "s3://runs/team/"})
        assert planned.checkpoint is not None
        assert planned.checkpoint.uri == "s3://runs/team/default/example/checkpoints"

    def test_without_a_storage_they_are_in_the_runs_own_folder(self) -> None:
        planned = plan({"checkpoint": {"keepLast": 1, "resume": "never"}})
        assert planned.checkpoint is not None
        assert (planned.checkpoint.uri, planned.checkpoint.resume, planned.checkpoint.keep_last) == (None, False, 1)
        assert decided(planned)["checkpoint"][0] == "checkpoints"

    def test_left_to_the_run_they_are_as_often_as_their_cost_allows(self) -> None:
        left_out, asked = plan({"checkpoint": {}}), plan({"checkpoint": {"everySteps": "auto"}})
        assert left_out.checkpoint == asked.checkpoint
        assert asked.checkpoint is not None
        assert asked.checkpoint.every_steps is None
        assert asked.checkpoint.interval == CheckpointInterval(max_overhead=0.01, min_seconds=60, max_seconds=1800)
        value, reason = decided(asked)["checkpoint.everySteps"]
        assert value == "auto"
        assert "1 %" in reason
        assert "1 to 30 minutes" in reason

    def test_what_is_kept_and_what_happens_when_writing_is_slow_are_the_jobs_choice(self) -> None:
        choice = {"whenBehind": "wait", "keepEvery": 500, "keepBest": {"metric": "loss", "mode": "max", "count": 2}}
        planned = plan({"checkpoint": choice | {"quota": "500Gi"}}).checkpoint
        assert planned is not None
        assert planned.quota_bytes == 500 * 2**30
        assert (planned.when_behind, planned.keep_every) == ("wait", 500)
        assert planned.keep_best == KeepBest(metric="loss", mode="max", count=2)

    def test_they_belong_to_the_job_by_its_uid(self) -> None:
        document = job_document({"checkpoint": {}})
        document["metadata"]["uid"] = "1-2-3"
        with_uid, without = plan_run(FineTuneJob.model_validate(document)).checkpoint, plan({"checkpoint": {}})
        assert with_uid is not None
        assert without.checkpoint is not None
        assert (with_uid.job, without.checkpoint.job) == ("1-2-3", f"{without.namespace}/{without.name}")


@pytest.mark.parametrize(("workers", "cpus"), [({"gpus": 8, "cpus": 96}, 12), ({"gpus": 0, "cpus": 4}, 4), ({}, None)])
def test_the_processes_of_a_worker_share_its_cores(workers: dict[str, Any], cpus: float | None) -> None:
    assert plan({"cluster.workers": workers}).workers.cpus_per_process == cpus


class TestSettingsWithoutEffect:
    TEACHER: ClassVar[Changes] = {"teacher": {"source": "hf://a/b"}, "packing": False, "teacherAnswers": {}}
    REWARDS: ClassVar[list[Changes]] = [{"metric": {"kind": "exact-match"}}]

    def idle(self, method: dict[str, Any]) -> set[str]:
        found = decided(plan({"method": method}))
        return {field.removeprefix("method.") for field, (_, reason) in found.items() if "has no effect" in reason}

    def test_at_alpha_1_the_distance_to_the_teacher_is_not_asked(self) -> None:
        settings = {"alpha": 1, "divergence": "jsd", "beta": 0.3, "temperature": 4.0}
        assert self.idle({"distill": self.TEACHER | settings}) == {
            "distill.divergence",
            "distill.beta",
            "distill.temperature",
        }
        assert self.idle({"distill": self.TEACHER | settings | {"alpha": 0.9}}) == set()

    def test_the_likeliest_token_is_in_any_top_p(self) -> None:
        for temperature, idle in ((0.0, {"distill.teacherAnswers.topP"}), (1.0, set())):
            answers = {"teacherAnswers": {"topP": 0.5, "temperature": temperature}}
            assert self.idle({"distill": self.TEACHER | answers}) == idle

    def test_a_horizon_is_for_a_target(self) -> None:
        for kl, idle in (
            ({"horizon": 5000}, {"ppo.kl.horizon"}),
            ({"horizon": 5000, "target": 3.0}, set()),
            ({}, set()),
        ):
            assert self.idle({"ppo": {"rewards": self.REWARDS, "kl": kl}}) == idle

    def test_dropout_where_the_policy_writes(self) -> None:
        lora = {"tuning": {"lora": {"dropout": 0.1}}}
        method = {"method": {"grpo": {"rewards": self.REWARDS}}}
        _, reason = decided(plan(method | lora))["tuning.lora.dropout"]
        assert "has no effect" in reason
        assert "tuning.lora.dropout" not in decided(plan(lora))

    def test_there_is_nobody_to_wait_for_where_the_number_of_workers_is_fixed(self) -> None:
        field, seconds = "cluster.workers.resizeAfterSeconds", {"replicas": 2, "resizeAfterSeconds": 60}
        for workers in (seconds, seconds | {"minReplicas": 2}):
            _, reason = decided(plan({"cluster.workers": workers, "checkpoint": {}}))[field]
            assert "has no effect" in reason
        for workers in (seconds | {"minReplicas": 1}, {"replicas": 2}):
            assert field not in decided(plan({"cluster.workers": workers, "checkpoint": {}}))

    def test_a_limit_that_nobody_asked_for_is_told(self) -> None:
        limits = {"ppo": "3", "grpo": None}
        for method, limit in limits.items():
            found = decided(plan({"method": {method: {"rewards": self.REWARDS}}})).get(f"method.{method}.maxKl")
            assert (found and found[0]) == limit
