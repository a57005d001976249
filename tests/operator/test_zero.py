"""DeepSpeed's configuration: what is compiled, what is merged in, and which keys a user may not set twice."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.plan import BatchPlan
from finetune_api.spec import DeepSpeed, FineTuneJobSpec, Precision
from finetune_operator.zero import RESERVED_KEYS, deepspeed_config, reserved_key_problems

BATCH = BatchPlan(global_batch_size=64, micro_batch_size=4, gradient_accumulation_steps=8, world_size=2)


def compiled(
    stage: int = 2, precision: Precision = Precision.BF16, max_grad_norm: float = 1.0, **asked: Any
) -> dict[str, Any]:
    """The configuration for `asked`, a deepspeed block in the spelling of YAML."""
    return deepspeed_config(DeepSpeed.model_validate(asked), stage, BATCH, precision, max_grad_norm)


def nested(path: str, value: Any) -> dict[str, Any]:
    """`value` at a dotted path in nested mappings."""
    for step in reversed(path.split(".")):
        value = {step: value}
    return dict(value)


def test_the_batch_is_the_plans() -> None:
    config = compiled()
    assert config["train_batch_size"] == 64
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 8


@pytest.mark.parametrize(
    ("precision", "enabled"),
    [("bf16", {"bf16"}), ("fp16", {"fp16"}), ("fp32", set())],
    ids=["bf16", "fp16", "fp32"],
)
def test_one_precision_is_on_and_fp32_is_none(precision: str, enabled: set[str]) -> None:
    config = compiled(precision=Precision(precision))
    assert {name for name in ("bf16", "fp16") if config[name]["enabled"]} == enabled


def test_fp16_scales_its_loss_dynamically() -> None:
    assert compiled(precision=Precision.FP16)["fp16"]["loss_scale"] == 0


def test_clipping_off_stays_off() -> None:
    assert compiled(max_grad_norm=0.0)["gradient_clipping"] == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_stage_is_the_one_that_planning_chose(stage: int) -> None:
    assert compiled(stage)["zero_optimization"] == {"stage": stage}


def test_offload_names_the_device_of_each_kind() -> None:
    zero = compiled(3, zeroStage=3, offload={"optimizer": "cpu", "parameters": "cpu"})["zero_optimization"]
    assert zero == {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}


def test_a_users_keys_are_merged_beside_the_compiled_ones() -> None:
    config = compiled(
        3,
        zeroStage=3,
        offload={"optimizer": "cpu"},
        config={
            "zero_optimization": {"overlap_comm": False, "offload_optimizer": {"pin_memory": True}},
            "wall_clock_breakdown": True,
        },
    )
    assert config["zero_optimization"] == {
        "stage": 3,
        "overlap_comm": False,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
    }
    assert config["wall_clock_breakdown"] is True


def test_merging_leaves_the_users_own_mapping_as_it_was() -> None:
    asked = DeepSpeed.model_validate({"config": {"zero_optimization": {"overlap_comm": True}}})
    deepspeed_config(asked, 1, BATCH, Precision.FP32, 1.0)
    assert asked.config == {"zero_optimization": {"overlap_comm": True}}


@pytest.mark.parametrize("key", RESERVED_KEYS)
def test_a_reserved_key_is_refused_by_name_with_the_field_to_set_instead(key: str) -> None:
    (problem,) = reserved_key_problems(nested(key, 7))
    assert problem.path == f"spec.deepspeed.config.{key}"
    assert problem.value == "7"
    assert problem.message == f"is set by this job; remove it and set spec.{RESERVED_KEYS[key]}"


def test_each_reserved_key_of_a_configuration_is_refused() -> None:
    config = {
        "optimizer": {"type": "Adam"},
        "zero_optimization": {"stage": 1, "overlap_comm": True},
        "amp": {},
    }
    assert [problem.path for problem in reserved_key_problems(config)] == [
        "spec.deepspeed.config.optimizer",
        "spec.deepspeed.config.zero_optimization.stage",
        "spec.deepspeed.config.amp",
    ]


FIELDS = sorted({field for fields in RESERVED_KEYS.values() for field in fields.split(" and ")})


@pytest.mark.parametrize("field", FIELDS)
def test_the_field_to_set_instead_exists(field: str) -> None:
    here: Any = FineTuneJobSpec
    for step in field.split("."):
        annotation = {info.alias: info.annotation for info in here.model_fields.values()}[step]
        here = next((part for part in (annotation, *get_args(annotation)) if hasattr(part, "model_fields")), None)


BLOCKS = [
    "bf16",
    "fp16",
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
]


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("value", [True, "on", None, [1], 3])
def test_a_block_with_reserved_keys_cannot_be_replaced_by_something_else(block: str, value: object) -> None:
    (problem,) = reserved_key_problems(nested(block, value))
    assert problem.path == f"spec.deepspeed.config.{block}"
    assert problem.message.startswith("must be a mapping")


VALUES = st.none() | st.booleans() | st.integers() | st.text(max_size=5)
KEYS = st.sampled_from(sorted({step for key in RESERVED_KEYS for step in key.split(".")} | {"x", "overlap_comm"}))
CONFIGS = st.dictionaries(KEYS, st.recursive(VALUES, lambda v: st.dictionaries(KEYS, v, max_size=3)), max_size=4)


@given(CONFIGS)
def test_an_accepted_configuration_leaves_every_compiled_value_alone(config: dict[str, Any]) -> None:
    if reserved_key_problems(config):
        return
    plain = compiled(3, zeroStage=3, offload={"optimizer": "cpu"})
    merged = compiled(3, zeroStage=3, offload={"optimizer": "cpu"}, config=config)

    def kept(before: Any, after: Any) -> bool:
        if isinstance(before, dict):
            return isinstance(after, dict) and all(kept(value, after.get(key)) for key, value in before.items())
        return bool(before == after)

    assert kept(plain, merged)
