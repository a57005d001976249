"""Bad manifests. A row is the complete job with a few changes by dotted path, or a text that is not even YAML."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from finetune_api.problems import shorten
from tests.bad_input.rows import MANIFEST, Row
from tests.client.conftest import JOB
from tests.factories import ABSENT, runtime_document, with_changes

__all__ = ["MANIFESTS"]

KNOWN_SCHEMES = "hf://, file://, pvc://, package://"
LONG_NAME = "a" * 41
TOO_MANY = [{"source": "hf://a/b"}] * 33
SAME_AT = [{"at": 0.5, "layers": ["b"]}, {"at": 0.5, "layers": ["c"]}]
NO_VALUE: Any = object()


def bad(
    what: str,
    path: str,
    value: Any,
    right: str,
    also: Mapping[str, Any] | None = None,
    runtime: Mapping[str, Any] | None = None,
) -> Row:
    """One field, by its path as the message gives it, is set to `value` (ABSENT: taken out)."""
    changed = path.replace("[", ".").replace("]", "")
    changes = {**(also or {}), changed: value}
    return at(what, path, changes, NO_VALUE if value is ABSENT else value, right, runtime)


def at(
    what: str,
    path: str,
    changes: Mapping[str, Any],
    value: Any,
    right: str,
    runtime: Mapping[str, Any] | None = None,
) -> Row:
    """The message is about `path`, and other fields are changed."""
    return Row(what, partial(write_job, changes, runtime), right, path=path, value=shown(value))


def text(what: str, content: str | bytes, right: str, line: int | None = None, value: Any = NO_VALUE) -> Row:
    """The whole file; `line` where YAML broke."""
    place = MANIFEST if line is None else f"{MANIFEST}:{line}"
    return Row(what, partial(write_text, content), right, file=place, value=shown(value))


def write_job(changes: Mapping[str, Any], runtime: Mapping[str, Any] | None, folder: Path) -> None:
    documents = [with_changes(JOB, changes), *([runtime_document(runtime)] if runtime else [])]
    (folder / MANIFEST).write_text(yaml.safe_dump_all(documents, sort_keys=False))


def write_text(content: str | bytes, folder: Path) -> None:
    (folder / MANIFEST).write_bytes(content if isinstance(content, bytes) else content.encode())


def shown(value: Any) -> str | None:
    return None if value is NO_VALUE else shorten(value)


FULL: dict[str, Any] = {"spec.tuning": {"full": {}}}
WANDB = {"spec.tracking.wandb": {"project": "p"}}
HUB = [{"to": "hf://a/b"}]
POOL = {"workers.maxReplicas": 2}
METHODS = "sft, distill, reward, dpo, kto, orpo, ppo, grpo"
TEACHER = {"source": "hf://org/teacher"}
METRIC: dict[str, Any] = {"metric": {"kind": "exact-match"}}


def rewards(method: str, *listed: dict[str, Any]) -> dict[str, Any]:
    """A method that learns from these rewards."""
    return {"spec.method": {method: {"rewards": list(listed)}}}


MANIFESTS = [
    # Kind, version, metadata.
    bad("the kind is misspelt", "kind", "FinetuneJob", "must be one of FineTuneJob, FineTuneRuntime"),
    bad("the kind is missing", "kind", ABSENT, "must be one of FineTuneJob, FineTuneRuntime"),
    bad("the version is another's", "apiVersion", "v1", "must be finetune-operator.io/v1alpha1"),
    bad("the version is missing", "apiVersion", ABSENT, "must be finetune-operator.io/v1alpha1"),
    bad("metadata is missing", "metadata", ABSENT, "is required"),
    bad("the name is missing", "metadata.name", ABSENT, "is required"),
    bad("the name has capitals", "metadata.name", "Tiny", "must be lower-case letters, digits and '-'"),
    bad("the name starts with a digit", "metadata.name", "7b", "starting with a letter"),
    bad("the name is a number", "metadata.name", 7, "must be text; put it in quotes"),
    bad("the name is too long", "metadata.name", LONG_NAME, "must have at most 40 characters"),
    bad("the namespace has an underscore", "metadata.namespace", "team_a", "must be lower-case letters, digits"),
    bad("a label is a number", "metadata.labels.a", 1, "must be text; put it in quotes"),
    bad("the spec is missing", "spec", ABSENT, "is required"),
    bad("the spec is a list", "spec", [], "must be a mapping of keys to values"),
    # Unknown keys.
    bad("a block at the top is misspelt", "sepc", {}, "did you mean spec?"),
    bad("a block is misspelt", "spec.trainning", {"epochs": 1}, "did you mean training?"),
    bad("a field is in snake case", "spec.training.learning_rate", 0.1, "did you mean learningRate?"),
    bad("a field is PEFT's", "spec.tuning.lora.r", 8, "known here: rank, alpha, dropout, targetModules"),
    bad("a field of a list item is unknown", "spec.data.train[0].path", "x", "known here: source, split"),
    bad("an optimizer setting is unknown", "spec.training.optimizer.momentum", 0.9, "known here: beta1, beta2"),
    bad("a method that does not exist", "spec.method.magic", {}, "known here: sft"),
    bad("a tracker that does not exist", "spec.tracking.comet", {}, "known here: tensorboard, wandb, mlflow"),
    bad("a column that no format has", "spec.data.train[0].columns.question", "q", "known here: messages"),
    at("full tuning has no settings", "spec.tuning.full.rank", {"spec.tuning": {"full": {"rank": 8}}}, 8, "known here"),
    # Model.
    bad("the model is missing", "spec.model", ABSENT, "is required"),
    bad("the source is missing", "spec.model.source", ABSENT, "is required"),
    bad("the source has no scheme", "spec.model.source", "Qwen/Qwen3-8B", f"start it with one of {KNOWN_SCHEMES}"),
    bad("the scheme is unknown", "spec.model.source", "http://x/y", f"use one of {KNOWN_SCHEMES}"),
    bad("the scheme cannot hold tokenizers", "spec.model.tokenizer", "s3://bucket/a", "cannot be s3:// here"),
    bad("the Hub's path is too deep", "spec.model.source", "hf://a/b/c", "is not of the form hf://org/name"),
    bad("a file has a host", "spec.model.source", "file://model", "file:///absolute/path or file://./relative"),
    bad("a claim is left upwards", "spec.model.source", "pvc://claim/../x", "must not contain '..'"),
    at(
        "a revision of a folder",
        "spec.model.revision",
        {"spec.model": {"source": "file:///m", "revision": "main"}},
        "main",
        "only for an hf:// source; remove it",
    ),
    bad("a template that is not stored", "spec.model.chatTemplate", "llama", "must be tokenizer, chatml or plain"),
    bad("a size in words", "spec.model.parameters", "8 billion", "must be a size such as 135M, 8B"),
    bad("a switch in words", "spec.model.trustRemoteCode", "yes please", "must be true or false"),
    bad("a tokenizer without scheme", "spec.model.tokenizer", "gpt2", "is not a URI"),
    # Data.
    bad("no training data", "spec.data.train", [], "must have at least 1 entry"),
    bad("the training data is missing", "spec.data.train", ABSENT, "is required"),
    bad("one source without a list", "spec.data.train", {"source": "hf://a/b"}, "must be a list; start each item"),
    bad("too many sources", "spec.data.train", TOO_MANY, "must have at most 32 entries, not 33"),
    bad("a path without scheme", "spec.data.train[0].source", "./rows.jsonl", "a local file is file:///path"),
    bad("data from another job", "spec.data.train[0].source", "job://x", "cannot be job:// here"),
    bad(
        "a split of a file",
        "spec.data.train[0].split",
        "train",
        "only for an hf:// source; name the file instead",
        also={"spec.data.train.0.source": "file:///rows.jsonl"},
    ),
    bad("a format that does not exist", "spec.data.train[0].format", "chat", "must be auto, messages"),
    bad("a weight of nothing", "spec.data.train[0].weight", 0, "must be above 0"),
    bad("a weight that is too large", "spec.data.train[0].weight", 101, "must be at most 100"),
    bad("no rows", "spec.data.train[0].maxRows", 0, "must be at least 1"),
    bad("a column without a name", "spec.data.train[0].columns.prompt", "", "must not be empty"),
    # Method and tuning.
    bad("no method", "spec.method", {}, f"set exactly one of: {METHODS}"),
    bad("two methods", "spec.method", {"sft": {}, "dpo": {}}, f"set exactly one of: {METHODS}"),
    *(
        at(
            what,
            f"spec.method.{path}",
            {"spec.method": {path.partition(".")[0]: {path.partition(".")[2]: value}}},
            value,
            says,
        )
        for what, path, value, says in (
            ("a pull of nothing", "dpo.beta", 0, "must be above 0"),
            ("a pull that is too strong", "orpo.beta", 101, "must be at most 100"),
            ("a loss that DPO does not have", "dpo.lossType", "robust", "must be sigmoid, ipo or hinge"),
            ("half of the pairs are wrong", "dpo.labelSmoothing", 0.5, "must be at most 0.49"),
            ("a weight of nothing for bad answers", "kto.undesirableWeight", 0, "must be above 0"),
            ("scores are centred backwards", "reward.centerCoefficient", -0.1, "must be at least 0"),
            ("packing of pairs", "dpo.packing", True, "known here: maxSeqLength"),
        )
    ),
    *(
        at(what, f"spec.method.distill.{path}", {"spec.method": {"distill": distill}}, value, says)
        for what, path, value, says, distill in (
            ("no teacher", "teacher", NO_VALUE, "is required", {}),
            ("a teacher without scheme", "teacher.source", "t", "is not a URI", {"teacher": {"source": "t"}}),
            (
                "a revision of a teacher's folder",
                "teacher.revision",
                "main",
                "only for an hf:// source; remove it",
                {"teacher": {"source": "file:///t", "revision": "main"}},
            ),
            (
                "a divergence that does not exist",
                "divergence",
                "kl",
                "must be forward-kl, reverse-kl or jsd",
                {"teacher": TEACHER, "divergence": "kl"},
            ),
            ("a mixture of one kind", "beta", 0.5, "only for divergence jsd", {"teacher": TEACHER, "beta": 0.5}),
            ("a mixture of nothing", "beta", 0, "must be above 0", {"teacher": TEACHER, "beta": 0}),
            ("no temperature", "temperature", 0, "must be above 0", {"teacher": TEACHER, "temperature": 0}),
            ("a teacher that does not count", "alpha", 1.0, "set teacherAnswers", {"teacher": TEACHER, "alpha": 1.0}),
            (
                "answers that are packed before they are written",
                "packing",
                True,
                "needs packing false",
                {"teacher": TEACHER, "packing": True, "teacherAnswers": {}},
            ),
            (
                "answers of no tokens",
                "teacherAnswers.maxNewTokens",
                0,
                "must be at least 1",
                {"teacher": TEACHER, "packing": False, "teacherAnswers": {"maxNewTokens": 0}},
            ),
        )
    ),
    *(
        at(what, f"spec.method.grpo.{path}", {"spec.method": {"grpo": {"rewards": [METRIC], **also}}}, value, says)
        for what, path, value, says, also in (
            ("rollouts that are too old", "vllm.maxStaleness", 2, "must be at most 1", {"vllm": {"maxStaleness": 2}}),
            (
                "a vLLM of more GPUs than a worker has",
                "vllm.tensorParallelSize",
                2,
                "must divide the training processes of a worker",
                {"vllm": {"tensorParallelSize": 2}},
            ),
            ("a search without beams", "sampling.numBeams", 0, "must be at least 1", {"sampling": {"numBeams": 0}}),
            (
                "a search that gives less than a group",
                "sampling.numBeams",
                4,
                "gives no 8 answers, of which groupSize makes a group",
                {"sampling": {"numBeams": 4}},
            ),
            (
                "a search by vLLM",
                "sampling.numBeams",
                8,
                "is searched by the trainers alone",
                {"sampling": {"numBeams": 8}, "vllm": {}},
            ),
            (
                "a search that is to draw",
                "sampling.numBeams",
                8,
                "draws nothing that topP and topK could restrict",
                {"sampling": {"numBeams": 8, "topK": 50}},
            ),
            ("trainers that write ahead", "maxStaleness", 1, "is not a known field", {"maxStaleness": 1}),
        )
    ),
    *(
        at(
            f"rollouts of a base of {quantization} by vLLM for {method}",
            "spec.tuning.lora.quantization",
            {
                "spec.method": {method: {"rewards": [METRIC], "vllm": {}}},
                "spec.tuning": {"lora": {"quantization": quantization}},
            },
            quantization,
            "vllm needs whole weights, and a quantized base has none",
        )
        for method, quantization in (("ppo", "int8"), ("grpo", "nf4"))
    ),
    at("no rewards", "spec.method.grpo.rewards", {"spec.method": {"grpo": {}}}, NO_VALUE, "is required"),
    at("an empty list of rewards", "spec.method.ppo.rewards", rewards("ppo"), [], "must have at least 1 entry"),
    at(
        "two rewards of one name",
        "spec.method.ppo.rewards",
        rewards("ppo", METRIC | {"name": "right"}, METRIC | {"name": "right"}),
        [{"name": "right", "weight": 1.0, "metric": {"kind": "exact-match"}}] * 2,
        "two rewards have the same name; rename one",
    ),
    *(
        at(what, f"spec.method.grpo.rewards[0]{path}", rewards("grpo", reward), value, says)
        for what, path, value, says, reward in (
            ("a reward of no kind", "", {"weight": 2.0}, "set exactly one of: function, metric", {"weight": 2.0}),
            (
                "a reward of two kinds",
                "",
                METRIC | {"model": {"source": "job://rm"}},
                "set exactly one of: function, metric, http, model",
                METRIC | {"model": {"source": "job://rm"}},
            ),
            (
                "a reward that does not count",
                ".weight",
                0.0,
                "weight 0 has no effect; remove the reward",
                METRIC | {"weight": 0},
            ),
            ("a weight in words", ".weight", "high", "must be a number", METRIC | {"weight": "high"}),
            ("a name with a dash", ".name", "a-b", "must match ^[a-z][a-z0-9_]*$", METRIC | {"name": "a-b"}),
            (
                "a metric that does not exist",
                ".metric.kind",
                "meteor",
                "must be exact-match, numeric-answer, regex, token-f1, rouge-l or bleu",
                {"metric": {"kind": "meteor"}},
            ),
            (
                "a metric by its name alone",
                ".metric",
                "bleu",
                "must be a mapping of keys to values",
                {"metric": "bleu"},
            ),
            ("no pattern", ".metric.pattern", None, "kind regex needs pattern", {"metric": {"kind": "regex"}}),
            (
                "a pattern that is none",
                ".metric.pattern",
                "(7",
                "is no regular expression of Python: missing )",
                {"metric": {"kind": "regex", "pattern": "(7"}},
            ),
            (
                "a pattern and a column that it is not compared with",
                ".metric.column",
                "answer",
                "kind regex compares with no column; remove it",
                {"metric": {"kind": "regex", "pattern": "7", "column": "answer"}},
            ),
            (
                "a function without its module",
                ".function.call",
                "is_right",
                "must be module:function, such as my_rewards.maths:is_right",
                {"function": {"call": "is_right"}},
            ),
            (
                "a function with dots for a colon",
                ".function.call",
                "rewards.is_right",
                "must be module:function",
                {"function": {"call": "rewards.is_right"}},
            ),
            (
                "no time for a function",
                ".function.timeoutSeconds",
                0,
                "must be above 0",
                {"function": {"call": "a:b", "timeoutSeconds": 0}},
            ),
            (
                "settings that are a list",
                ".function.settings",
                [1],
                "must be a mapping of keys to values",
                {"function": {"call": "a:b", "settings": [1]}},
            ),
            (
                "a service by ftp",
                ".http.url",
                "ftp://judge",
                "http://host/path or https://",
                {"http": {"url": "ftp://judge"}},
            ),
            (
                "a password in a service's address",
                ".http.url",
                "http://me:pw@judge/",
                "without a user name",
                {"http": {"url": "http://me:pw@judge/"}},
            ),
            (
                "a token in the place of the variable that holds it",
                ".http.headersFromEnv.Authorization",
                "Bearer abc",
                "must match ^[A-Za-z_][A-Za-z0-9_]*$",
                {"http": {"url": "http://judge/", "headersFromEnv": {"Authorization": "Bearer abc"}}},
            ),
            ("a reward model without scheme", ".model.source", "rm", "is not a URI", {"model": {"source": "rm"}}),
            (
                "a revision of another job's reward model",
                ".model.revision",
                "main",
                "only for an hf:// source; remove it",
                {"model": {"source": "job://rm", "revision": "main"}},
            ),
        )
    ),
    at(
        "pairs for distillation",
        "spec.data.train",
        {"spec.method": {"distill": {"teacher": TEACHER}}, "spec.data.train.0.format": "preference"},
        [{"source": "hf://org/rows", "format": "preference", "weight": 1.0}],
        "set format to auto or to one that the method learns from",
    ),
    at(
        "noise in pairs for a loss without it",
        "spec.method.dpo.labelSmoothing",
        {"spec.method": {"dpo": {"lossType": "hinge", "labelSmoothing": 0.1}}},
        0.1,
        "only for lossType sigmoid",
    ),
    at(
        "conversations for a method that compares",
        "spec.data.train",
        {"spec.method": {"dpo": {}}, "spec.data.train.0.format": "messages"},
        [{"source": "hf://org/rows", "format": "messages", "weight": 1.0}],
        "learn from format preference",
    ),
    at(
        "a format of pairs for supervised fine-tuning",
        "spec.data.train",
        {"spec.data.train.0.format": "preference"},
        [{"source": "hf://org/rows", "format": "preference", "weight": 1.0}],
        "set format to auto or to one that the method learns from",
    ),
    at(
        "answers of a reward model",
        "spec.training.generation",
        {"spec.method": {"reward": {}}, "spec.training.generation": {}, "spec.data.eval": [{"source": "hf://a/b"}]},
        {"maxRows": 32, "maxNewTokens": 128},
        "writes no answers",
    ),
    at(
        "a reward model that is merged",
        "spec.outputs",
        {"spec.method": {"reward": {}}, "spec.outputs": [{"to": "file:///o", "merge": True}]},
        [{"to": "file:///o", "merge": True}],
        "remove merge",
    ),
    bad("a sequence that is too short", "spec.method.sft.maxSeqLength", 8, "must be at least 16"),
    bad("a part of a token", "spec.method.sft.maxSeqLength", 128.5, "must be a whole number"),
    bad("a length in words", "spec.method.sft.maxSeqLength", "2k", "must be a whole number"),
    bad("a loss on something else", "spec.method.sft.lossOn", "completion", "must be assistant or all"),
    bad("long rows are skipped", "spec.method.sft.longRows", "skip", "must be error, truncate or drop"),
    bad("no tuning", "spec.tuning", {}, "set exactly one of: full, lora, freeze"),
    bad("two kinds of tuning", "spec.tuning", {"lora": {}, "full": {}}, "set exactly one of: full, lora, freeze"),
    bad("no rank", "spec.tuning.lora.rank", 0, "must be at least 1"),
    bad("a negative alpha", "spec.tuning.lora.alpha", -1, "must be above 0"),
    bad("everything is dropped", "spec.tuning.lora.dropout", 1, "must be below 1"),
    bad("no targets", "spec.tuning.lora.targetModules", [], "must have at least 1 entry"),
    bad("targets without a list", "spec.tuning.lora.targetModules", "q_proj", "must be a list"),
    bad("all and some targets", "spec.tuning.lora.targetModules", ["all-linear", "q_proj"], "all-linear stands alone"),
    bad("a quantization that does not exist", "spec.tuning.lora.quantization", "int4", "must be none, int8 or nf4"),
    bad(
        "a quantized base is split",
        "spec.deepspeed.zeroStage",
        3,
        "set deepspeed.zeroStage to 2 or less",
        also={"spec.tuning.lora.quantization": "nf4"},
    ),
    at(
        "nothing learns",
        "spec.tuning.freeze.train",
        {"spec.tuning": {"freeze": {"train": []}}},
        [],
        "must have at least 1 entry",
    ),
    at(
        "layers learn after the end",
        "spec.tuning.freeze.unfreeze[0].at",
        {"spec.tuning": {"freeze": {"train": ["a"], "unfreeze": [{"at": 1, "layers": ["b"]}]}}},
        1,
        "must be below 1",
    ),
    at(
        "two groups start together",
        "spec.tuning.freeze.unfreeze",
        {"spec.tuning": {"freeze": {"train": ["a"], "unfreeze": SAME_AT}}},
        SAME_AT,
        "join them",
    ),
    # Training.
    bad("epochs and steps", "spec.training", {"epochs": 1, "maxSteps": 5}, "set exactly one of: epochs, maxSteps"),
    bad("neither epochs nor steps", "spec.training", {"seed": 1}, "set exactly one of: epochs, maxSteps"),
    at("no epochs", "spec.training.epochs", {"spec.training": {"epochs": 0}}, 0, "must be at least 1"),
    at("half an epoch", "spec.training.epochs", {"spec.training": {"epochs": 0.5}}, 0.5, "must be a whole number"),
    bad("an empty batch", "spec.training.globalBatchSize", 0, "must be at least 1"),
    bad("a micro batch in words", "spec.training.microBatchSize", "small", "must be a whole number from 1"),
    at(
        "a batch that is no multiple of the micro batch",
        "spec.training.globalBatchSize",
        {"spec.training.microBatchSize": 3},
        8,
        "must be a multiple of microBatchSize",
    ),
    at(
        "a batch that is no multiple of the workers",
        "spec.training.globalBatchSize",
        {"spec.cluster.workers.replicas": 3},
        8,
        "must be a multiple of the 3 training processes; set it to 9",
    ),
    at(
        "a micro batch that is more than a worker has",
        "spec.training.microBatchSize",
        {"spec.cluster.workers.replicas": 4, "spec.training.microBatchSize": 4},
        4,
        "set it to one of 1, 2",
    ),
    at(
        "a batch that is no multiple of micro batch, workers and GPUs",
        "spec.training.globalBatchSize",
        {"spec.cluster.workers": {"replicas": 2, "gpus": 2}, "spec.training.microBatchSize": 4},
        8,
        "must be a multiple of microBatchSize × workers.replicas × workers.gpus",
    ),
    bad("a rate above one", "spec.training.learningRate", 2, "above 0 and at most 1, or auto"),
    bad("a rate in words", "spec.training.learningRate", "fast", "above 0 and at most 1, or auto"),
    bad("a negative rate", "spec.training.learningRate", -0.0001, "above 0 and at most 1, or auto"),
    bad(
        "a schedule that does not exist", "spec.training.schedule", "exponential", "must be cosine, linear or constant"
    ),
    bad("warm-up to the end", "spec.training.warmupFraction", 1, "must be below 1"),
    bad("a mean that never moves", "spec.training.optimizer.beta1", 1.0, "must be below 1"),
    bad("negative decay", "spec.training.optimizer.weightDecay", -0.1, "must be at least 0"),
    bad("an epsilon that is no number", "spec.training.optimizer.epsilon", float("nan"), "must be a finite number"),
    bad("a negative norm", "spec.training.maxGradNorm", -1, "must be at least 0"),
    bad("a precision that does not exist", "spec.training.precision", "fp8", "must be auto, bf16, fp16 or fp32"),
    bad("fp16 on the CPU", "spec.training.precision", "fp16", "needs a GPU; set bf16, fp32 or auto"),
    bad("a negative seed", "spec.training.seed", -1, "must be at least 0"),
    bad("a switch as a number", "spec.training.activationCheckpointing", 1, "must be true or false"),
    bad("no patience", "spec.training.earlyStopping.patience", 0, "must be at least 1"),
    bad("empty answers", "spec.training.generation.maxNewTokens", 0, "must be at least 1"),
    at(
        "evaluation without data",
        "spec.data.eval",
        {"spec.data.eval": [], "spec.training.evalEverySteps": 5},
        [],
        "add a source to data.eval",
    ),
    at(
        "early stopping without data",
        "spec.data.eval",
        {"spec.data.eval": [], "spec.training.earlyStopping": {}},
        [],
        "add a source to data.eval",
    ),
    # DeepSpeed.
    bad("a stage that does not exist", "spec.deepspeed.zeroStage", 4, "must be at most 3"),
    bad("offload to NVMe", "spec.deepspeed.offload.optimizer", "nvme", "must be none or cpu"),
    at(
        "the optimizer is offloaded and not split",
        "spec.deepspeed.offload",
        {"spec.deepspeed": {"zeroStage": 0, "offload": {"optimizer": "cpu"}}},
        {"optimizer": "cpu", "parameters": "none"},
        "needs zeroStage 1, 2 or 3",
    ),
    at(
        "parameters are offloaded and not split",
        "spec.deepspeed.offload",
        {"spec.deepspeed": {"zeroStage": 2, "offload": {"parameters": "cpu"}}},
        {"optimizer": "none", "parameters": "cpu"},
        "needs zeroStage 3",
    ),
    bad("a reserved key", "spec.deepspeed.config.train_batch_size", 8, "set spec.training.globalBatchSize"),
    bad("a reserved key deep down", "spec.deepspeed.config.zero_optimization.stage", 2, "set spec.deepspeed.zeroStage"),
    bad("a reserved block", "spec.deepspeed.config.bf16.enabled", True, "set spec.training.precision"),
    # Checkpoints.
    bad("a checkpoint every no steps", "spec.checkpoint.everySteps", 0, "from 1 to 1000000, or auto"),
    bad("a checkpoint in words", "spec.checkpoint.everySteps", "often", "from 1 to 1000000, or auto"),
    bad("another way to be behind", "spec.checkpoint.whenBehind", "stop", "must be skip or wait"),
    bad("a checkpoint kept every no steps", "spec.checkpoint.keepEvery", 0, "must be at least 1"),
    bad("a quota in other units", "spec.checkpoint.quota", "500GB", "must match"),
    bad("a figure that cannot be one", "spec.checkpoint.keepBest.metric", "Eval Loss", "must match"),
    bad(
        "the best by an evaluation that is not made",
        "spec.checkpoint.keepBest.metric",
        "eval_loss",
        "set spec.data.eval",
        also={"spec.data.eval": []},
    ),
    bad("no checkpoint is kept", "spec.checkpoint.keepLast", 0, "must be at least 1"),
    bad("going on in another way", "spec.checkpoint.resume", "always", "must be auto or never"),
    bad("checkpoints as a switch", "spec.checkpoint", True, "must be a mapping of keys to values"),
    bad("a place for checkpoints", "spec.checkpoint.uri", "s3://b/c", "known here: everySteps, whenBehind, keepLast"),
    # Cluster and runtime.
    bad("no workers", "spec.cluster.workers.replicas", 0, "must be at least 1"),
    bad(
        "more workers at least than at most",
        "spec.cluster.workers.minReplicas",
        2,
        "is more than replicas, which is the most; lower it",
        also={"spec.checkpoint": {}},
    ),
    bad("fewer workers with nothing to go on from", "spec.cluster.workers.minReplicas", 1, "add a checkpoint block"),
    at(
        "no fewer workers share the batch evenly",
        "spec.cluster.workers.minReplicas",
        {"spec.cluster.workers": {"replicas": 8, "minReplicas": 5}, "spec.checkpoint": {}},
        5,
        "divides globalBatchSize 8 evenly; set it to 4",
    ),
    at(
        "a wait for workers that is longer than a hang",
        "spec.cluster.workers.resizeAfterSeconds",
        {
            "spec.cluster.workers": {"replicas": 2, "minReplicas": 1, "resizeAfterSeconds": 600},
            "spec.failurePolicy.hangTimeoutSeconds": 600,
            "spec.checkpoint": {},
        },
        600,
        "must be below failurePolicy.hangTimeoutSeconds (600)",
    ),
    at(
        "shards of a fixed number of workers, whose number may change",
        "spec.deepspeed.config.zero_optimization.zero_hpz_partition_size",
        {
            "spec.cluster.workers": {"replicas": 2, "minReplicas": 1},
            "spec.deepspeed.config": {"zero_optimization": {"zero_hpz_partition_size": 2}},
            "spec.checkpoint": {},
        },
        2,
        "minReplicas lets their number change; remove one of them",
    ),
    bad("waiting for no time", "spec.cluster.workers.resizeAfterSeconds", 0, "must be at least 1"),
    bad("more GPUs than a machine has", "spec.cluster.workers.gpus", 17, "must be at most 16"),
    bad("no cores", "spec.cluster.workers.cpus", 0, "must be above 0"),
    bad("a runtime without its key", "spec.runtimeRef", "pool", "must be a mapping of keys to values"),
    bad("a runtime that is not there", "spec.runtimeRef.name", "a100", "bring it with --runtime FILE"),
    bad("a runtime that is misspelt", "spec.runtimeRef.name", "poool", "did you mean pool?", runtime=POOL),
    bad(
        "more workers than the runtime has",
        "spec.cluster.workers.replicas",
        4,
        "ask for at most 2",
        also={"spec.runtimeRef": {"name": "pool"}},
        runtime=POOL,
    ),
    # Outputs and trackers.
    at("an artifact on the Hub", "spec.outputs[0].to", {"spec.outputs": HUB}, "hf://a/b", "use one of file://, pvc://"),
    bad(
        "a whole model is merged",
        "spec.outputs",
        [{"to": "file:///o", "merge": True}],
        "only for tuning.lora",
        also=FULL,
    ),
    at("no project", "spec.tracking.wandb.project", {"spec.tracking.wandb": {}}, NO_VALUE, "is required"),
    bad("a mode that does not exist", "spec.tracking.wandb.mode", "on", "online or offline", also=WANDB),
    at("no experiment", "spec.tracking.mlflow.experiment", {"spec.tracking.mlflow": {}}, NO_VALUE, "is required"),
    # Not even a job.
    text("an empty manifest", "", "is empty; write a FineTuneJob into it"),
    text("a manifest of a comment", "# nothing\n", "is empty; write a FineTuneJob into it"),
    text("a list", "- a\n", "must be a mapping with apiVersion, kind, metadata and spec", value=["a"]),
    text("a word", "hello\n", "must be a mapping with apiVersion, kind, metadata and spec", value="hello"),
    text("a tab", "a:\n\tb: 1\n", "cannot start any token", line=2),
    text("an open bracket", "a: [1,\nb: 2\n", "expected ',' or ']'", line=3),
    text("a key twice", "kind: a\nspec: {}\nkind: b\n", "the key 'kind' stands twice; remove one", line=3),
    text("a number as a key", "1: a\n", "the key 1 is not text; put it in quotes", line=1),
    text("an alias to nothing", "a: *x\n", "undefined alias 'x'", line=1),
    text("an object of Python's", "a: !!python/object:os.system x\n", "could not determine a constructor", line=1),
    text("two colons", "a: b: c\n", "mapping values are not allowed here", line=1),
    text("wrong indentation", "a:\n  b: 1\n c: 2\n", "expected <block end>", line=3),
    text("no text at all", b"\x80\x81", "cannot be read as UTF-8 text"),
    text("thousands of brackets", "a: " + "[" * 5000, "is nested too deeply"),
    text("thousands of digits", "a: " + "9" * 5000, "is not valid YAML"),
]
