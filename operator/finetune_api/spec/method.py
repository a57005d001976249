"""How the model learns: one block for each method."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from finetune_api.base import Choice, Contract, Rule, exactly_one
from finetune_api.spec.data import DataFormat
from finetune_api.spec.online import Grpo, Ppo
from finetune_api.spec.supervised import Distill, LongRows, MaxSeqLength, Sft, Supervised

__all__ = ["Dpo", "Kto", "Method", "MethodSettings", "Orpo", "Reward"]

_NOT_TO_IMITATE = (DataFormat.PREFERENCE, DataFormat.UNPAIRED_PREFERENCE, DataFormat.PROMPT)
Beta = Annotated[float, Field(gt=0, le=100)]


class Reward(Contract):
    """A reward model: learn a score that is higher for the answer that people preferred. The loss is that of Bradley
    and Terry, the mean over pairs of -log sigmoid(chosen - rejected - margin)."""

    max_seq_length: MaxSeqLength = 2048
    """Tokens of a prompt with one answer."""
    long_rows: LongRows = "error"
    """A pair longer than maxSeqLength with either answer: `error` stops before training, naming the rows, `truncate`
    cuts the answer's end, `drop` leaves the pair out."""
    center_coefficient: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of (chosen + rejected)², which keeps scores around zero; 0.01 is usual. Only differences are learned
    otherwise (Eisenstein et al. 2023, arXiv 2312.09244)."""
    squash: bool = False
    """Scores are to be read as sigmoid((score - mean) / scale), from 0 to 1; the artifact has both figures either
    way."""


class Dpo(Contract):
    """Direct preference optimisation: raise the odds of preferred answers beyond those of the model before training,
    which is the reference (Rafailov et al. 2023, arXiv 2305.18290)."""

    max_seq_length: MaxSeqLength = 2048
    """Tokens of a prompt with one answer."""
    long_rows: LongRows = "error"
    """A pair longer than maxSeqLength with either answer: `error` stops before training, naming the rows, `truncate`
    cuts the answer's end, `drop` leaves the pair out."""
    beta: Beta = 0.1
    """How strongly the model is held to the reference: more holds it closer."""
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """`sigmoid` is DPO, `ipo` is Azar et al. (arXiv 2310.12036), `hinge` is SLiC (arXiv 2305.10425)."""
    # Not lt=0.5: an API server compares whole numbers with the whole part of a bound, and 0 is not less than 0.
    label_smoothing: Annotated[float, Field(ge=0, le=0.49)] = 0.0
    """Share of pairs that are believed to be the wrong way round; for lossType sigmoid."""

    rules = (
        Rule(
            cel="self.labelSmoothing == 0.0 || self.lossType == 'sigmoid'",
            message="labelSmoothing is only for lossType sigmoid; set it to 0",
            holds=lambda m: m.label_smoothing == 0 or m.loss_type == "sigmoid",
            field="labelSmoothing",
        ),
    )


class Kto(Contract):
    """Kahneman-Tversky optimisation: learn from single answers marked good or bad, without pairs (Ethayarajh et al.
    2024, arXiv 2402.01306). The reference is the model before training."""

    max_seq_length: MaxSeqLength = 2048
    """Tokens of a prompt with its answer."""
    long_rows: LongRows = "error"
    """A row longer than maxSeqLength: `error` stops before training, naming the rows, `truncate` cuts the answer's end,
    `drop` leaves the row out."""
    beta: Beta = 0.1
    """How strongly the model is held to the reference: more holds it closer."""
    desirable_weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Weight of good answers. With fewer of one kind, weigh them so that weight × number is about the same for
    both."""
    undesirable_weight: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Weight of bad answers."""


class Orpo(Contract):
    """Odds ratio preference optimisation: supervised fine-tuning and preference in one pass, without a reference
    (Hong et al. 2024, arXiv 2403.07691)."""

    max_seq_length: MaxSeqLength = 2048
    """Tokens of a prompt with one answer."""
    long_rows: LongRows = "error"
    """A pair longer than maxSeqLength with either answer: `error` stops before training, naming the rows, `truncate`
    cuts the answer's end, `drop` leaves the pair out."""
    beta: Beta = 0.1
    """Weight of the odds ratio beside the chosen answer's own loss."""


MethodSettings: TypeAlias = Sft | Distill | Reward | Dpo | Kto | Orpo | Ppo | Grpo


class Method(Choice):
    """How the model learns: exactly one."""

    sft: Sft | None = None
    """Supervised fine-tuning."""
    distill: Distill | None = None
    """Distillation: supervised by a teacher's probabilities."""
    reward: Reward | None = None
    """A reward model, from pairs of answers."""
    dpo: Dpo | None = None
    """Direct preference optimisation, from pairs of answers."""
    kto: Kto | None = None
    """Kahneman-Tversky optimisation, from answers marked good or bad."""
    orpo: Orpo | None = None
    """Odds ratio preference optimisation, from pairs of answers."""

    ppo: Ppo | None = None
    """Proximal policy optimisation, from rewards for the model's own answers."""
    grpo: Grpo | None = None
    """Group relative policy optimisation, from rewards for the model's own answers."""

    rules = (exactly_one("sft", "distill", "reward", "dpo", "kto", "orpo", "ppo", "grpo"),)

    @property
    def settings(self) -> MethodSettings:
        """The block that is set."""
        blocks = (self.sft, self.distill, self.reward, self.dpo, self.kto, self.orpo, self.ppo, self.grpo)
        return next(one for one in blocks if one is not None)

    @property
    def supervised(self) -> Supervised | None:
        """The block of a method that learns from whole texts."""
        return self.sft or self.distill

    @property
    def online(self) -> Ppo | Grpo | None:
        """The block of a method that learns from what the model itself writes."""
        return self.ppo or self.grpo

    @property
    def formats(self) -> frozenset[DataFormat]:
        """The formats of data that it learns from, `auto` left out."""
        if self.supervised is not None:
            without = (
                {DataFormat.TEXT} if self.distill is not None and self.distill.teacher_answers is not None else set()
            )
            return frozenset(DataFormat) - {DataFormat.AUTO, *_NOT_TO_IMITATE} - without
        if self.online is not None:
            return frozenset({DataFormat.PROMPT})
        return frozenset({DataFormat.UNPAIRED_PREFERENCE if self.kto is not None else DataFormat.PREFERENCE})

    @property
    def rows_per_sequence(self) -> int:
        """Texts that one sequence of the data consists of, where packing does not decide it: a pair has two."""
        return 1 if self.supervised is not None or self.online is not None else 2

    @property
    def uses_per_row(self) -> int:
        """How often a row of the data is in a step's globalBatchSize before the next row's turn."""
        return 1 if self.online is None else self.online.rollouts_per_prompt * self.online.passes

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps after which the run can be left and gone on with."""
        return 1 if self.online is None else self.online.steps_per_iteration

    @property
    def counted(self) -> str:
        """What a step has globalBatchSize of."""
        if self.supervised is not None:
            return "sequences"
        if self.online is not None:
            return "rollouts"
        return "answers" if self.kto is not None else "pairs"
