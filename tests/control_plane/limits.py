"""For every limit that the schema states, an object that breaks just that one.

The schema is walked beside documents that, together, set every field; a field that none of them sets fails
`test_every_field_is_set_in_an_example`, so that the limits of new fields are tried too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finetune_api.schema import custom_resource_definitions
from tests.factories import job_document, runtime_document, with_changes

__all__ = ["EXAMPLES", "Breach", "breaches", "fields_of", "fields_set", "spec_schema"]

_SOURCE = {
    "source": "hf://org/rows",
    "split": "train",
    "revision": "main",
    "format": "alpaca",
    "weight": 0.5,
    "maxRows": 100,
    "columns": {
        name: name
        for name in (
            "messages",
            "conversations",
            "prompt",
            "completion",
            "instruction",
            "input",
            "output",
            "system",
            "text",
            "chosen",
            "rejected",
            "margin",
            "label",
        )
    },
}

_KEY = {"name": "object", "key": "entry"}
_ENV: dict[str, dict[str, Any]] = {
    "value": {"value": "8"},
    "secret": {"secret": _KEY},
    "config map": {"configMap": _KEY},
}
_VOLUMES: dict[str, dict[str, Any]] = {
    "value": {"claim": "models", "readOnly": True},
    "secret": {"secret": "certificates"},
    "config map": {"configMap": "settings"},
}
_JUDGED: dict[str, dict[str, Any]] = {
    "reward": {"centerCoefficient": 0.01, "squash": True},
    "dpo": {"beta": 0.1, "lossType": "sigmoid", "labelSmoothing": 0.1},
    "kto": {"beta": 0.1, "desirableWeight": 1.0, "undesirableWeight": 1.33},
    "orpo": {"beta": 0.1},
    "distill": {
        "teacher": {"source": "hf://org/t", "revision": "main", "tokenizer": "hf://org/t", "trustRemoteCode": False},
        "lossOn": "assistant",
        "divergence": "jsd",
        "beta": 0.9,
        "temperature": 2.0,
        "alpha": 0.5,
        "packing": False,
        "teacherAnswers": {"maxNewTokens": 64, "temperature": 0.7, "topP": 0.9},
    },
}
"""Settings of the methods beside supervised fine-tuning."""

_REWARDS: dict[str, dict[str, Any]] = {
    "function": {"call": "my_rewards.maths:is_right", "timeoutSeconds": 30.0, "settings": {"a": {"b": 1}}},
    "metric": {"kind": "token-f1", "column": "answer", "pattern": "answer: (.*)"},
    "http": {
        "url": "http://judge.team:8080/score",
        "timeoutSeconds": 30.0,
        "retries": 2,
        "batchSize": 16,
        "headersFromEnv": {"Authorization": "JUDGE_AUTHORIZATION"},
    },
    "model": {"source": "hf://org/reward", "revision": "main", "calibrated": True},
}
_ROLLOUTS: dict[str, Any] = {
    "sampling": {"maxNewTokens": 64, "temperature": 0.9, "topP": 0.9, "topK": 50, "numBeams": 2},
    "miniBatches": 2,
    "passes": 2,
    "clipLow": 0.2,
    "clipHigh": 0.28,
    "missingEosPenalty": 1.0,
    "maxKl": 1.0,
    "vllm": {"tensorParallelSize": 1, "kvCacheGib": 4, "gapLimit": 0.1, "maxStaleness": 1},
}
_ONLINE: dict[str, dict[str, Any]] = {
    "ppo": {
        "gamma": 0.99,
        "gaeLambda": 0.95,
        "kl": {"coefficient": 0.1, "target": 6.0, "horizon": 1000},
        "critic": {"learningRate": 1e-4, "warmupIterations": 2, "coefficient": 0.5, "clip": 0.2, "beginsAs": "policy"},
        "whitenAdvantages": False,
        "normalizeRewards": True,
        "rewardClip": 5.0,
        "dualClip": 3.0,
        "stopKl": 0.1,
    },
    "grpo": {
        "groupSize": 4,
        "baseline": "rloo",
        "aggregation": "constant",
        "klCoefficient": 0.01,
        "dynamicSampling": 2,
        "overlongBuffer": 16,
    },
}
"""Settings of the methods that learn from the model's own answers, beside those that both have."""


def _pods(choice: str) -> dict[str, Any]:
    """Additions to pods, with one of the three sources that a variable and a volume may have."""
    return {
        "labels": {"team": "a"},
        "annotations": {"note": "b"},
        "nodeSelector": {"pool": "a100"},
        "tolerations": [{"key": "gpu", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}],
        "env": [{"name": "NCCL_DEBUG", **_ENV[choice]}],
        "volumes": [{"mountPath": "/mnt/extra", **_VOLUMES[choice]}],
        "imagePullSecrets": ["registry"],
        "writableRoot": True,
    }


_HEAD = {"cpus": 2, "memory": "8Gi"}
_SCHEDULING = {
    "queue": "night",
    "scheduler": "kueue",
    "priorityClass": "low",
    "topology": {"mode": "pack", "key": "topology.kubernetes.io/zone", "required": True},
}

EXAMPLES = {
    "job with lora": job_document(
        {
            "runtimeRef": {"name": "pool"},
            "model": {
                "source": "hf://org/model-8B",
                "revision": "main",
                "tokenizer": "hf://org/tokenizer",
                "chatTemplate": "chatml",
                "parameters": "8B",
                "trustRemoteCode": False,
            },
            "data": {"train": [_SOURCE], "eval": [_SOURCE]},
            "method.sft": {"maxSeqLength": 512, "packing": True, "lossOn": "all", "longRows": "drop"},
            "tuning.lora": {
                "rank": 8,
                "alpha": 16,
                "dropout": 0.1,
                "targetModules": ["q_proj"],
                "quantization": "nf4",
            },
            "training": {
                "epochs": 2,
                "globalBatchSize": 64,
                "microBatchSize": 4,
                "learningRate": 2e-4,
                "schedule": "linear",
                "warmupFraction": 0.1,
                "minLearningRateFraction": 0.1,
                "optimizer": {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weightDecay": 0.1},
                "maxGradNorm": 1.0,
                "precision": "bf16",
                "seed": 1,
                "activationCheckpointing": True,
                "logEverySteps": 10,
                "evalEverySteps": 100,
                "earlyStopping": {"patience": 2, "minDelta": 0.01},
                "generation": {"maxRows": 8, "maxNewTokens": 64},
            },
            "deepspeed": {
                "zeroStage": 2,
                "offload": {"optimizer": "cpu", "parameters": "none"},
                "config": {"a": {"b": 1}},
            },
            "cluster": {
                "workers": {
                    "replicas": 2,
                    "minReplicas": 1,
                    "resizeAfterSeconds": 60,
                    "gpus": 1,
                    "cpus": 4,
                    "memory": "64Gi",
                },
                "head": _HEAD,
                "image": "registry.local/trainers:1",
                "rayVersion": "2.60.0",
                "pods": _pods("value"),
            },
            "scheduling": _SCHEDULING,
            "failurePolicy": {
                "maxRestarts": 3,
                "maxPreemptions": 10,
                "backoff": {"initialSeconds": 10, "maxSeconds": 600},
                "hangTimeoutSeconds": 600,
                "rules": [
                    {"classes": ["OutOfMemory"], "exitCodes": [1], "messagePattern": "CUDA", "action": "Retry"},
                ],
            },
            "checkpoint": {
                "everySteps": 100,
                "whenBehind": "wait",
                "keepLast": 3,
                "keepEvery": 1000,
                "keepBest": {"metric": "loss", "mode": "min", "count": 2},
                "quota": "500Gi",
                "resume": "auto",
            },
            "lifecycle": {
                "startDeadlineSeconds": 600,
                "suspendGraceSeconds": 30,
                "activeDeadlineSeconds": 86_400,
                "ttlSecondsAfterFinished": 3600,
                "keepFailedClusterSeconds": 600,
            },
            "suspend": False,
            "managedBy": "finetune-operator.io/operator",
            "outputs": [{"to": "file:///models/out", "merge": True}],
            "tracking": {
                "tensorboard": {},
                "wandb": {"project": "p", "entity": "e", "mode": "offline"},
                "mlflow": {"experiment": "e", "trackingUri": "http://mlflow:5000"},
            },
        }
    ),
    "job with freeze": job_document(
        {
            "tuning": {"freeze": {"train": ["lm_head.*"], "unfreeze": [{"at": 0.5, "layers": ["model.layers.2?.*"]}]}},
            "training": {"maxSteps": 100},
            "cluster.pods": _pods("secret"),
        }
    ),
    **{
        f"job with {method}": job_document({"method": {method: {"maxSeqLength": 512, "longRows": "drop"} | settings}})
        for method, settings in _JUDGED.items()
    },
    **{
        f"job with {method} by {kind}": job_document(
            {
                "method": {
                    method: {
                        "maxSeqLength": 512,
                        "longRows": "drop",
                        "rewards": [{"name": "judge", "weight": 0.5, kind: reward}],
                        **_ROLLOUTS,
                        **settings,
                    }
                }
            }
        )
        for method, settings in _ONLINE.items()
        for kind, reward in _REWARDS.items()
    },
    "job with full": job_document({"tuning": {"full": {}}, "cluster.pods": _pods("config map")}),
    "runtime": runtime_document(
        {
            "description": "eight GPUs a node",
            "workers": {"gpus": 8, "cpus": 96, "memory": "256Gi", "maxReplicas": 4},
            "head": _HEAD,
            "image": "registry.local/trainers:1",
            "rayVersion": "2.60.0",
            "gpuResource": "nvidia.com/gpu",
            "pods": _pods("value"),
            "scheduling": _SCHEDULING,
            "networkPolicy": True,
            "rayTokenAuth": True,
            "storage": "pvc://claim/runs",
            "storageSecret": "bucket-keys",
            "precision": "bf16",
            "zeroStage": 2,
        }
    ),
    "runtime with secrets": runtime_document({"pods": _pods("secret")}),
    "runtime with config maps": runtime_document({"pods": _pods("config map")}),
}
"""Valid documents that together set every field of both kinds."""


@dataclass(frozen=True)
class Breach:
    """`document` has a value at `path` (server's spelling) that breaks the schema's `limit`."""

    path: str
    limit: str
    document: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.path} {self.limit}"


def spec_schema(kind: str) -> dict[str, Any]:
    """The generated schema of `spec` of FineTuneJob or FineTuneRuntime."""
    crds = custom_resource_definitions().values()
    version = next(crd["spec"]["versions"][0] for crd in crds if crd["spec"]["names"]["kind"] == kind)
    schema: dict[str, Any] = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    return schema


def breaches() -> Iterator[Breach]:
    """One for each limit of each field, in the first example that sets the field."""
    seen = set()
    for document in EXAMPLES.values():
        for path, schema, value in fields_set(spec_schema(document["kind"]), document["spec"], "spec"):
            for limit, broken in _broken_values(schema, value):
                if (document["kind"], path, limit) not in seen:
                    seen.add((document["kind"], path, limit))
                    yield Breach(_in_brackets(path), limit, with_changes(document, {path: broken}))


def fields_of(schema: dict[str, Any], path: str) -> Iterator[str]:
    """The dotted path of every field below `schema`; a list has the one item 0."""
    yield path
    for name, child in schema.get("properties", {}).items():
        yield from fields_of(child, f"{path}.{name}")
    if "items" in schema:
        yield from fields_of(schema["items"], f"{path}.0")


def fields_set(schema: dict[str, Any], value: Any, path: str) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Every field that `value` sets, with its schema and its value there."""
    yield path, schema, value
    for name, child in schema.get("properties", {}).items():
        if name in value:
            yield from fields_set(child, value[name], f"{path}.{name}")
    if "items" in schema and value:
        yield from fields_set(schema["items"], value[0], f"{path}.0")


def _broken_values(schema: dict[str, Any], value: Any) -> Iterator[tuple[str, Any]]:
    """Each limit of `schema` with a value that breaks it and, if possible, no other."""
    if "type" in schema:
        yield (
            "type",
            {"object": "text", "array": {}, "boolean": "yes", "string": 7}.get(schema["type"], "text"),
        )
    if schema.get("properties"):
        yield "known fields", value | {"noSuchField": 1}
    for required in schema.get("required", ()):
        yield f"required {required}", {key: child for key, child in value.items() if key != required}
    if "enum" in schema:
        yield "enum", "no-such-choice"
    if "pattern" in schema:
        yield "pattern", "?!"
    if "minimum" in schema:
        yield "minimum", schema["minimum"] if schema.get("exclusiveMinimum") else schema["minimum"] - 1
    if "maximum" in schema:
        yield "maximum", schema["maximum"] if schema.get("exclusiveMaximum") else schema["maximum"] + 1
    if "minLength" in schema:
        yield "minLength", ""
    if "maxLength" in schema:
        yield "maxLength", value + "a" * (schema["maxLength"] + 1 - len(value))
    if "minItems" in schema:
        yield "minItems", []
    if "maxItems" in schema:
        yield "maxItems", [copy.deepcopy(value[0]) for _ in range(schema["maxItems"] + 1)]
    if "maxProperties" in schema:
        yield "maxProperties", {f"key-{number}": "value" for number in range(schema["maxProperties"] + 1)}


def _in_brackets(path: str) -> str:
    """`spec.data.train.0.weight` as the server writes it: `spec.data.train[0].weight`."""
    text = ""
    for step in path.split("."):
        text += f"[{step}]" if step.isdigit() else f".{step}"
    return text.removeprefix(".")
