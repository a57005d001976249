"""What the server that `dying` forks from imports, so that no training needs to."""

from __future__ import annotations

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # read when DeepSpeed is imported

import deepspeed  # noqa: F401

import finetune_trainers.__main__
import finetune_trainers.launch
import finetune_trainers.models
import finetune_trainers.online.building
import finetune_trainers.online.critic
import finetune_trainers.saving
import finetune_trainers.worker  # noqa: F401
from finetune_trainers.lean_peft import peft  # noqa: F401
