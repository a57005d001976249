"""The README.md of an artifact: what the model is, what it was made of, and how it did. Called by `artifact`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from finetune_api.plan import RunPlan
from finetune_api.progress import EvalSummary
from finetune_api.spec import Supervised, Tuning
from finetune_trainers.prepared import PreparedData, PreparedModel, PreparedSource

__all__ = ["CardFacts", "model_card"]


@dataclass(frozen=True)
class CardFacts:
    """What only the run knows."""

    data: PreparedData
    steps: int
    """Optimizer steps that made these weights."""
    epochs: float
    learning_rate: float
    """The peak."""
    eval: EvalSummary | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The last figures by name."""


def model_card(plan: RunPlan, prepared: PreparedModel, facts: CardFacts) -> str:
    """Markdown with the front matter that the Hub reads."""
    parts = [
        _front_matter(plan),
        f"# {plan.name}\n",
        f"{_source(plan)}, tuned by finetune-operator: {_tuning(plan.tuning)}.\n",
        "## Use\n\n" + _usage(plan),
        "## Data\n\n" + _data(facts.data),
        "## Settings\n\n" + _table("setting", "value", _settings(plan, prepared, facts)),
        "## Figures\n\n" + _table("figure", "value", _figures(facts)),
    ]
    return "\n".join(parts)


def _front_matter(plan: RunPlan) -> str:
    source = plan.model.source
    task = "text-classification" if plan.method.reward is not None else "text-generation"
    lines = [f"pipeline_tag: {task}", f"tags: [finetune-operator, {plan.method.chosen}]"]
    lines.insert(0, "library_name: " + ("peft" if plan.tuning.lora is not None else "transformers"))
    if source.startswith("hf://"):
        lines.append(f"base_model: {source.removeprefix('hf://')}")
    return "---\n" + "\n".join(lines) + "\n---\n"


def _source(plan: RunPlan) -> str:
    revision = f" at revision {plan.model.revision}" if plan.model.revision is not None else ""
    return f"`{plan.model.source}`{revision}"


def _tuning(tuning: Tuning) -> str:
    if tuning.lora is not None:
        lora = tuning.lora
        targets = ", ".join(lora.target_modules)
        stored = "" if lora.quantization == "none" else f", the base held in {lora.quantization}"
        return f"LoRA of rank {lora.rank}, alpha {lora.alpha:g}, dropout {lora.dropout:g} on {targets}{stored}"
    if tuning.freeze is not None:
        later = "".join(f", from {step.at:.0%} on {', '.join(step.layers)}" for step in tuning.freeze.unfreeze)
        return f"the parameters {', '.join(tuning.freeze.train)}{later}, the others as they were"
    return "all parameters"


def _usage(plan: RunPlan) -> str:
    """Right for an adapter's folder and, for a merged copy of it, for the whole model."""
    if plan.method.reward is not None:
        return _usage_of_score(plan)
    whole = 'AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")'
    if plan.tuning.lora is None:
        return f"```python\nfrom transformers import AutoModelForCausalLM\n\nmodel = {whole}\n```\n"
    return (
        "With `adapter_config.json` beside this file, these are adapters:\n\n"
        "```python\nfrom peft import AutoPeftModelForCausalLM\n\n"
        'model = AutoPeftModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")\n```\n\n'
        "Without it they are merged into the base, and plain transformers loads the model:\n\n"
        f"```python\nfrom transformers import AutoModelForCausalLM\n\nmodel = {whole}\n```\n"
    )


def _usage_of_score(plan: RunPlan) -> str:
    kind, package = "AutoModelForSequenceClassification", "transformers"
    if plan.tuning.lora is not None:
        kind, package = "AutoPeftModelForSequenceClassification", "peft"
    squash = " and put through the logistic function, which makes it 0 to 1" if _squashes(plan) else ""
    return (
        "A reward model: one number for a conversation that ends with an answer, higher for the better answer.\n\n"
        f"```python\nfrom {package} import {kind}\nfrom transformers import AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")\n'
        f'model = {kind}.from_pretrained("THIS_FOLDER", num_labels=1, dtype="auto")\n'
        "model.config.pad_token_id = tokenizer.pad_token_id\n"
        "score = model(**inputs).logits[:, 0]\n```\n\n"
        "Only differences of scores were learned. `calibration.json` says where they lie: use (score - mean) / scale"
        f"{squash}.\n"
    )


def _squashes(plan: RunPlan) -> bool:
    return plan.method.reward is not None and plan.method.reward.squash


def _data(data: PreparedData) -> str:
    lines = ["| part | source | weight | rows | tokens | trained tokens |", "|---|---|---|---|---|---|"]
    parts: list[tuple[str, PreparedSource]] = [("train", source) for source in data.train]
    parts += [("eval", source) for source in data.eval]
    lines += [
        f"| {part} | `{source.source}` | {source.weight:g} | {source.num_rows:,} | {source.num_tokens:,} |"
        f" {source.num_trained_tokens:,} |"
        for part, source in parts
    ]
    return "\n".join(lines) + "\n"


def _settings(plan: RunPlan, prepared: PreparedModel, facts: CardFacts) -> Iterable[tuple[str, str]]:
    optimization, batch = plan.optimization, plan.batch
    rate, adamw = optimization.learning_rate, optimization.adamw
    yield "parameters of the base", f"{prepared.num_parameters:,}"
    yield "blake3 of the base's weights", f"`{prepared.digest}`"
    supervised = plan.method.supervised
    if supervised is not None:
        yield "sequence length", f"{supervised.max_seq_length}, {'packed' if supervised.packing else 'one row each'}"
        yield "loss on", supervised.loss_on
    told = set(Supervised.model_fields) if supervised is not None else set()
    for name, value in plan.method.settings.model_dump(mode="json", by_alias=True, exclude=told).items():
        if value is not None:
            yield f"{plan.method.chosen}.{name}", str(value["source"]) if name == "teacher" else str(value)
    yield "optimizer steps", f"{facts.steps} ({facts.epochs:.2f} epochs)"
    yield f"{plan.method.counted} per step", str(batch.global_batch_size)
    yield "peak learning rate", f"{facts.learning_rate:g}, {rate.schedule}, warm-up {rate.warmup_fraction:.0%}"
    yield "AdamW", f"betas {adamw.beta1:g} and {adamw.beta2:g}, weight decay {adamw.weight_decay:g}"
    yield "largest gradient norm", f"{optimization.max_grad_norm:g}"
    yield "precision", plan.precision
    yield "seed", str(optimization.seed)
    yield "workers", f"{plan.workers.world_size} on {plan.workers.device}, ZeRO stage {plan.deepspeed.zero_stage}"


def _figures(facts: CardFacts) -> Iterable[tuple[str, str]]:
    if facts.eval is not None:
        for name, value in (
            ("evaluation loss before", facts.eval.loss_before),
            ("evaluation loss after", facts.eval.loss_after),
            ("reward before", facts.eval.reward_before),
            ("reward after", facts.eval.reward_after),
        ):
            if value is not None:
                yield name, f"{value:.4f}"
    for name, value in sorted(facts.metrics.items()):
        yield name, f"{value:.6g}"


def _table(first: str, second: str, rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join([f"| {first} | {second} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]) + "\n"
