"""A reward model's files, found and seen to be those of a reward model. Called by `building` before workers start, and
by `judge`, which loads them. No weights are read.

    config.json, model*.safetensors                      a sequence classifier with one label, or
    adapter_config.json, adapter_model.safetensors       an adapter with a head, beside the model that it names
    tokenizer.json, chat_template.jinja                  its own
    calibration.json                                     where its scores lie; method.reward writes it
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import nn
from transformers import AutoConfig

from finetune_api.failures import Problem
from finetune_api.problems import shorten
from finetune_api.spec import ModelReward
from finetune_trainers.artifact_folder import ADAPTER_WEIGHTS, CALIBRATION
from finetune_trainers.data.encoding import TextEncoding, open_encoding
from finetune_trainers.errors import UserError, first_line
from finetune_trainers.methods.reward import Calibration
from finetune_trainers.model_checks import packing_fault
from finetune_trainers.model_sources import locate_model
from finetune_trainers.models import meta_model
from finetune_trainers.score_head import HEAD, has_score_head
from finetune_trainers.weights import BrokenWeightsError, WeightFiles

__all__ = ["JudgeFiles", "check_judge", "find_judge"]

_INSTEAD = "name what method.reward trained, or a sequence classifier with one label"


@dataclass(frozen=True)
class JudgeFiles:
    """A reward model on this machine's disk."""

    model: Path
    """A folder with the classifier, or with the model that the adapter was trained on."""
    adapter: Path | None
    encoding: TextEncoding
    """Its own."""
    padding_id: int
    """The token that is not looked at; -1 for none."""
    calibration: Calibration | None
    """To be applied."""


def check_judge(reward: ModelReward, path: str) -> list[Problem]:
    """What is wrong with the reward model that stands at `path` of the job."""
    try:
        find_judge(reward, path)
    except UserError as error:
        return error.problems or [Problem(path=f"{path}.source", value=shorten(reward.source), message=error.message)]
    return []


def find_judge(reward: ModelReward, path: str) -> JudgeFiles:
    """The reward model's files. Raises UserError about `path`."""
    return _Finder(reward, path).find()


class _Finder:
    def __init__(self, reward: ModelReward, path: str) -> None:
        self._reward = reward
        self._path = path
        self._source = f"{path}.source"

    def find(self) -> JudgeFiles:
        folder = locate_model(self._reward.source, self._source, self._reward.revision)
        if not folder.is_dir():
            raise self._refused(f"is a file, and a reward model is a folder; {_INSTEAD}")
        adapter = folder if (folder / ADAPTER_WEIGHTS).is_file() else None
        model = folder if adapter is None else self._base(folder)
        config = self._config(model)
        self._check_head(folder, is_adapter=adapter is not None)
        self._check_architecture(config)
        encoding = open_encoding(self._tokenizer_folder(folder, model), self._source, self._reward.source)
        if encoding.template is None:
            raise self._refused(
                "has a tokenizer without a chat template, so it cannot be told a question from an answer"
            )
        padding_id = self._padding_id(config, encoding, is_adapter=adapter is not None)
        return JudgeFiles(model, adapter, encoding, padding_id, self._calibration(folder))

    def _refused(self, message: str) -> UserError:
        problem = Problem(path=self._source, value=shorten(self._reward.source), message=message)
        return UserError(str(problem), [problem])

    def _base(self, adapter: Path) -> Path:
        """The model that an adapter was trained on."""
        try:
            config = json.loads((adapter / "adapter_config.json").read_text())
            name, revision = str(config["base_model_name_or_path"]), config.get("revision")
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise self._refused("is an adapter without an adapter_config.json that names its base model") from None
        if Path(name).is_dir():
            return Path(name)
        if Path(name).is_absolute():
            message = (
                f"is an adapter of the model in {name}, which is not there; mount it where it was, or name it by hf://"
            )
            raise self._refused(message)
        return locate_model(f"hf://{name}", self._source, revision)

    def _config(self, folder: Path) -> Any:
        try:
            return AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # a configuration class may raise whatever it likes about its fields
            raise self._refused(f"the config.json in {folder} cannot be used: {first_line(error)}") from error

    def _check_head(self, folder: Path, is_adapter: bool) -> None:
        """transformers would fill a missing head with random numbers."""
        try:
            weights = WeightFiles.of_file(folder / ADAPTER_WEIGHTS) if is_adapter else WeightFiles.of(folder)
        except BrokenWeightsError as error:
            raise self._refused(str(error)) from error
        shapes = {} if weights is None else weights.shapes
        heads = [shape for name, shape in shapes.items() if f".{name}".endswith(f".{HEAD}.weight")]
        if not heads:
            kind = "an adapter" if is_adapter else "a model"
            raise self._refused(f"is {kind} without a score head, which would make up its scores; {_INSTEAD}")
        if len(heads[0]) != 2 or heads[0][0] != 1:
            raise self._refused(f"gives {heads[0][0]} scores for an answer, and a reward is one number; {_INSTEAD}")

    def _check_architecture(self, config: Any) -> None:
        if not has_score_head(config):
            raise self._refused(f"transformers knows no {config.model_type} with a score; {_INSTEAD}")
        model = meta_model(config, scores=True)
        fault = packing_fault(model)
        if fault is not None:
            raise self._refused(f"{fault}; use another reward model")
        if not isinstance(getattr(model, HEAD, None), nn.Linear):
            raise self._refused(f"{type(model).__name__} has no linear layer {HEAD}; {_INSTEAD}")

    def _tokenizer_folder(self, folder: Path, model: Path) -> Path:
        return folder if (folder / "tokenizer_config.json").is_file() else model

    def _padding_id(self, config: Any, encoding: TextEncoding, is_adapter: bool) -> int:
        """A classifier's configuration says it. An adapter has none: its tokenizer does."""
        stated = config.get_text_config().pad_token_id
        token = encoding.special_tokens.get("pad_token") if is_adapter else None
        found = encoding.tokenizer.token_to_id(str(token)) if token is not None else stated
        return -1 if found is None else int(found)

    def _calibration(self, folder: Path) -> Calibration | None:
        file, wanted = folder / CALIBRATION, self._reward.calibrated
        if wanted is False or (wanted is None and not file.is_file()):
            return None
        try:
            return Calibration.model_validate_json(file.read_bytes())
        except FileNotFoundError:
            message = f"the reward model has no {CALIBRATION}, which method.reward writes; leave calibrated out"
        except (OSError, ValidationError) as error:
            message = (
                f"the {CALIBRATION} of the reward model cannot be used: {first_line(error)}; set calibrated to false"
            )
        problem = Problem(path=f"{self._path}.calibrated", value=shorten(wanted), message=message)
        raise UserError(str(problem), [problem])
