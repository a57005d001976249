"""bf16 products that go through fp32: the value of a bf16 product, rounded once, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from finetune_trainers import cpu_bf16
from finetune_trainers.cpu_bf16 import Float32ProductLinear, use_float32_products

ROWS, IN, OUT = 6, 40, 24


def layer(dtype: torch.dtype, bias: bool = True) -> Float32ProductLinear:
    torch.manual_seed(3)
    return Float32ProductLinear(IN, OUT, bias=bias).to(dtype)


def values(dtype: torch.dtype) -> Tensor:
    return torch.randn(2, ROWS, IN, generator=torch.Generator().manual_seed(5)).to(dtype)


def exact_product(linear: nn.Linear, x: Tensor, bias: bool) -> Tensor:
    wide = x.double() @ linear.weight.double().t()
    return wide + linear.bias.double() if bias else wide


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("block", [1 << 20, 100], ids=["one block", "blocks of a few rows"])
def test_the_product_is_the_exact_one_rounded_once(monkeypatch: pytest.MonkeyPatch, block: int, bias: bool) -> None:
    monkeypatch.setattr(cpu_bf16, "BLOCK", block)
    linear, x = layer(torch.bfloat16, bias), values(torch.bfloat16)
    product = linear(x)
    assert product.dtype is torch.bfloat16
    # half a unit in the last of bf16's 8 bits, and what adding in fp32 may turn
    torch.testing.assert_close(product.double(), exact_product(linear, x, bias), rtol=2**-8 * 1.01, atol=1e-6)


@pytest.mark.parametrize("block", [1 << 20, 100], ids=["one block", "blocks of a few rows"])
def test_gradients_are_those_of_fp32_rounded_to_bf16(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(cpu_bf16, "BLOCK", block)
    linear, x = layer(torch.bfloat16), values(torch.bfloat16).requires_grad_()
    slope = torch.randn(2, ROWS, OUT, generator=torch.Generator().manual_seed(9)).bfloat16()
    linear(x).backward(slope)

    wide = nn.Linear(IN, OUT)
    wide.load_state_dict({name: value.float() for name, value in linear.state_dict().items()})
    wide_x = x.detach().float().requires_grad_()
    wide(wide_x).backward(slope.float())

    pairs = [(x, wide_x), (linear.weight, wide.weight), (linear.bias, wide.bias)]
    for found, expected in pairs:
        assert found.grad is not None
        assert expected.grad is not None
        assert found.grad.dtype is torch.bfloat16
        torch.testing.assert_close(found.grad.float(), expected.grad, rtol=2**-7, atol=1e-3)


def test_a_frozen_weight_gets_no_gradient() -> None:
    linear = layer(torch.bfloat16).requires_grad_(False)
    x = values(torch.bfloat16).requires_grad_()
    linear(x).sum().backward()
    assert linear.weight.grad is None
    assert x.grad is not None


def test_fp32_goes_the_usual_way_to_the_last_bit() -> None:
    linear, x = layer(torch.float32), values(torch.float32)
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_autocast_makes_bf16_of_fp32_weights_and_fp32_gradients_come_back() -> None:
    linear, x = layer(torch.float32), values(torch.float32).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        product = linear(x)
    assert product.dtype is torch.bfloat16
    product.float().sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.dtype is torch.float32
    rounded = nn.functional.linear(x.bfloat16().double(), linear.weight.bfloat16().double(), linear.bias.double())
    torch.testing.assert_close(product.double(), rounded, rtol=2**-7, atol=1e-3)


def test_only_plain_linear_layers_are_changed_and_their_parameters_stay() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    before = list(model.parameters())
    use_float32_products(model)
    assert [type(module) for module in model] == [Float32ProductLinear, nn.LayerNorm]
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
