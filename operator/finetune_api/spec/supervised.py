"""Methods that learn from whole texts as they stand: by the texts alone, or by what a teacher says of each token."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from finetune_api.base import Contract, Rule
from finetune_api.spec.fields import ModelUri, TokenizerUri, only_for_hub

__all__ = ["Distill", "LongRows", "MaxSeqLength", "Sft", "Supervised", "Teacher", "TeacherAnswers"]

MaxSeqLength = Annotated[int, Field(ge=16, le=1_048_576)]
LongRows: TypeAlias = Literal["error", "truncate", "drop"]


class Supervised(Contract):
    """What the methods have in common that learn from whole texts."""

    max_seq_length: MaxSeqLength = 2048
    """Tokens in one training sequence. Packing fills sequences of this length."""
    packing: bool = True
    """Put several rows into one sequence, best fit first. Rows never attend to one another."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """`assistant`: the answers only, with the end-of-turn token; `all`: every token."""
    long_rows: LongRows = "error"
    """A row longer than maxSeqLength: `error` stops before training, naming the rows. Those of format `text` are cut
    into consecutive sequences."""


class Sft(Supervised):
    """Supervised fine-tuning: learn to give the answers in the data."""


class Teacher(Contract):
    """The model that is learned from. It does not change. Each training process holds it, in the precision of the
    training, beside its part of the model that learns; zeroStage 3 splits it, too."""

    source: ModelUri
    """Where the teacher is, in the same ways as spec.model.source, job://name included."""
    revision: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    """Branch, tag or commit of an hf:// source."""
    tokenizer: TokenizerUri | None = None
    """Where the teacher's tokenizer is, when not beside the teacher. Tokens and their numbers must be those of the
    model's own."""
    trust_remote_code: bool = False
    """Run Python code that the teacher's repository ships. Leave it off unless you have read that code."""

    rules = (only_for_hub("revision", "remove it"),)


class TeacherAnswers(Contract):
    """How the teacher writes the answers that are learned from."""

    max_new_tokens: Annotated[int, Field(ge=1, le=131_072)] = 512
    """Longest answer; a longer one is cut there, and at maxSeqLength."""
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.0
    """0 takes the likeliest token always; 1 draws from the teacher's own probabilities."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Draw from the likeliest tokens that together have this probability."""


class Distill(Supervised):
    """Distillation: learn to give each next token the probability that a teacher gives it, on the texts in the data
    (Hinton et al. 2015, arXiv 1503.02531). The loss is a mean over trained tokens of
    (1 - alpha) × temperature² × divergence + alpha × cross-entropy."""

    teacher: Teacher
    """The model to learn from. It must have the same tokenizer."""
    divergence: Literal["forward-kl", "reverse-kl", "jsd"] = "forward-kl"
    """Distance to the teacher: `forward-kl` covers all that it may say, `reverse-kl` keeps to what it says most (Gu et
    al. 2023, arXiv 2306.08543), `jsd` lies between them as `beta` says (Agarwal et al. 2023, arXiv 2306.13649)."""
    beta: Annotated[float, Field(gt=0, lt=1)] | None = None
    """For divergence jsd: the teacher's share of the mixture that both are compared with. Left out: 0.5."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Both models' logits are divided by it: above 1 unlikely tokens count for more."""
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the answers' own cross-entropy; 0 learns from the teacher's probabilities alone, 1 (with
    teacherAnswers) from its answers alone."""
    teacher_answers: TeacherAnswers | None = None
    """Before the first step the teacher writes the last answer of each training row anew, in the model's own chat
    template, and that is learned from: with alpha 1, sequence-level distillation (Kim and Rush 2016, arXiv 1606.07947).
    Needs packing false. Left out: the data's answers, as in evaluation."""

    rules = (
        Rule(
            cel="!has(self.beta) || self.divergence == 'jsd'",
            message="beta is only for divergence jsd; remove it",
            holds=lambda m: m.beta is None or m.divergence == "jsd",
            field="beta",
        ),
        Rule(
            cel="self.alpha < 1.0 || has(self.teacherAnswers)",
            message="alpha 1 learns nothing from the teacher; lower it, set teacherAnswers, or use method.sft",
            holds=lambda m: m.alpha < 1 or m.teacher_answers is not None,
            field="alpha",
        ),
        Rule(
            cel="!has(self.teacherAnswers) || !self.packing",
            message="teacherAnswers needs packing false, since steps are counted before the answers are written",
            holds=lambda m: m.teacher_answers is None or not m.packing,
            field="packing",
        ),
        Rule(
            cel="!has(self.teacherAnswers) || self.lossOn == 'assistant'",
            message="teacherAnswers trains on the answers that are written alone; set lossOn to assistant",
            holds=lambda m: m.teacher_answers is None or m.loss_on == "assistant",
            field="lossOn",
        ),
    )

    @property
    def mixture(self) -> float:
        """The divergence as one number: the teacher's share of the mixture, 0 for forward and 1 for reverse KL."""
        ends = {"forward-kl": 0.0, "reverse-kl": 1.0}
        return ends.get(self.divergence, 0.5 if self.beta is None else self.beta)
