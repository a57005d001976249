"""Log-probabilities and entropy: by hand, against the naive form, and in pieces of any size."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from finetune_trainers.rl import logprobs
from finetune_trainers.rl.logprobs import TokenStats, token_log_probs, token_stats
from tests.trainers.rl.largest import Largest

LN3 = math.log(3)
POSITIONS, WORDS = 7, 5
TOKENS = torch.tensor([0, 4, 2, 2, 1, 3, 0])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> TokenStats:
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    return TokenStats(log_probs.gather(-1, tokens[..., None])[..., 0], torch.special.entr(log_probs.exp()).sum(-1))


def test_two_words_of_which_one_is_three_times_as_likely() -> None:
    logits, tokens = torch.tensor([[0.0, LN3], [0.0, LN3]]), torch.tensor([1, 0])
    stats = token_stats(logits, tokens)
    assert stats.log_probs.tolist() == pytest.approx([math.log(0.75), math.log(0.25)])
    assert stats.entropy.tolist() == pytest.approx([0.5623351] * 2)
    assert torch.equal(token_log_probs(logits, tokens), stats.log_probs)


def test_half_the_temperature_makes_it_nine_times_as_likely() -> None:
    stats = token_stats(torch.tensor([[0.0, LN3]]), torch.tensor([0]), temperature=0.5)
    assert stats.log_probs.item() == pytest.approx(math.log(0.1))
    assert stats.entropy.item() == pytest.approx(0.3250830)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("rows", [1, 3, 1000])
def test_values_and_gradients_are_those_of_torch_whatever_the_size_of_the_pieces(
    rows: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", rows * WORDS)
    logits = random(POSITIONS, WORDS).requires_grad_()
    wanted = naive(logits, TOKENS, temperature)
    found = token_stats(logits * 1.0, TOKENS, temperature)
    torch.testing.assert_close(tuple(found), tuple(wanted))
    pull = random(POSITIONS, seed=1)
    grads = [torch.autograd.grad((of.log_probs * pull).sum(), logits)[0] for of in (wanted, found)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.3])
def test_of_sixteen_bit_logits_nothing_is_rounded_but_the_gradient(temperature: float) -> None:
    """Over a temperature in bfloat16 a log-probability would be off by hundredths of a nat."""
    logits = (6 * random(64, 1000)).bfloat16().requires_grad_()
    tokens = torch.arange(64)
    exact = logits.detach().double().requires_grad_()
    wanted, found = naive(exact, tokens, temperature), token_stats(logits * 1.0, tokens, temperature)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype is torch.float32
        torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-6)
    (grad,) = torch.autograd.grad(found.log_probs.sum(), logits)
    (wanted_grad,) = torch.autograd.grad(wanted.log_probs.sum(), exact)
    torch.testing.assert_close(grad.double(), wanted_grad, atol=1e-6, rtol=2**-8)


def test_a_wide_copy_of_all_logits_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    positions, words = 64, 50
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 8 * words)
    logits = random(positions, words).bfloat16().requires_grad_()
    with Largest(torch.float32) as largest:
        stats = token_stats(logits * 1.0, torch.zeros(positions, dtype=torch.long), temperature=0.7)
        stats.log_probs.sum().backward()  # type: ignore[no-untyped-call]
    assert largest.elements == 8 * words


def test_no_positions_give_no_numbers() -> None:
    stats = token_stats(torch.empty(0, WORDS), torch.empty(0, dtype=torch.long))
    assert stats.log_probs.shape == stats.entropy.shape == (0,)
