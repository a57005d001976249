"""Every cross-field rule of the contract with an object that breaks it: the table behind "one verdict".

A rule that is added to a model without a row here fails `test_every_rule_has_a_row`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from finetune_api.base import Contract, Rule
from finetune_api.job import FineTuneJob
from finetune_api.runtime import FineTuneRuntime
from tests.factories import ABSENT

__all__ = ["RULE_ROWS", "UPDATE_ROWS", "RuleRow", "UpdateRow", "rules_of_the_contract"]


@dataclass(frozen=True)
class RuleRow:
    """Changes to the default job that break one rule.

    `owner` is the model that states it, `path` the field that both judges name.
    """

    owner: str
    message: str
    path: str
    changes: Mapping[str, Any]

    def __str__(self) -> str:
        return f"{self.owner}: {', '.join(self.changes)}"


@dataclass(frozen=True)
class UpdateRow:
    """A merge patch of the spec of a stored job (the default one with `before`) that breaks one rule."""

    owner: str
    message: str
    path: str
    change: Mapping[str, Any]
    before: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.path} by {dict(self.change)}"


def rules_of_the_contract() -> Iterator[tuple[str, Rule]]:
    """Each rule of each model that a FineTuneJob or FineTuneRuntime is made of, with the model's name."""
    waiting: list[type[Contract]] = [FineTuneJob, FineTuneRuntime]
    seen: set[type[Contract]] = set()
    while waiting:
        model = waiting.pop()
        if model in seen:
            continue
        seen.add(model)
        yield from ((model.__name__, rule) for rule in model.rules)
        waiting += [child for info in model.model_fields.values() for child in _models_in(info.annotation)]


def _models_in(annotation: Any) -> Iterator[type[Contract]]:
    if isinstance(annotation, type) and not get_args(annotation):
        if issubclass(annotation, Contract):
            yield annotation
        return
    for part in get_args(annotation):
        yield from _models_in(part)


_EXACTLY_ONE_TUNING = "set exactly one of: full, lora, freeze"
_EXACTLY_ONE_METHOD = "set exactly one of: sft, distill, reward, dpo, kto, orpo, ppo, grpo"
_EPOCHS_OR_STEPS = "set exactly one of: epochs, maxSteps"
_MICRO_BATCH = "globalBatchSize must be a multiple of microBatchSize, which is a whole number from 1 to 65536, or auto"
_BATCH = "training.globalBatchSize must be a multiple of microBatchSize × workers.replicas × workers.gpus"
_NO_EVAL = "evaluation is asked for and data.eval is empty; add a source to data.eval"
_FILE = "file:///data/rows.jsonl"
_EXACT_MATCH = {"metric": {"kind": "exact-match"}}

RULE_ROWS = [
    RuleRow(
        "Model",
        "revision is only for an hf:// source; remove it",
        "spec.model.revision",
        {"model": {"source": "file:///models/m", "revision": "main"}},
    ),
    RuleRow(
        "DataSource",
        "split is only for an hf:// source; name the file instead",
        "spec.data.train[0].split",
        {"data.train": [{"source": _FILE, "split": "train"}]},
    ),
    RuleRow(
        "DataSource",
        "revision is only for an hf:// source; remove it",
        "spec.data.eval[1].revision",
        {"data.eval": [{"source": _FILE}, {"source": _FILE, "revision": "main"}]},
    ),
    *(
        RuleRow(owner, message, f"spec.method.grpo.rewards[0]{path}", {"method": {"grpo": {"rewards": [reward]}}})
        for owner, message, path, reward in (
            ("RewardSource", "set exactly one of: function, metric, http, model", "", {"weight": 2.0}),
            (
                "RewardSource",
                "weight 0 has no effect; remove the reward, or give it another weight",
                ".weight",
                {"weight": 0.0, "metric": {"kind": "bleu"}},
            ),
            (
                "MetricReward",
                "kind regex needs pattern; set it",
                ".metric.pattern",
                {"metric": {"kind": "regex"}},
            ),
            (
                "MetricReward",
                "kind regex compares with no column; remove it",
                ".metric.column",
                {"metric": {"kind": "regex", "pattern": "7", "column": "answer"}},
            ),
            (
                "ModelReward",
                "revision is only for an hf:// source; remove it",
                ".model.revision",
                {"model": {"source": "job://reward", "revision": "main"}},
            ),
        )
    ),
    *(
        RuleRow(
            owner,
            "two rewards have the same name; rename one",
            f"spec.method.{owner.lower()}.rewards",
            {"method": {owner.lower(): {"rewards": [{"name": "one", "metric": {"kind": "bleu"}}] * 2}}},
        )
        for owner in ("Ppo", "Grpo")
    ),
    RuleRow(
        "Teacher",
        "revision is only for an hf:// source; remove it",
        "spec.method.distill.teacher.revision",
        {"method": {"distill": {"teacher": {"source": "file:///models/t", "revision": "main"}}}},
    ),
    RuleRow(
        "Distill",
        "beta is only for divergence jsd; remove it",
        "spec.method.distill.beta",
        {"method": {"distill": {"teacher": {"source": "file:///models/t"}, "beta": 0.5}}},
    ),
    *(
        RuleRow(
            "Distill",
            message,
            f"spec.method.distill.{field}",
            {"method": {"distill": {"teacher": {"source": "file:///models/t"}, **distill}}},
        )
        for field, message, distill in (
            (
                "alpha",
                "alpha 1 learns nothing from the teacher; lower it, set teacherAnswers, or use method.sft",
                {"alpha": 1},
            ),
            (
                "packing",
                "teacherAnswers needs packing false, since steps are counted before the answers are written",
                {"teacherAnswers": {}},
            ),
            (
                "lossOn",
                "teacherAnswers trains on the answers that are written alone; set lossOn to assistant",
                {"teacherAnswers": {}, "packing": False, "lossOn": "all"},
            ),
        )
    ),
    *(
        RuleRow(
            "FineTuneJobSpec",
            "format text has no answers that a teacher could write anew; use another format, or remove teacherAnswers",
            f"spec.data.{part}",
            {
                "method": {
                    "distill": {"teacher": {"source": "file:///m"}, "packing": False, "teacherAnswers": {}, "alpha": 1}
                },
                f"data.{part}": [{"source": _FILE, "format": "text"}],
            },
        )
        for part in ("train", "eval")
    ),
    RuleRow("Method", _EXACTLY_ONE_METHOD, "spec.method", {"method": {}}),
    RuleRow("Method", _EXACTLY_ONE_METHOD, "spec.method", {"method": {"sft": {}, "dpo": {}}}),
    RuleRow(
        "Dpo",
        "labelSmoothing is only for lossType sigmoid; set it to 0",
        "spec.method.dpo.labelSmoothing",
        {"method": {"dpo": {"lossType": "ipo", "labelSmoothing": 0.1}}},
    ),
    *(
        RuleRow(
            "FineTuneJobSpec",
            "reward, dpo and orpo learn from format preference, kto from unpaired-preference, ppo and grpo from prompt,"
            " sft and distill from the others; set format to auto or to one that the method learns from",
            f"spec.data.{part}",
            {"method": {method: settings}, f"data.{part}": [{"source": _FILE}, {"source": _FILE, "format": form}]},
        )
        for part, method, settings, form in (
            ("train", "dpo", {}, "messages"),
            ("train", "sft", {}, "preference"),
            ("eval", "sft", {}, "unpaired-preference"),
            ("eval", "sft", {}, "prompt"),
            ("eval", "kto", {}, "preference"),
            ("train", "reward", {}, "unpaired-preference"),
            ("train", "dpo", {}, "prompt"),
            ("train", "grpo", {"rewards": [_EXACT_MATCH]}, "prompt-completion"),
            ("eval", "ppo", {"rewards": [_EXACT_MATCH]}, "preference"),
        )
    ),
    RuleRow(
        "FineTuneJobSpec",
        "a reward model writes no answers; remove generation",
        "spec.training.generation",
        {"method": {"reward": {}}, "training.generation": {}},
    ),
    RuleRow(
        "FineTuneJobSpec",
        "the adapter of a reward model is not merged, its head is beside it; remove merge from outputs",
        "spec.outputs",
        {"method": {"reward": {}}, "outputs": [{"to": "file:///out", "merge": True}]},
    ),
    RuleRow("Tuning", _EXACTLY_ONE_TUNING, "spec.tuning", {"tuning": {}}),
    RuleRow("Tuning", _EXACTLY_ONE_TUNING, "spec.tuning", {"tuning": {"full": {}, "lora": {}}}),
    RuleRow(
        "Lora",
        "all-linear stands alone; remove the other names or all-linear",
        "spec.tuning.lora.targetModules",
        {"tuning.lora.targetModules": ["all-linear", "q_proj"]},
    ),
    RuleRow(
        "Freeze",
        "two steps of unfreeze have the same `at`; join them",
        "spec.tuning.freeze.unfreeze",
        {
            "tuning": {
                "freeze": {
                    "train": ["a"],
                    "unfreeze": [{"at": 0.5, "layers": ["b"]}, {"at": 0.5, "layers": ["c"]}],
                }
            }
        },
    ),
    RuleRow("Training", _EPOCHS_OR_STEPS, "spec.training", {"training.epochs": ABSENT}),
    RuleRow("Training", _EPOCHS_OR_STEPS, "spec.training", {"training.maxSteps": 10}),
    RuleRow("Training", _MICRO_BATCH, "spec.training.globalBatchSize", {"training.microBatchSize": 5}),
    RuleRow(
        "DeepSpeed",
        "offload.optimizer needs zeroStage 1, 2 or 3",
        "spec.deepspeed.offload",
        {"deepspeed": {"zeroStage": 0, "offload": {"optimizer": "cpu"}}},
    ),
    RuleRow(
        "DeepSpeed",
        "offload.parameters needs zeroStage 3",
        "spec.deepspeed.offload",
        {"deepspeed": {"zeroStage": 2, "offload": {"parameters": "cpu"}}},
    ),
    RuleRow(
        "DeepSpeed",
        "offload.parameters needs zeroStage 3",
        "spec.deepspeed.offload",
        {"deepspeed": {"offload": {"parameters": "cpu"}}},
    ),
    RuleRow(
        "FineTuneJobSpec",
        _BATCH,
        "spec.training.globalBatchSize",
        {"training.microBatchSize": 4, "cluster.workers": {"replicas": 2, "gpus": 8}},
    ),
    RuleRow(
        "FineTuneJobSpec",
        _BATCH,
        "spec.training.globalBatchSize",
        {"training.microBatchSize": 4, "cluster.workers": {"replicas": 3, "gpus": 0}},
    ),
    RuleRow(
        "Workers",
        "minReplicas is more than replicas, which is the most; lower it",
        "spec.cluster.workers.minReplicas",
        {"cluster.workers": {"replicas": 2, "minReplicas": 3}, "checkpoint": {}},
    ),
    *(
        RuleRow(
            "FineTuneJobSpec",
            "minReplicas needs a checkpoint to go on from; add a checkpoint block (resume: auto), or remove it",
            "spec.cluster.workers.minReplicas",
            {"cluster.workers": {"replicas": 2, "minReplicas": 1}} | checkpoint,
        )
        for checkpoint in ({}, {"checkpoint": {"resume": "never"}})
    ),
    RuleRow(
        "FineTuneJobSpec",
        "a quantized base cannot be split by zeroStage 3; set deepspeed.zeroStage to 2 or less",
        "spec.deepspeed.zeroStage",
        {"tuning.lora.quantization": "nf4", "deepspeed.zeroStage": 3},
    ),
    *(
        RuleRow(
            "FineTuneJobSpec",
            "vllm needs whole weights, and a quantized base has none; remove it, or the quantization",
            "spec.tuning.lora.quantization",
            {
                "method": {method: {"rewards": [_EXACT_MATCH], "vllm": {}}},
                "tuning.lora.quantization": quantization,
                "data.train": [{"source": _FILE}],
            },
        )
        for method, quantization in (("ppo", "int8"), ("grpo", "nf4"))
    ),
    RuleRow(
        "FineTuneJobSpec",
        "merge is only for tuning.lora; remove it from outputs",
        "spec.outputs",
        {"tuning": {"full": {}}, "outputs": [{"to": "file:///out"}, {"to": "pvc://c/out", "merge": True}]},
    ),
    RuleRow(
        "EnvVar",
        "names that start with FINETUNE_ or RAY_ are set by the operator; choose another",
        "spec.cluster.pods.env[0].name",
        {"cluster.pods.env": [{"name": "RAY_ADDRESS", "value": "auto"}]},
    ),
    *(
        RuleRow(
            "EnvVar",
            "set exactly one of: value, secret, configMap",
            "spec.cluster.pods.env[0]",
            {"cluster.pods.env": [{"name": "TOKEN"} | sources]},
        )
        for sources in ({}, {"value": "x", "secret": {"name": "s", "key": "k"}})
    ),
    *(
        RuleRow(
            "Volume",
            "set exactly one of: claim, secret, configMap",
            "spec.cluster.pods.volumes[0]",
            {"cluster.pods.volumes": [{"mountPath": "/mnt/extra"} | sources]},
        )
        for sources in ({}, {"claim": "a", "configMap": "b"})
    ),
    RuleRow(
        "Toleration",
        "a toleration without a key needs operator Exists",
        "spec.cluster.pods.tolerations[0].operator",
        {"cluster.pods.tolerations": [{"effect": "NoSchedule"}]},
    ),
    *(
        RuleRow(
            kind.capitalize(),
            "sampling.maxNewTokens must leave room for a prompt; raise maxSeqLength or lower it",
            f"spec.method.{kind}.maxSeqLength",
            {"method": {kind: {"rewards": [_EXACT_MATCH], "maxSeqLength": 64, "sampling": {"maxNewTokens": 64}}}},
        )
        for kind in ("ppo", "grpo")
    ),
    RuleRow(
        "Ppo",
        "dualClip must be above 1 + clipHigh; raise it, or remove it",
        "spec.method.ppo.dualClip",
        {"method": {"ppo": {"rewards": [_EXACT_MATCH], "dualClip": 1.25, "clipHigh": 0.25}}},
    ),
    RuleRow(
        "Ppo",
        "beginsAs reward needs one model among rewards, and one only; add it, or set beginsAs to policy",
        "spec.method.ppo.critic.beginsAs",
        {"method": {"ppo": {"rewards": [_EXACT_MATCH], "critic": {"beginsAs": "reward"}}}},
    ),
    RuleRow(
        "KlPenalty",
        "a coefficient of 0 can never be raised to reach the target; set it above 0",
        "spec.method.ppo.kl.coefficient",
        {"method": {"ppo": {"rewards": [_EXACT_MATCH], "kl": {"coefficient": 0.0, "target": 3.0}}}},
    ),
    RuleRow(
        "Grpo",
        "overlongBuffer must not be longer than sampling.maxNewTokens; lower it",
        "spec.method.grpo.overlongBuffer",
        {"method": {"grpo": {"rewards": [_EXACT_MATCH], "overlongBuffer": 65, "sampling": {"maxNewTokens": 64}}}},
    ),
    RuleRow(
        "FineTuneJobSpec",
        "globalBatchSize × method.grpo.miniBatches must be a multiple of method.grpo.groupSize, since an iteration has"
        " whole groups",
        "spec.training.globalBatchSize",
        {"method": {"grpo": {"rewards": [_EXACT_MATCH], "groupSize": 7}}},
    ),
    RuleRow(
        "FineTuneJobSpec",
        "ppo and grpo are evaluated by the rewards of the answers to data.eval; remove generation",
        "spec.training.generation",
        {
            "method": {"grpo": {"rewards": [_EXACT_MATCH]}},
            "data": {"train": [{"source": _FILE}], "eval": [{"source": _FILE}]},
            "training.generation": {},
        },
    ),
    RuleRow(
        "Toleration",
        "operator Exists compares no value; remove it",
        "spec.cluster.pods.tolerations[0].value",
        {"cluster.pods.tolerations": [{"key": "gpu", "operator": "Exists", "value": "yes"}]},
    ),
    RuleRow(
        "Backoff",
        "initialSeconds must not be more than maxSeconds",
        "spec.failurePolicy.backoff.initialSeconds",
        {"failurePolicy.backoff": {"initialSeconds": 20, "maxSeconds": 10}},
    ),
    *(
        RuleRow("FineTuneJobSpec", _NO_EVAL, "spec.data.eval", {"data.eval": [], f"training.{asks}": value})
        for asks, value in (("evalEverySteps", 10), ("earlyStopping", {}), ("generation", {}))
    ),
]

_ADD_OR_REMOVE = "spec.runtimeRef cannot be added or removed; create another job"

UPDATE_ROWS = [
    *(
        UpdateRow(
            "FineTuneJobSpec",
            f"spec.{block} cannot be changed; create another job",
            f"spec.{block}",
            {block: change},
        )
        for block, change in {
            "model": {"source": "hf://org/other"},
            "data": {"eval": [{"source": _FILE}]},
            "method": {"sft": {"packing": False}},
            "tuning": {"lora": {"rank": 8}},
            "training": {"seed": 1},
            "deepspeed": {"zeroStage": 1},
            "managedBy": "example.com/other",
        }.items()
    ),
    UpdateRow(
        "FineTuneJobSpec",
        "spec.cluster can be changed only while the job is suspended; set suspend to true first",
        "spec.cluster",
        {"cluster": {"workers": {"replicas": 4}}},
    ),
    UpdateRow("FineTuneJobSpec", _ADD_OR_REMOVE, "spec.runtimeRef", {"runtimeRef": {"name": "pool"}}),
    UpdateRow(
        "FineTuneJobSpec",
        _ADD_OR_REMOVE,
        "spec.runtimeRef",
        {"runtimeRef": None},
        {"runtimeRef.name": "pool"},
    ),
    UpdateRow(
        "RuntimeRef",
        "runtimeRef.name cannot be changed; create another job",
        "spec.runtimeRef",
        {"runtimeRef": {"name": "other"}},
        {"runtimeRef.name": "pool"},
    ),
]
