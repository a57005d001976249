"""What a critic begins as: the model before training with a value of 0, or the reward model that judges its answers.

Called by `critic`, and by the launcher to check. As the reward model it says from the first token on what the answer
would be worth if it ended there, in the units of the reward: weight and calibration are in its head. The logistic
function of a squashed score is no part of a linear head; the line that touches it in the middle stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from finetune_api.failures import Problem
from finetune_api.plan import RunPlan
from finetune_api.problems import shorten
from finetune_api.spec import Ppo
from finetune_trainers.attention import PACKED_ATTENTION
from finetune_trainers.cpu_products import use_fast_products
from finetune_trainers.data.encoding import load_encoding
from finetune_trainers.errors import UserError
from finetune_trainers.frozen import not_split
from finetune_trainers.lean_peft import peft
from finetune_trainers.models import load_dtype, load_model
from finetune_trainers.online.reward_adapter import adapter_config, fill_adapter, head_weight, misfit
from finetune_trainers.precisions import DTYPES
from finetune_trainers.prepared import PreparedModel
from finetune_trainers.rewards.judge import load_report_off
from finetune_trainers.rewards.judge_checks import JudgeFiles, find_judge
from finetune_trainers.score_head import HEAD
from finetune_trainers.tuning import peft_warnings_off
from finetune_trainers.weights import WeightFiles, read_tensors

__all__ = ["RewardBeginning", "check_beginning", "reward_beginning"]


@dataclass(frozen=True)
class RewardBeginning:
    """A reward model that a critic begins as."""

    files: JudgeFiles
    gain: float
    """What a score is multiplied with to be a reward; then `offset` is added."""
    offset: float
    field: str
    source: str

    def adapter_config(self, model: PreparedModel) -> peft.LoraConfig:
        """Of the adapter that the critic becomes on the policy's frozen base. Raises UserError where it cannot."""
        fault = misfit(self.files, model)
        if fault is not None:
            raise self.refused(
                f"{fault}, and with tuning.lora the critic is an adapter on the policy's base; name a reward model that"
                " is a LoRA adapter of spec.model.source, or set critic.beginsAs to policy"
            )
        assert self.files.adapter is not None, "it is no misfit"
        return adapter_config(self.files.adapter)

    def fill_adapter(self, model: nn.Module, adapter: str) -> None:
        """Give the adapter of that name in `model` the reward model's weights. Raises UserError when they differ."""
        assert self.files.adapter is not None, "it is no misfit"
        fill_adapter(model, adapter, self.files.adapter, self.field)

    def backbone(
        self, plan: RunPlan, model: PreparedModel, device: torch.device, zero3_config: dict[str, Any] | None
    ) -> nn.Module:
        """A whole critic without its head. Collective under ZeRO-3. Raises UserError."""
        with load_report_off():
            if self.files.adapter is None:
                whole_one = model.model_copy(update={"folder": str(self.files.model)})
                found: nn.Module = load_model(whole_one, plan, device, zero3_config).base_model
                return found
            assert zero3_config is None, "it was checked"
            whole: Any = AutoModelForSequenceClassification.from_pretrained(
                self.files.model,
                dtype=load_dtype(plan),
                attn_implementation=PACKED_ATTENTION,
                local_files_only=True,
                num_labels=1,
            )
            with peft_warnings_off():
                merged: Any = peft.PeftModel.from_pretrained(whole, str(self.files.adapter)).merge_and_unload()
            backbone: nn.Module = merged.base_model.to(device)
        use_fast_products(backbone, DTYPES[plan.precision], device)
        return backbone.requires_grad_(True)

    def head(self, hidden_size: int, dtype: torch.dtype, device: torch.device) -> nn.Linear:
        """Values from hidden states, in the units of the reward. Raises UserError."""
        weight = head_weight(self.files.adapter) if self.files.adapter is not None else self._head_of_model()
        if tuple(weight.shape) != (1, hidden_size):
            raise self.refused(f"reads {weight.shape[1]} numbers for each token, and the critic has {hidden_size}")
        head = nn.Linear(hidden_size, 1, bias=True, dtype=dtype, device=device)
        with torch.no_grad():
            head.weight.copy_(weight.double() * self.gain)
            head.bias.fill_(self.offset)
        return head

    def _head_of_model(self) -> Tensor:
        files = WeightFiles.of(self.files.model)
        assert files is not None, "it was found"
        [name] = [name for name in files.shard_of if f".{name}".endswith(f".{HEAD}.weight")]
        return next(tensor for _, tensor in read_tensors(files, [name]))

    def refused(self, message: str) -> UserError:
        """About the reward model."""
        problem = Problem(path=f"{self.field}.source", value=shorten(self.source), message=message)
        return UserError(str(problem), [problem])


def check_beginning(plan: RunPlan, model: PreparedModel) -> None:
    """See before workers start that the critic can begin as the plan says. Raises UserError."""
    ppo = plan.method.ppo
    if ppo is None or ppo.critic.begins_as == "policy":
        return
    beginning = reward_beginning(ppo, plan, model)
    if plan.tuning.lora is not None:
        beginning.adapter_config(model)
    elif plan.deepspeed.zero_stage == 3 and beginning.files.adapter is not None:
        raise beginning.refused(
            "is an adapter, which is not merged into a model whose parameters are split (zeroStage 3); name a whole"
            " reward model, or set critic.beginsAs to policy"
        )


def reward_beginning(ppo: Ppo, plan: RunPlan, model: PreparedModel) -> RewardBeginning:
    """The plan's only reward model. Raises UserError when it does not read the policy's tokens."""
    [(index, weight, reward)] = [
        (index, one.weight, one.model) for index, one in enumerate(ppo.rewards) if one.model is not None
    ]
    field = f"spec.method.ppo.rewards[{index}].model"
    with not_split():
        files = find_judge(reward, field)
    beginning = RewardBeginning(files, *_line(files, weight), field, reward.source)
    ours = load_encoding(plan, model).tokenizer.to_str()
    if files.encoding.tokenizer.to_str() != ours:
        raise beginning.refused(
            "has another tokenizer than the policy, whose tokens the critic reads; set critic.beginsAs to policy"
        )
    return beginning


def _line(files: JudgeFiles, weight: float) -> tuple[float, float]:
    """(gain, offset): the reward is gain × score + offset."""
    calibration = files.calibration
    if calibration is None:
        return weight, 0.0
    gain, offset = weight / calibration.scale, -weight * calibration.mean / calibration.scale
    return (gain / 4, offset / 4 + weight / 2) if calibration.squash else (gain, offset)
