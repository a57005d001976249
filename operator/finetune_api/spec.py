"""What a user may ask for: the `spec` of a FineTuneJob, block by block.

Every field's docstring is what `kubectl explain` shows. Defaults are those of a careful practitioner; `auto` means
that planning decides and prints its reason. A field is here only when something runs that obeys it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, PlainValidator, WithJsonSchema
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from finetune_api.base import Contract, Rule, exactly_one
from finetune_api.uris import Scheme, parse_uri

__all__ = [
    "Cluster",
    "Columns",
    "Data",
    "DataFormat",
    "DataSource",
    "DeepSpeed",
    "EarlyStopping",
    "FineTuneJobSpec",
    "Freeze",
    "Full",
    "GenerationEval",
    "Lora",
    "Method",
    "MlflowTracking",
    "Model",
    "Offload",
    "OptimizerSettings",
    "Output",
    "Precision",
    "Quantization",
    "RuntimeRef",
    "Sft",
    "TensorBoardTracking",
    "Tracking",
    "Training",
    "Tuning",
    "UnfreezeStep",
    "WandbTracking",
    "Workers",
]

MODEL_SCHEMES = (Scheme.HF, Scheme.FILE, Scheme.PVC, Scheme.PACKAGE)
DATA_SCHEMES = (Scheme.HF, Scheme.FILE, Scheme.PVC, Scheme.PACKAGE)
OUTPUT_SCHEMES = (Scheme.FILE, Scheme.PVC)
_URI_LENGTH = 1024


@dataclass(frozen=True)
class _UriOf:
    """Marks a string that must be a URI of one of `schemes`; the CRD checks the scheme by a pattern."""

    schemes: tuple[Scheme, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"type": "string", "pattern": f"^({'|'.join(self.schemes)})://.+$", "maxLength": _URI_LENGTH}

    def _check(self, text: str) -> str:
        if len(text) > _URI_LENGTH:
            raise ValueError(f"must have at most {_URI_LENGTH} characters")
        parse_uri(text, self.schemes)
        return text


ModelUri = Annotated[str, _UriOf(MODEL_SCHEMES)]
DataUri = Annotated[str, _UriOf(DATA_SCHEMES)]
OutputUri = Annotated[str, _UriOf(OUTPUT_SCHEMES)]
DnsLabel = Annotated[str, Field(pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|Ki|Mi|Gi|Ti|k|M|G|T)?$", max_length=20)]
Glob = Annotated[str, Field(min_length=1, max_length=200)]


def _micro_batch_size(value: object) -> int | str:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 65_536):
        return value
    raise ValueError("must be a whole number from 1 to 65536, or auto")


def _learning_rate(value: object) -> float | str:
    if value == "auto":
        return "auto"
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise ValueError("must be a number above 0 and at most 1, or auto")


# A union would give two errors for one fault; OpenAPI as Kubernetes has it knows no "number or text", so the
# API server takes any value for the rate and the operator judges it.
MicroBatchSize = Annotated[
    int | Literal["auto"],
    PlainValidator(_micro_batch_size),
    WithJsonSchema({"x-kubernetes-int-or-string": True}),
]
LearningRate = Annotated[
    float | Literal["auto"],
    PlainValidator(_learning_rate),
    WithJsonSchema({"x-kubernetes-preserve-unknown-fields": True}),
]


class RuntimeRef(Contract):
    """Which FineTuneRuntime (the platform's pool and defaults) the job runs on."""

    name: DnsLabel
    """Name of a FineTuneRuntime. It cannot be changed after the job is created."""

    rules = (Rule(cel="self.name == oldSelf.name", message="runtimeRef.name cannot be changed; create another job"),)


class Model(Contract):
    """The model to start from."""

    source: ModelUri
    """Where the model is: hf://org/name, a folder in Hugging Face layout or a single GGUF file by file:///path,
    pvc://claim/path or package://python_package/path. A GGUF file is dequantized once, before training."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Branch, tag or commit of an hf:// source. Pin a commit to make the job repeatable."""
    tokenizer: ModelUri | None = None
    """Where the tokenizer is, when it is not beside the model."""
    chat_template: Literal["tokenizer", "chatml", "plain"] = "tokenizer"
    """`tokenizer` uses the template that the tokenizer brings. `chatml` and `plain` are stored templates for a
    tokenizer without one; the template is saved with the artifact."""
    parameters: Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?[MBT]$", max_length=12)] | None = None
    """Size hint such as 135M or 8B. Planning reads it for `learningRate: auto`; without it the size is taken from
    the source's name, or from the model itself before training starts."""
    trust_remote_code: bool = False
    """Run Python code that the model repository ships. Leave it off unless you have read that code."""

    rules = (
        Rule(
            cel="!has(self.revision) || self.source.startsWith('hf://')",
            message="revision is only for an hf:// source; remove it",
            holds=lambda m: m.revision is None or m.source.startswith("hf://"),
            field="revision",
        ),
    )


class DataFormat(StrEnum):
    """How a row of data is laid out."""

    AUTO = "auto"
    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt-completion"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    TEXT = "text"


ColumnName = Annotated[str, Field(min_length=1, max_length=200)]


class Columns(Contract):
    """Names of the columns in the data where they differ from the format's own."""

    messages: ColumnName | None = None
    """messages: the list of {role, content}."""
    conversations: ColumnName | None = None
    """sharegpt: the list of {from, value}."""
    prompt: ColumnName | None = None
    """prompt-completion: what the model is given."""
    completion: ColumnName | None = None
    """prompt-completion: what the model should answer."""
    instruction: ColumnName | None = None
    """alpaca: the task."""
    input: ColumnName | None = None
    """alpaca: what the task is about; may be empty."""
    output: ColumnName | None = None
    """alpaca: the answer."""
    system: ColumnName | None = None
    """alpaca, prompt-completion and sharegpt: a system message for the row; may be empty."""
    text: ColumnName | None = None
    """text: the document."""


class DataSource(Contract):
    """One source of rows."""

    source: DataUri
    """A file, a folder or a glob of jsonl, parquet, csv or txt files by file:///path, pvc://claim/path or
    package://python_package/path, or a dataset on the Hub by hf://org/name."""
    split: Annotated[str, Field(min_length=1, max_length=100)] | None = None
    """Split of an hf:// dataset; `train` when left out."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Branch, tag or commit of an hf:// dataset."""
    format: DataFormat = DataFormat.AUTO
    """Layout of a row. `auto` reads it from the columns of the first row."""
    columns: Columns | None = None
    """Column names where they differ from the format's own."""
    weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """How often a row of this source is seen per epoch: 1 is once, 0.5 is a random half of the rows, another half
    in the next epoch, 3 is three times."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Take only the first rows of the source."""

    rules = (
        Rule(
            cel="!has(self.split) || self.source.startsWith('hf://')",
            message="split is only for an hf:// source; name the file instead",
            holds=lambda d: d.split is None or d.source.startswith("hf://"),
            field="split",
        ),
        Rule(
            cel="!has(self.revision) || self.source.startsWith('hf://')",
            message="revision is only for an hf:// source; remove it",
            holds=lambda d: d.revision is None or d.source.startswith("hf://"),
            field="revision",
        ),
    )


class Data(Contract):
    """What the model learns from, and what it is judged on."""

    train: Annotated[list[DataSource], Field(min_length=1, max_length=32)]
    """Sources of training rows, mixed by their weights."""
    eval: Annotated[list[DataSource], Field(max_length=32)] = Field(default_factory=list)
    """Sources of evaluation rows. Weights are ignored: every row counts once."""


class Sft(Contract):
    """Supervised fine-tuning: learn to give the answers in the data."""

    max_seq_length: Annotated[int, Field(ge=16, le=1_048_576)] = 2048
    """Tokens in one training sequence. Packing fills sequences of this length."""
    packing: bool = True
    """Put several rows into one sequence, best fit first. Rows never attend to one another."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """`assistant` trains on the answers only, end-of-turn token included; `all` trains on every token."""
    long_rows: Literal["error", "truncate", "drop"] = "error"
    """What to do with a row longer than maxSeqLength: `error` stops before training and names the rows. Rows of
    format `text` are never refused; they are cut into consecutive sequences."""


class Method(Contract):
    """How the model learns: exactly one."""

    sft: Sft | None = None
    """Supervised fine-tuning."""

    rules = (exactly_one("sft"),)


class Full(Contract):
    """Train every parameter."""


class Quantization(StrEnum):
    """How the frozen base is stored while adapters train."""

    NONE = "none"
    INT8 = "int8"
    NF4 = "nf4"


class Lora(Contract):
    """Train low-rank adapters beside frozen weights (Hu et al. 2021, arXiv 2106.09685)."""

    rank: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the adapters."""
    alpha: Annotated[float, Field(gt=0, le=4096)] = 32
    """Scale of the adapters: their output is multiplied by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the adapters' input."""
    target_modules: Annotated[list[Glob], Field(min_length=1, max_length=64)] = Field(
        default_factory=lambda: ["q_proj", "v_proj"]
    )
    """Names of the linear layers that get an adapter. [all-linear] means all but the output head."""
    quantization: Quantization = Quantization.NONE
    """Store the frozen base in 8 bits (LLM.int8) or 4 bits (NF4). Needs bitsandbytes and zeroStage 0 to 2."""

    rules = (
        Rule(
            cel="!self.targetModules.exists(m, m == 'all-linear') || self.targetModules.size() == 1",
            message="all-linear stands alone; remove the other names or all-linear",
            holds=lambda lora: "all-linear" not in lora.target_modules or len(lora.target_modules) == 1,
            field="targetModules",
        ),
    )


class UnfreezeStep(Contract):
    """From one point of the training on, more layers learn."""

    at: Annotated[float, Field(gt=0, lt=1)]
    """Fraction of the training steps after which the layers start to learn."""
    layers: Annotated[list[Glob], Field(min_length=1, max_length=64)]
    """Patterns of parameter names that start to learn, such as model.layers.2?.*."""


class Freeze(Contract):
    """Train a part of the parameters, chosen by name; the rest stays as it is."""

    train: Annotated[list[Glob], Field(min_length=1, max_length=64)]
    """Patterns of the parameter names that learn from the first step, such as model.layers.2?.* or lm_head.*."""
    unfreeze: Annotated[list[UnfreezeStep], Field(max_length=16)] = Field(default_factory=list)
    """Progressive unfreezing: groups of layers that start to learn later, in the order of `at`."""

    rules = (
        Rule(
            cel="self.unfreeze.size() < 2 || self.unfreeze.all(a, self.unfreeze.exists_one(b, b.at == a.at))",
            message="two steps of unfreeze have the same `at`; join them",
            holds=lambda f: len({step.at for step in f.unfreeze}) == len(f.unfreeze),
            field="unfreeze",
        ),
    )


class Tuning(Contract):
    """Which parameters learn: exactly one."""

    full: Full | None = None
    """All of them."""
    lora: Lora | None = None
    """Low-rank adapters."""
    freeze: Freeze | None = None
    """Those whose names match."""

    rules = (exactly_one("full", "lora", "freeze"),)


class Precision(StrEnum):
    """Arithmetic of forward and backward; optimizer states and master weights are always fp32."""

    AUTO = "auto"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"


class EarlyStopping(Contract):
    """Stop when evaluation no longer gets better, and keep the best."""

    patience: Annotated[int, Field(ge=1, le=1000)] = 3
    """Evaluations without improvement before training stops."""
    min_delta: Annotated[float, Field(ge=0, le=100)] = 0.0
    """By how much the evaluation loss must fall to count as better."""


class GenerationEval(Contract):
    """Let the model answer at each evaluation and compare with the data's answers."""

    max_rows: Annotated[int, Field(ge=1, le=10_000)] = 32
    """Rows to answer, taken from the start of the evaluation data."""
    max_new_tokens: Annotated[int, Field(ge=1, le=32_768)] = 128
    """Longest answer."""


class OptimizerSettings(Contract):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101)."""

    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the running mean of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the running mean of squared gradients."""
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Decoupled weight decay; biases and normalisation weights are left out of it."""


class Training(Contract):
    """How long, how fast, and how precisely."""

    epochs: Annotated[int, Field(ge=1, le=10_000)] | None = None
    """Passes over the training data. Set this or maxSteps."""
    max_steps: Annotated[int, Field(ge=1, le=100_000_000)] | None = None
    """Optimizer steps. Set this or epochs."""
    global_batch_size: Annotated[int, Field(ge=1, le=1_048_576)] = 32
    """Sequences per optimizer step over all workers. It stays the same whatever the number of workers."""
    micro_batch_size: MicroBatchSize = "auto"
    """Sequences in one forward pass on one device; `auto` picks one by sequence length."""
    learning_rate: LearningRate = "auto"
    """Peak learning rate, such as 0.0002, or `auto`: a tenth of the pre-training rate of models of this size for full
    tuning, ten times that for LoRA."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Part of the steps over which the rate rises from zero."""
    min_learning_rate_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The rate at the end, as a fraction of the peak."""
    optimizer: OptimizerSettings = Field(default_factory=OptimizerSettings)
    """Settings of AdamW."""
    max_grad_norm: Annotated[float, Field(ge=0, le=1000)] = 1.0
    """Gradients are scaled down to this norm; 0 turns clipping off."""
    precision: Precision = Precision.AUTO
    """`auto` is bf16 on GPUs and fp32 on CPUs."""
    seed: Annotated[int, Field(ge=0, le=2_147_483_647)] = 42
    """Order of the data, dropout and new weights follow from it."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    log_every_steps: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Optimizer steps between two logged points."""
    eval_every_steps: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    """Optimizer steps between two evaluations. There is always one before the first step, one after each epoch and
    one at the end."""
    early_stopping: EarlyStopping | None = None
    """Stop when the evaluation loss no longer falls."""
    generation: GenerationEval | None = None
    """Also evaluate answers: exact match, BLEU and F1."""

    rules = (
        exactly_one("epochs", "max_steps"),
        Rule(
            cel="type(self.microBatchSize) == int"
            " ? self.microBatchSize >= 1 && self.microBatchSize <= 65536"
            " && self.globalBatchSize % self.microBatchSize == 0"
            " : self.microBatchSize == 'auto'",
            message="globalBatchSize must be a multiple of microBatchSize, which is a whole number from 1 to 65536, or auto",
            holds=lambda t: t.micro_batch_size == "auto" or t.global_batch_size % t.micro_batch_size == 0,
            field="globalBatchSize",
        ),
    )


class Offload(Contract):
    """What ZeRO keeps in the host's memory instead of the device's."""

    optimizer: Literal["none", "cpu"] = "none"
    """Optimizer states and the update. Needs zeroStage 1 or more."""
    parameters: Literal["none", "cpu"] = "none"
    """Parameters that are not in use. Needs zeroStage 3."""


class DeepSpeed(Contract):
    """How ZeRO spreads the training state over the workers (Rajbhandari et al. 2019, arXiv 1910.02054)."""

    zero_stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """0 copies everything to every device, 1 splits optimizer states, 2 also gradients, 3 also parameters. Left out:
    0 for one device, 2 for LoRA, 3 for the rest."""
    offload: Offload = Field(default_factory=Offload)
    """What goes to the host's memory."""
    config: Annotated[
        dict[str, Any], WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})
    ] = Field(default_factory=dict)
    """More keys of DeepSpeed's configuration file. Keys that this job sets itself are refused by name."""

    rules = (
        Rule(
            cel="self.offload.optimizer == 'none' || !has(self.zeroStage) || self.zeroStage >= 1",
            message="offload.optimizer needs zeroStage 1, 2 or 3",
            holds=lambda d: d.offload.optimizer == "none" or d.zero_stage is None or d.zero_stage >= 1,
            field="offload",
        ),
        Rule(
            cel="self.offload.parameters == 'none' || (has(self.zeroStage) && self.zeroStage == 3)",
            message="offload.parameters needs zeroStage 3",
            holds=lambda d: d.offload.parameters == "none" or d.zero_stage == 3,
            field="offload",
        ),
    )


class Workers(Contract):
    """The processes that train, in groups of equal size."""

    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    """Number of workers (pods in a cluster, processes on a laptop)."""
    gpus: Annotated[int, Field(ge=0, le=16)] | None = None
    """GPUs of one worker; each runs one training process. 0 trains on the CPU. Left out: what the runtime says, or 0."""
    cpus: Annotated[float, Field(gt=0, le=1024)] | None = None
    """CPU cores of one worker. Left out: what the runtime says, or the machine's cores shared evenly."""


class Cluster(Contract):
    """What the job runs on."""

    workers: Workers = Field(default_factory=Workers)
    """The training processes."""


class Output(Contract):
    """Where the trained model goes."""

    to: OutputUri
    """A folder by file:///path or pvc://claim/path. It must not hold an artifact yet."""
    merge: bool = False
    """LoRA: merge the adapters into the base and write a whole model instead of the adapters alone."""


class TensorBoardTracking(Contract):
    """Write TensorBoard event files beside the metrics file."""


class WandbTracking(Contract):
    """Log to Weights & Biases."""

    project: Annotated[str, Field(min_length=1, max_length=128)]
    """Project name."""
    entity: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Team or user."""
    mode: Literal["online", "offline"] = "online"
    """`offline` writes files that `wandb sync` sends later."""


class MlflowTracking(Contract):
    """Log to MLflow."""

    experiment: Annotated[str, Field(min_length=1, max_length=256)]
    """Experiment name."""
    tracking_uri: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Tracking server or a local store; MLFLOW_TRACKING_URI when left out."""


class Tracking(Contract):
    """Where metrics go besides the metrics file that is always written."""

    tensorboard: TensorBoardTracking | None = None
    """TensorBoard event files."""
    wandb: WandbTracking | None = None
    """Weights & Biases."""
    mlflow: MlflowTracking | None = None
    """MLflow."""


class FineTuneJobSpec(Contract):
    """What to train, on what data, how, and where."""

    runtime_ref: RuntimeRef | None = None
    """The platform's pool and defaults."""
    model: Model
    """The model to start from."""
    data: Data
    """Training and evaluation data."""
    method: Method
    """How the model learns."""
    tuning: Tuning
    """Which parameters learn."""
    training: Training
    """Length, batch, rates, evaluation."""
    deepspeed: DeepSpeed = Field(default_factory=DeepSpeed)
    """How the training state is spread."""
    cluster: Cluster = Field(default_factory=Cluster)
    """Number and size of workers."""
    outputs: Annotated[list[Output], Field(max_length=8)] = Field(default_factory=list)
    """Where the trained model is written. Left out: the run's own folder."""
    tracking: Tracking = Field(default_factory=Tracking)
    """Experiment trackers."""

    rules = (
        Rule(
            cel="!has(self.cluster.workers.gpus) || type(self.training.microBatchSize) != int"
            " || self.training.globalBatchSize % (self.training.microBatchSize * self.cluster.workers.replicas"
            " * (self.cluster.workers.gpus > 0 ? self.cluster.workers.gpus : 1)) == 0",
            message="training.globalBatchSize must be a multiple of microBatchSize × workers.replicas × workers.gpus",
            holds=lambda s: s._batch_divides(),
            field="training.globalBatchSize",
        ),
        Rule(
            cel="!has(self.tuning.lora) || self.tuning.lora.quantization == 'none'"
            " || !has(self.deepspeed.zeroStage) || self.deepspeed.zeroStage != 3",
            message="a quantized base cannot be split by zeroStage 3; set deepspeed.zeroStage to 2 or less",
            holds=lambda s: (
                s.tuning.lora is None or s.tuning.lora.quantization == "none" or s.deepspeed.zero_stage != 3
            ),
            field="deepspeed.zeroStage",
        ),
        Rule(
            cel="self.outputs.all(o, !o.merge) || has(self.tuning.lora)",
            message="merge is only for tuning.lora; remove it from outputs",
            holds=lambda s: s.tuning.lora is not None or not any(o.merge for o in s.outputs),
            field="outputs",
        ),
        Rule(
            cel="self.data.eval.size() > 0"
            " || !(has(self.training.earlyStopping) || has(self.training.evalEverySteps) || has(self.training.generation))",
            message="evaluation is asked for and data.eval is empty; add a source to data.eval",
            holds=lambda s: bool(s.data.eval) or not s._wants_evaluation(),
            field="data.eval",
        ),
        *(
            Rule(
                cel=f"self.{block} == oldSelf.{block}",
                message=f"spec.{block} cannot be changed; create another job",
                field=block,
            )
            for block in ("model", "data", "method", "tuning")
        ),
        Rule(
            cel="has(self.runtimeRef) == has(oldSelf.runtimeRef)",
            message="spec.runtimeRef cannot be added or removed; create another job",
            field="runtimeRef",
        ),
    )

    def _batch_divides(self) -> bool:
        micro, workers = self.training.micro_batch_size, self.cluster.workers
        if micro == "auto" or workers.gpus is None:
            return True  # planning decides, and checks again with the runtime's numbers
        return self.training.global_batch_size % (micro * workers.replicas * max(workers.gpus, 1)) == 0

    def _wants_evaluation(self) -> bool:
        training = self.training
        return any((training.early_stopping, training.eval_every_steps, training.generation))
