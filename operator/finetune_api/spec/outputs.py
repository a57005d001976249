"""Where the trained model and its figures go."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Contract
from finetune_api.spec.fields import OutputUri

__all__ = ["MlflowTracking", "Output", "TensorBoardTracking", "Tracking", "WandbTracking"]


class Output(Contract):
    """Where the trained model goes."""

    to: OutputUri
    """A folder by file:///path or pvc://claim/path, or a place in a bucket by s3:// or gs://. It must be empty."""
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
