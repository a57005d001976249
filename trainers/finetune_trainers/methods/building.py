"""The method that a plan names, with its data. Called by `worker` between loading the model and the first step."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import nn

from finetune_api.plan import RunPlan
from finetune_api.progress import Stage
from finetune_api.spec import Distill as DistillSettings
from finetune_trainers.context import WorkerContext
from finetune_trainers.data.batches import Batch, TrainBatches, all_sequences, batches_in_order, eval_batches
from finetune_trainers.data.order import TrainOrder
from finetune_trainers.methods import Method
from finetune_trainers.methods.distill import Distill
from finetune_trainers.methods.kto import Kto
from finetune_trainers.methods.pairs import Dpo, Orpo
from finetune_trainers.methods.references import References
from finetune_trainers.methods.reward import Reward
from finetune_trainers.methods.sft import Sft
from finetune_trainers.models import stored_tokenizer
from finetune_trainers.prepared import PreparedRun
from finetune_trainers.score_head import padding_token
from finetune_trainers.teacher import load_teacher

__all__ = ["build_method", "train_batches"]

_ALL_ROWS = slice(None)


def build_method(plan: RunPlan, prepared: PreparedRun, module: nn.Module, context: WorkerContext) -> Method:
    """`module` is the engine's, its weights as they were loaded: methods with a reference ask it now. Collective."""
    method = plan.method
    if method.online is not None:
        from finetune_trainers.online.building import build_online  # its imports are for jobs that write rollouts

        return build_online(plan, prepared, module, context)
    train = train_batches(plan, prepared, context)
    evaluation = partial(_eval_batches, plan, prepared, context)
    if method.sft is not None:
        return Sft(train, evaluation, context)
    if method.distill is not None:
        return _distill(method.distill, plan, prepared, context)
    if method.orpo is not None:
        return Orpo(method.orpo, train, evaluation, context)
    if method.reward is not None:
        tokenizer = stored_tokenizer(prepared.model, plan.model.trust_remote_code)
        padding_id = tokenizer.convert_tokens_to_ids(padding_token(tokenizer))
        assert isinstance(padding_id, int)
        sample = partial(_train_sample, plan, prepared, context)
        return Reward(method.reward, padding_id, train, evaluation, sample, context)
    references = References.of(prepared.data.train, train.visited(), module, prepared.model, plan, context)
    asked = all_sequences(prepared.data.eval)
    eval_references = References.of(prepared.data.eval, asked, module, prepared.model, plan, context)
    if method.dpo is not None:
        return Dpo(method.dpo, train, evaluation, references, eval_references, context)
    assert method.kto is not None, "a plan has one method"
    batches = partial(train_batches, plan, prepared, context)
    return Kto(method.kto, module, batches, evaluation, references, eval_references, context)


def _distill(settings: DistillSettings, plan: RunPlan, prepared: PreparedRun, context: WorkerContext) -> Method:
    assert prepared.teacher is not None, "a distillation was prepared with its teacher"
    context.report(Stage.LOADING_MODEL, message="Loading the teacher")
    teacher = load_teacher(prepared.teacher, plan, context.device)
    if settings.teacher_answers is not None:
        from finetune_trainers.methods.teacher_answers import with_teacher_answers  # for jobs that ask for them

        prepared = with_teacher_answers(plan, prepared, teacher, context)
    train = train_batches(plan, prepared, context)
    evaluation = partial(_eval_batches, plan, prepared, context)
    if settings.alpha == 1:  # the teacher has said all it has to say
        return Sft(train, evaluation, context)
    return Distill(settings, teacher, train, evaluation, context)


def train_batches(
    plan: RunPlan, prepared: PreparedRun, context: WorkerContext, rows: slice = _ALL_ROWS
) -> TrainBatches:
    """This rank's batches of every step, of all rows of a sequence or of some."""
    epochs = plan.optimization.epochs
    return TrainBatches(
        prepared.data,
        TrainOrder(prepared.data.train, plan.optimization.seed),
        plan.batch,
        prepared.total_steps,
        None if epochs is None else epochs * prepared.sequences_per_epoch,
        context.rank,
        by_sequence=plan.method.supervised is None,
        rows=rows,
    )


def _eval_batches(
    plan: RunPlan, prepared: PreparedRun, context: WorkerContext, rows: slice = _ALL_ROWS
) -> Iterable[Batch]:
    return eval_batches(prepared.data, plan.batch.micro_batch_size, context.world_size, context.rank, rows)


def _train_sample(plan: RunPlan, prepared: PreparedRun, context: WorkerContext) -> Iterable[Batch]:
    return batches_in_order(prepared.data.train, plan.batch.micro_batch_size, context.world_size, context.rank)
