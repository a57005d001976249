"""The README.md of an artifact: what the model is, what it was made of, and how it did. Called by `artifact`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from finetune_api.plan import RunPlan
from finetune_api.progress import EvalSummary
from finetune_api.spec import Tuning
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
    lines = ["pipeline_tag: text-generation", "tags: [finetune-operator, sft]"]
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
    if plan.method.sft is not None:
        sft = plan.method.sft
        yield "sequence length", f"{sft.max_seq_length}, {'packed' if sft.packing else 'one row each'}"
        yield "loss on", sft.loss_on
    yield "optimizer steps", f"{facts.steps} ({facts.epochs:.2f} epochs)"
    yield "sequences per step", str(batch.global_batch_size)
    yield "peak learning rate", f"{facts.learning_rate:g}, {rate.schedule}, warm-up {rate.warmup_fraction:.0%}"
    yield "AdamW", f"betas {adamw.beta1:g} and {adamw.beta2:g}, weight decay {adamw.weight_decay:g}"
    yield "largest gradient norm", f"{optimization.max_grad_norm:g}"
    yield "precision", plan.precision
    yield "seed", str(optimization.seed)
    yield "workers", f"{plan.workers.world_size} on {plan.workers.device}, ZeRO stage {plan.deepspeed.zero_stage}"


def _figures(facts: CardFacts) -> Iterable[tuple[str, str]]:
    if facts.eval is not None:
        for name, value in (("before", facts.eval.loss_before), ("after", facts.eval.loss_after)):
            if value is not None:
                yield f"evaluation loss {name}", f"{value:.4f}"
    for name, value in sorted(facts.metrics.items()):
        yield name, f"{value:.6g}"


def _table(first: str, second: str, rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join([f"| {first} | {second} |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]) + "\n"
