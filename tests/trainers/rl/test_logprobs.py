"""Log-probabilities and entropy: by hand, against the naive form, and in pieces of any size."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from finetune_trainers.rl.logprobs import TokenStats, stats_from_hidden, stats_from_logits
from tests.trainers.rl.largest import Largest

LN3 = math.log(3)
POSITIONS, WIDTH, WORDS = 7, 3, 5


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> TokenStats:
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    return TokenStats(log_probs.gather(-1, tokens[..., None])[..., 0], torch.special.entr(log_probs.exp()).sum(-1))


TOKENS = torch.tensor([0, 4, 2, 2, 1, 3, 0])


def test_two_words_of_which_one_is_three_times_as_likely() -> None:
    stats = stats_from_logits(torch.tensor([[0.0, LN3], [0.0, LN3]]), torch.tensor([1, 0]))
    assert stats.log_probs.tolist() == pytest.approx([math.log(0.75), math.log(0.25)])
    assert stats.entropy.tolist() == pytest.approx([0.5623351] * 2)


def test_half_the_temperature_makes_it_nine_times_as_likely() -> None:
    stats = stats_from_logits(torch.tensor([[0.0, LN3]]), torch.tensor([0]), temperature=0.5)
    assert stats.log_probs.item() == pytest.approx(math.log(0.1))
    assert stats.entropy.item() == pytest.approx(0.3250830)


def test_the_head_is_applied_bias_and_all() -> None:
    weight = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    stats = stats_from_hidden(torch.tensor([[LN3 / 2, 7.0]]), weight, torch.tensor([1]), torch.tensor([0.0, LN3 / 2]))
    assert stats.log_probs.item() == pytest.approx(math.log(0.75))
    assert stats.entropy.item() == pytest.approx(0.5623351)


@settings(max_examples=50)
@given(chunk_elements=st.integers(1, 2 * POSITIONS * WORDS), temperature=st.floats(0.3, 3))
def test_the_size_of_the_pieces_does_not_matter(chunk_elements: int, temperature: float) -> None:
    logits = random(POSITIONS, WORDS).requires_grad_()
    wanted = naive(logits, TOKENS, temperature)
    found = stats_from_logits(logits, TOKENS, temperature=temperature, chunk_elements=chunk_elements)
    torch.testing.assert_close(found, wanted)
    pull = random(2, POSITIONS, seed=1)
    (wanted_grad,) = torch.autograd.grad(wanted, logits, tuple(pull))
    (grad,) = torch.autograd.grad(found, logits, tuple(pull))
    torch.testing.assert_close(grad, wanted_grad)


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_gradients_of_logits_are_those_of_small_differences(rows: int) -> None:
    def stats(logits: Tensor) -> tuple[Tensor, ...]:
        return stats_from_logits(logits, TOKENS, temperature=0.7, chunk_elements=rows * WORDS)

    assert torch.autograd.gradcheck(stats, (random(POSITIONS, WORDS).requires_grad_(),))


@pytest.mark.parametrize("rows", [1, 3, 100])
def test_gradients_of_hidden_states_and_of_the_head_are_those_of_small_differences(rows: int) -> None:
    def stats(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return stats_from_hidden(hidden, weight, TOKENS, bias, temperature=0.7, chunk_elements=rows * WORDS)

    inputs = (random(POSITIONS, WIDTH), random(WORDS, WIDTH, seed=1), random(WORDS, seed=2))
    assert torch.autograd.gradcheck(stats, tuple(tensor.requires_grad_() for tensor in inputs))


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight = random(POSITIONS, WIDTH).requires_grad_(), random(WORDS, WIDTH, seed=1)
    stats_from_hidden(hidden, weight, TOKENS).log_probs.sum().backward()  # type: ignore[no-untyped-call]
    assert hidden.grad is not None
    assert weight.grad is None


def test_sixteen_bit_logits_are_summed_in_thirty_two() -> None:
    logits = random(POSITIONS, WORDS, dtype=torch.bfloat16).requires_grad_()
    found = stats_from_logits(logits, TOKENS)
    torch.testing.assert_close(found, naive(logits.detach().float(), TOKENS))
    found.log_probs.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_the_gradient_of_a_sixteen_bit_head_is_summed_in_thirty_two() -> None:
    """1 + 2^-9 is 1 in bfloat16: summed in it, the small pieces would vanish one by one."""
    rows, small = 65, 2.0**-9
    hidden = torch.full((rows, 1), small, dtype=torch.bfloat16)
    hidden[0] = 1.0
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    stats_from_hidden(hidden, weight, torch.zeros(rows, dtype=torch.long), chunk_elements=2).log_probs.sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    assert weight.grad[0].item() == (1 + 64 * small) / 2


def test_all_logits_never_exist_at_once_forwards_or_backwards() -> None:
    positions, words = 64, 50
    hidden = random(positions, WIDTH).requires_grad_()
    weight = random(words, WIDTH, seed=1).requires_grad_()
    tokens = torch.zeros(positions, dtype=torch.long)
    with Largest(torch.float64) as largest:
        stats = stats_from_hidden(hidden, weight, tokens, chunk_elements=8 * words)
        (stats.log_probs + stats.entropy).sum().backward()  # type: ignore[no-untyped-call]
    assert largest.elements == 8 * words


def test_any_number_of_dimensions_before_the_last_is_kept() -> None:
    hidden, weight = random(2, 3, WIDTH), random(WORDS, WIDTH, seed=1)
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    torch.testing.assert_close(stats_from_hidden(hidden, weight, tokens), naive(hidden @ weight.T, tokens))
    torch.testing.assert_close(stats_from_logits(hidden @ weight.T, tokens), naive(hidden @ weight.T, tokens))


def test_no_positions_give_no_numbers() -> None:
    stats = stats_from_logits(torch.empty(0, WORDS), torch.empty(0, dtype=torch.long))
    assert stats.log_probs.shape == stats.entropy.shape == (0,)


def test_shapes_that_do_not_match_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits \[7, 5\] do not belong to tokens \[6\]"):
        stats_from_logits(random(POSITIONS, WORDS), TOKENS[:-1])
    with pytest.raises(ValueError, match=r"hidden \[7, 3\], weight \[5, 4\], tokens \[7\]"):
        stats_from_hidden(random(POSITIONS, WIDTH), random(WORDS, WIDTH + 1), TOKENS)


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature: 0 is not above 0"):
        stats_from_logits(random(POSITIONS, WORDS), TOKENS, temperature=0)
