"""What a job or a runtime may add to the pods of its Ray cluster: a short list, and not the whole pod template.

A whole template would make the CRD a megabyte large, and would let a job undo what the platform set for safety.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import Contract, Rule, exactly_one

__all__ = ["EnvVar", "KeyOf", "ObjectName", "Pods", "Toleration", "Volume"]

LabelKey = Annotated[str, Field(min_length=1, max_length=317)]
LabelValue = Annotated[str, Field(max_length=63)]
ObjectName = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$", max_length=253)]


class KeyOf(Contract):
    """One key of a Secret or a ConfigMap in the job's namespace."""

    name: ObjectName
    """Name of the object."""
    key: Annotated[str, Field(min_length=1, max_length=253, pattern=r"^[-._a-zA-Z0-9]+$")]
    """Key in its data."""


class EnvVar(Contract):
    """An environment variable of the trainers."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=256)]
    """Name of the variable. Those that the operator sets itself (FINETUNE_*, RAY_*) are refused."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Its value. A password or token does not belong here: use secret."""
    secret: KeyOf | None = None
    """Take the value from a Secret. The operator only passes the name on; it cannot read secrets."""
    config_map: KeyOf | None = None
    """Take the value from a ConfigMap."""

    rules = (
        exactly_one("value", "secret", "config_map"),
        Rule(
            cel="!self.name.startsWith('FINETUNE_') && !self.name.startsWith('RAY_')",
            message="names that start with FINETUNE_ or RAY_ are set by the operator; choose another",
            holds=lambda e: not e.name.startswith(("FINETUNE_", "RAY_")),
            field="name",
        ),
    )


class Volume(Contract):
    """A volume that all pods of the job mount."""

    mount_path: Annotated[str, Field(pattern=r"^/[^:]*$", max_length=1024)]
    """Where it appears in the containers."""
    claim: ObjectName | None = None
    """A PersistentVolumeClaim. One that is named by a pvc:// URI is mounted without being listed here."""
    secret: ObjectName | None = None
    """A Secret; each key is a file."""
    config_map: ObjectName | None = None
    """A ConfigMap; each key is a file."""
    read_only: bool = False
    """Mount a claim without the right to write."""

    rules = (exactly_one("claim", "secret", "config_map"),)


class Toleration(Contract):
    """Lets pods run on nodes with a taint."""

    key: Annotated[str, Field(max_length=317)] | None = None
    """Key of the taint; left out, with operator Exists, all taints."""
    operator: Literal["Equal", "Exists"] = "Equal"
    """Compare the value, or only look whether the key is there."""
    value: LabelValue | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect of the taint; left out, all effects."""

    rules = (
        Rule(
            cel="has(self.key) || self.operator == 'Exists'",
            message="a toleration without a key needs operator Exists",
            holds=lambda t: t.key is not None or t.operator == "Exists",
            field="operator",
        ),
        Rule(
            cel="!has(self.value) || self.operator == 'Equal'",
            message="operator Exists compares no value; remove it",
            holds=lambda t: t.value is None or t.operator == "Equal",
            field="value",
        ),
    )


class Pods(Contract):
    """What is added to every pod of the job's Ray cluster. A job's entries come on top of its runtime's."""

    labels: Annotated[dict[LabelKey, LabelValue], Field(max_length=32)] = Field(default_factory=dict)
    """Labels. Those that the operator sets itself win."""
    annotations: Annotated[dict[LabelKey, Annotated[str, Field(max_length=4096)]], Field(max_length=32)] = Field(
        default_factory=dict
    )
    """Annotations."""
    node_selector: Annotated[dict[LabelKey, LabelValue], Field(max_length=32)] = Field(default_factory=dict)
    """Labels that a node must have, such as nvidia.com/gpu.product."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = Field(default_factory=list)
    """Taints that do not keep the pods away."""
    env: Annotated[list[EnvVar], Field(max_length=64)] = Field(default_factory=list)
    """Environment variables."""
    volumes: Annotated[list[Volume], Field(max_length=32)] = Field(default_factory=list)
    """Volumes."""
    image_pull_secrets: Annotated[list[ObjectName], Field(max_length=8)] = Field(default_factory=list)
    """Secrets that the kubelet pulls the image with."""
    writable_root: bool = False
    """The image writes outside /tmp, $HOME and volumes."""
