"""Planning: a job, and the runtime it names, become a RunPlan. Pure: no clock, no disk, no cluster.

Called by the reconcile pass and by the CLI. Whatever `auto` or a left-out field becomes is recorded in the plan with
its reason, and what cannot be is refused here, before any resource is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping

from finetune_api.failures import Problem
from finetune_api.job import FineTuneJob
from finetune_api.learning_rate import auto_learning_rate, parameters_in_name, parse_parameters
from finetune_api.plan import (
    BatchPlan,
    CheckpointInterval,
    CheckpointPlan,
    Decision,
    DeepSpeedPlan,
    Device,
    ElasticPlan,
    EvaluationPlan,
    LearningRatePlan,
    OptimizationPlan,
    RunPlan,
    WorkersPlan,
)
from finetune_api.problems import InvalidManifest, shorten
from finetune_api.progress import Artifact
from finetune_api.runtime import FineTuneRuntime, FineTuneRuntimeSpec
from finetune_api.spec import (
    Distill,
    FineTuneJobSpec,
    Grpo,
    KlPenalty,
    Method,
    Model,
    Ppo,
    Precision,
    Quantization,
    Workers,
)
from finetune_api.spec.fields import memory_bytes
from finetune_api.uris import Scheme, parse_uri
from finetune_operator.zero import PARTITION_KEYS, deepspeed_config, reserved_key_problems

__all__ = ["plan_run", "storage_of"]

_TOKENS_PER_MICRO_BATCH = {Device.CPU: 2048, Device.CUDA: 16384}
"""What `microBatchSize: auto` fills: enough to keep the device busy, small enough to leave memory for the model."""

_IDLE = "has no effect"
_INTERVAL = CheckpointInterval(max_overhead=0.01, min_seconds=60, max_seconds=1800)
_INTERVAL_REASON = (
    "saving stops training for no more than 1 % of the time, as measured; checkpoints are 1 to 30 minutes apart"
)


def plan_run(
    job: FineTuneJob,
    runtime: FineTuneRuntime | None = None,
    *,
    artifacts: Mapping[str, Artifact] | None = None,
    micro_batch_size: int | None = None,
) -> RunPlan:
    """Decide everything that `job` leaves open. `runtime` is the one that the job names, or None when it names none.

    `artifacts` are the models that other jobs wrote, by the jobs' names, for a source such as job://name; without
    them such a source stays as it is. `micro_batch_size` takes the place of the job's own: an attempt before this one
    ran out of memory. Raises InvalidManifest with a Problem for each thing that cannot be.
    """
    return _Planner(job, runtime, artifacts, micro_batch_size).plan()


def storage_of(job: FineTuneJob, runtime: FineTuneRuntimeSpec) -> str | None:
    """The folder of a job's runs below the runtime's storage: <storage>/<namespace>/<name>."""
    if runtime.storage is None:
        return None
    return f"{runtime.storage.rstrip('/')}/{job.metadata.namespace}/{job.metadata.name}"


class _Planner:
    """One planning: collects decisions and problems as it goes down the list."""

    def __init__(
        self,
        job: FineTuneJob,
        runtime: FineTuneRuntime | None,
        artifacts: Mapping[str, Artifact] | None,
        micro_batch_size: int | None,
    ) -> None:
        self.job = job
        self.artifacts = artifacts
        self.micro_batch_size = micro_batch_size
        self.spec: FineTuneJobSpec = job.spec
        self.runtime = runtime.spec if runtime else FineTuneRuntimeSpec()
        self.decisions: list[Decision] = []
        self.problems: list[Problem] = []

    def plan(self) -> RunPlan:
        spec = self.spec
        model = self._model()
        workers = self._workers()
        precision = self._precision(workers)
        zero_stage = self._zero_stage(workers)
        method = self._method(workers, precision, zero_stage)
        batch = self._batch(workers)
        checkpoint = self._checkpoint()
        self.problems += reserved_key_problems(spec.deepspeed.config)
        if self.problems:
            raise InvalidManifest(self.problems)
        return RunPlan(
            name=self.job.metadata.name,
            namespace=self.job.metadata.namespace,
            storage=storage_of(self.job, self.runtime),
            model=model,
            data=spec.data,
            method=method,
            tuning=spec.tuning,
            workers=workers,
            batch=batch,
            precision=precision,
            optimization=self._optimization(),
            evaluation=EvaluationPlan(
                every_steps=spec.training.eval_every_steps,
                early_stopping=spec.training.early_stopping,
                generation=spec.training.generation,
            ),
            deepspeed=self._deepspeed(workers, batch, precision, zero_stage),
            checkpoint=checkpoint,
            outputs=spec.outputs,
            tracking=spec.tracking,
            decisions=self.decisions,
        )

    def _model(self) -> Model:
        """The model's block, with the place of another job's model in the place of its name."""
        model = self.spec.model
        return model.model_copy(update={"source": self._source("model.source", model.source)})

    def _method(self, workers: WorkersPlan, precision: Precision, zero_stage: int) -> Method:
        """The method's block, with places in the place of other jobs' names."""
        method = self.spec.method
        if method.distill is not None:
            return method.model_copy(update={"distill": self._distill(method.distill, workers, precision, zero_stage)})
        if method.online is not None:
            return method.model_copy(update={method.chosen: self._online(method.online, method.chosen, workers)})
        return method

    def _distill(self, distill: Distill, workers: WorkersPlan, precision: Precision, zero_stage: int) -> Distill:
        field, teacher = "method.distill.teacher", distill.teacher
        self._tell_of_idle(distill)
        if zero_stage == 3:
            self._decide(field, f"split over the processes in {precision}", "zeroStage 3 splits every model")
        else:
            processes = "the process" if workers.world_size == 1 else f"each of {workers.world_size} processes"
            self._decide(field, f"held whole in {precision}", f"{processes} needs its words; zeroStage 3 splits it")
        source = self._source(f"{field}.source", teacher.source)
        return distill.model_copy(update={"teacher": teacher.model_copy(update={"source": source})})

    def _tell_of_idle(self, distill: Distill) -> None:
        """Settings without an effect."""
        usual = Distill.model_fields
        for name in ("divergence", "beta", "temperature") if distill.alpha == 1 else ():
            if (value := getattr(distill, name)) != usual[name].default:
                self._decide(f"method.distill.{name}", value, f"{_IDLE}: alpha 1 learns from the texts alone")
        answers = distill.teacher_answers
        if answers is not None and answers.temperature == 0 and answers.top_p < 1:
            why = f"{_IDLE}: temperature 0 takes the likeliest token"
            self._decide("method.distill.teacherAnswers.topP", answers.top_p, why)

    def _online(self, online: Ppo | Grpo, name: str, workers: WorkersPlan) -> Ppo | Grpo:
        self._check_sampling(online, f"method.{name}")
        self._check_vllm(online, f"method.{name}.vllm", workers.processes_per_worker)
        rewards = []
        for index, reward in enumerate(online.rewards):
            if reward.model is not None:
                field = f"method.{name}.rewards[{index}].model.source"
                source = self._source(field, reward.model.source, whole=False)
                model = reward.model.model_copy(update={"source": source})
                rewards.append(reward.model_copy(update={"model": model}))
            else:
                rewards.append(reward)
        if isinstance(online, Ppo) and online.kl.target is None and online.kl.horizon != KlPenalty().horizon:
            self._decide("method.ppo.kl.horizon", online.kl.horizon, f"{_IDLE}: without kl.target the price stays")
        lora = self.spec.tuning.lora
        if lora is not None and lora.dropout:
            self._decide("tuning.lora.dropout", lora.dropout, f"{_IDLE}: what learns must be what wrote the rollouts")
        if online.max_kl is None and online.kl_limit:
            self._decide(f"method.{name}.maxKl", f"{online.kl_limit:g}", "nats per token; 0 would be no limit")
        return online.model_copy(update={"rewards": rewards})

    def _check_sampling(self, online: Ppo | Grpo, field: str) -> None:
        sampling, group = online.sampling, online.rollouts_per_prompt
        beams, path = sampling.num_beams, f"{field}.sampling.numBeams"
        if beams > 1 and online.vllm is not None:
            self._refuse(path, beams, "is searched by the trainers alone; remove vllm, or set it to 1")
        if 1 < beams < group:
            self._refuse(path, beams, f"gives no {group} answers, of which groupSize makes a group; raise it")
        if beams > 1 and (sampling.top_p < 1 or sampling.top_k > 0):
            self._refuse(path, beams, "draws nothing that topP and topK could restrict; remove them, or set it to 1")
        if sampling.bias is not None:
            chosen = f"numBeams {beams}" if beams > 1 else f"topP {sampling.top_p:g}, topK {sampling.top_k}"
            self._decide(f"{field}.sampling", chosen, f"biased: {sampling.bias}")

    def _check_vllm(self, online: Ppo | Grpo, field: str, processes_per_worker: int) -> None:
        size = online.vllm.tensor_parallel_size if online.vllm is not None else 1
        if processes_per_worker % size:
            rest = f"one of {', '.join(map(str, _divisors(processes_per_worker)))}" if processes_per_worker > 1 else "1"
            what = f"a worker has {processes_per_worker}, of which as many share a vLLM; set it to {rest}"
            self._refuse(f"{field}.tensorParallelSize", size, f"must divide the training processes of a worker: {what}")

    def _source(self, field: str, source: str, whole: bool = True) -> str:
        """Where a model is, if `source` names the job that wrote it. `whole`: an adapter does not do."""
        uri = parse_uri(source)
        if uri.scheme is not Scheme.JOB or self.artifacts is None:
            return source
        artifact = self.artifacts.get(uri.authority)
        if artifact is None:
            self._refuse(field, source, "names a job that has written no model yet")
            return source
        if whole and artifact.kind != "model":
            message = f"wrote an adapter and not a whole model; give {uri.authority} an output with merge: true"
            self._refuse(field, source, message)
            return source
        self._decide(field, artifact.uri, f"what {source} wrote")
        return artifact.uri

    def _workers(self) -> WorkersPlan:
        asked, pool = self.spec.cluster.workers, self.runtime.workers
        if pool.max_replicas is not None and asked.replicas > pool.max_replicas:
            self._refuse(
                "cluster.workers.replicas",
                asked.replicas,
                f"is more than runtime {self._runtime_name()} allows; ask for at most {pool.max_replicas}",
            )
        gpus = asked.gpus if asked.gpus is not None else pool.gpus
        if asked.gpus is None:
            origin = f"runtime {self._runtime_name()}" if self.spec.runtime_ref else "no runtime named"
            self._decide("cluster.workers.gpus", gpus, origin)
        return WorkersPlan(
            replicas=asked.replicas,
            gpus=gpus,
            cpus=asked.cpus if asked.cpus is not None else pool.cpus,
            world_size=asked.replicas * max(gpus, 1),
            device=Device.CUDA if gpus else Device.CPU,
            elastic=self._elastic(max(gpus, 1)),
        )

    def _elastic(self, processes_per_worker: int) -> ElasticPlan | None:
        """The numbers of workers below the full one over whose processes the global batch can be spread evenly."""
        asked, total = self.spec.cluster.workers, self.spec.training.global_batch_size
        if asked.min_replicas is None or asked.min_replicas == asked.replicas:
            if (seconds := asked.resize_after_seconds) != Workers().resize_after_seconds:
                why = f"{_IDLE}: without a minReplicas below replicas the number of workers stays"
                self._decide("cluster.workers.resizeAfterSeconds", seconds, why)
            return None
        fewer = [n for n in range(asked.replicas - 1, 0, -1) if total % (n * processes_per_worker) == 0]
        allowed = [n for n in fewer if n >= asked.min_replicas]
        field = "cluster.workers.minReplicas"
        if not allowed:
            instead = f"set it to {fewer[0]}" if fewer else "remove it"
            why = f"no number of workers from it to {asked.replicas - 1} divides globalBatchSize {total} evenly"
            self._refuse(field, asked.min_replicas, f"{why}; {instead}")
        hang = self.spec.failure_policy.hang_timeout_seconds
        if asked.resize_after_seconds >= hang:
            message = f"must be below failurePolicy.hangTimeoutSeconds ({hang}): waiting would be taken for a hang"
            self._refuse("cluster.workers.resizeAfterSeconds", asked.resize_after_seconds, message)
        config = self.spec.deepspeed.config.get("zero_optimization")
        zero = config if isinstance(config, Mapping) else {}
        for key in sorted(PARTITION_KEYS & zero.keys()):
            message = "fixes how workers are partitioned, and minReplicas lets their number change; remove one of them"
            self._refuse(f"deepspeed.config.zero_optimization.{key}", zero[key], message)
        self._decide(field, ", ".join(map(str, allowed)), f"workers that can share {total} sequences evenly")
        return ElasticPlan(replicas=allowed, resize_after_seconds=asked.resize_after_seconds)

    def _precision(self, workers: WorkersPlan) -> Precision:
        asked = self.spec.training.precision
        if asked is Precision.AUTO:
            asked = self.runtime.precision
            if asked is not Precision.AUTO:
                self._decide("training.precision", asked, f"runtime {self._runtime_name()}")
        if asked is Precision.AUTO:
            asked = Precision.BF16 if workers.gpus else Precision.FP32
            self._decide("training.precision", asked, f"training runs on {workers.device}")
        if asked is Precision.FP16 and workers.device is Device.CPU:
            self._refuse("training.precision", "fp16", "needs a GPU; set bf16, fp32 or auto, or cluster.workers.gpus")
        return asked

    def _zero_stage(self, workers: WorkersPlan) -> int:
        spec = self.spec
        asked, lora = spec.deepspeed, spec.tuning.lora
        stage, reason = asked.zero_stage, ""
        if stage is None and self.runtime.zero_stage is not None:
            stage, reason = self.runtime.zero_stage, f"runtime {self._runtime_name()}"
        elif stage is None and asked.offload.optimizer == "cpu":
            stage, reason = 2, "optimizer states go to the host's memory"
        elif stage is None and workers.world_size == 1:
            stage, reason = 0, "one training process has nothing to split"
        elif stage is None and lora is not None:
            stage, reason = 2, "adapters are small; splitting the frozen base would only cost communication"
        elif stage is None:
            stage, reason = 3, "all training state is split over the workers"
        assert stage is not None
        if reason:
            self._decide("deepspeed.zeroStage", stage, reason)
        self._check_stage(stage)
        return stage

    def _check_stage(self, stage: int) -> None:
        """What the rules of the spec cannot see: the stage may have come from the runtime."""
        spec = self.spec
        if stage == 3 and spec.tuning.lora and spec.tuning.lora.quantization is not Quantization.NONE:
            self._refuse("deepspeed.zeroStage", stage, "cannot split a quantized base; set it to 2 or less")
        if stage == 0 and spec.deepspeed.offload.optimizer == "cpu":
            self._refuse("deepspeed.offload.optimizer", "cpu", "needs zeroStage 1, 2 or 3; set deepspeed.zeroStage")
        online = spec.method.online
        if online is not None and online.needs_reference and spec.tuning.lora is None:
            where = "split over the training processes" if stage == 3 else "held whole in each training process"
            what = f"the model before training is {where}, beside its part of what learns"
            self._decide(f"method.{spec.method.chosen}", "reference", what)

    def _batch(self, workers: WorkersPlan) -> BatchPlan:
        total, world = self.spec.training.global_batch_size, workers.world_size
        per_process, rest = divmod(total, world)
        if rest:
            nearest = max(1, round(total / world)) * world
            self._refuse(
                "training.globalBatchSize",
                total,
                f"must be a multiple of the {world} training processes; set it to {nearest}",
            )
            per_process = max(per_process, 1)
        asked = self.spec.training.micro_batch_size
        if self.micro_batch_size is not None:
            micro = max(d for d in _divisors(per_process) if d <= max(1, self.micro_batch_size))
            self._decide("training.microBatchSize", micro, "an attempt with a larger one ran out of memory")
        elif not isinstance(asked, int):
            micro = self._auto_micro_batch(per_process, workers.device)
        else:
            micro = asked
            if not rest and per_process % micro:
                self._refuse(
                    "training.microBatchSize",
                    micro,
                    f"must divide the {per_process} sequences that each of {world} training processes has per step; "
                    f"set it to one of {', '.join(map(str, _divisors(per_process)))}",
                )
        return BatchPlan(
            global_batch_size=total,
            micro_batch_size=micro,
            gradient_accumulation_steps=max(1, per_process // micro),
            world_size=world,
        )

    def _auto_micro_batch(self, per_process: int, device: Device) -> int:
        method, budget = self.spec.method, _TOKENS_PER_MICRO_BATCH[device]
        length = method.settings.max_seq_length * method.rows_per_sequence
        micro = max((d for d in _divisors(per_process) if d * length <= budget), default=1)
        self._decide(
            "training.microBatchSize",
            micro,
            f"{method.counted} of {length} tokens, about {budget} tokens a pass on {device}",
        )
        return micro

    def _optimization(self) -> OptimizationPlan:
        training = self.spec.training
        return OptimizationPlan(
            epochs=training.epochs,
            max_steps=training.max_steps,
            learning_rate=self._learning_rate(),
            adamw=training.optimizer,
            max_grad_norm=training.max_grad_norm,
            seed=training.seed,
            activation_checkpointing=training.activation_checkpointing,
            log_every_steps=training.log_every_steps,
        )

    def _learning_rate(self) -> LearningRatePlan:
        training, model = self.spec.training, self.spec.model
        peak, reason = None, "auto: follows from the model's size, which its files will tell"
        if training.learning_rate != "auto":
            peak, reason = training.learning_rate, "set by the job"
        else:
            size = parse_parameters(model.parameters) if model.parameters else parameters_in_name(model.source)
            if size is not None:
                peak, reason = auto_learning_rate(size, self.spec.tuning, self.spec.method)
            self._decide("training.learningRate", "auto" if peak is None else f"{peak:g}", reason)
        return LearningRatePlan(
            peak=peak,
            reason=reason,
            schedule=training.schedule,
            warmup_fraction=training.warmup_fraction,
            min_fraction=training.min_learning_rate_fraction,
        )

    def _deepspeed(self, workers: WorkersPlan, batch: BatchPlan, precision: Precision, stage: int) -> DeepSpeedPlan:
        asked = self.spec.deepspeed
        if workers.world_size == 1 and stage == 0 and not asked.config:
            return DeepSpeedPlan(engine="torch", zero_stage=0, config={})
        config = deepspeed_config(asked, stage, batch, precision, self.spec.training.max_grad_norm)
        return DeepSpeedPlan(engine="deepspeed", zero_stage=stage, config=config)

    def _checkpoint(self) -> CheckpointPlan | None:
        """Below the runtime's storage, or in the run's own folder."""
        asked, metadata = self.spec.checkpoint, self.job.metadata
        if asked is None:
            return None
        storage = storage_of(self.job, self.runtime)
        uri = f"{storage}/checkpoints" if storage is not None else None
        if uri is not None:
            self._decide("checkpoint", uri, f"storage of runtime {self._runtime_name()}")
        else:
            self._decide("checkpoint", "checkpoints", "in the run's own folder: no runtime names a storage")
        interval = None
        if asked.every_steps == "auto":
            interval = _INTERVAL
            self._decide("checkpoint.everySteps", "auto", _INTERVAL_REASON)
        if asked.keep_best is not None and asked.keep_best.metric.startswith("eval_") and not self.spec.data.eval:
            self._refuse(
                "checkpoint.keepBest.metric",
                asked.keep_best.metric,
                "is a figure of evaluations, and there are none; set spec.data.eval",
            )
        return CheckpointPlan(
            uri=uri,
            job=str((metadata.model_extra or {}).get("uid") or f"{metadata.namespace}/{metadata.name}"),
            every_steps=None if asked.every_steps == "auto" else asked.every_steps,
            interval=interval,
            when_behind=asked.when_behind,
            keep_last=asked.keep_last,
            keep_every=asked.keep_every,
            keep_best=asked.keep_best,
            quota_bytes=None if asked.quota is None else memory_bytes(asked.quota),
            resume=asked.resume == "auto",
        )

    def _decide(self, field: str, value: object, reason: str) -> None:
        self.decisions.append(Decision(field=f"spec.{field}", value=str(value), reason=reason))

    def _refuse(self, field: str, value: object, message: str) -> None:
        self.problems.append(Problem(path=f"spec.{field}", value=shorten(value), message=message))

    def _runtime_name(self) -> str:
        return self.spec.runtime_ref.name if self.spec.runtime_ref else "(none)"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
