"""fp32 products by oneDNN: those of nn.Linear up to the order of additions, and their gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from finetune_trainers import cpu_fp32, cpu_products
from finetune_trainers.cpu_fp32 import OneDnnLinear, linear
from finetune_trainers.cpu_products import use_fast_products

CPU = torch.device("cpu")
IN, OUT = 40, 24


@pytest.fixture(autouse=True)
def few_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_fp32, "FEW_PRODUCTS", 6 * IN * OUT)
    monkeypatch.setattr(cpu_fp32, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: True)


def drawn(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layers(bias: bool = True) -> tuple[nn.Linear, OneDnnLinear]:
    torch.manual_seed(3)
    plain, quick = nn.Linear(IN, OUT, bias), OneDnnLinear(IN, OUT, bias)
    quick.load_state_dict(plain.state_dict())
    return plain, quick


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(6,), (2, 7), (2, 3, 4)], ids=["rows", "a batch", "heads"])
def test_product_and_gradients_are_those_of_a_linear_layer(shape: tuple[int, ...], bias: bool) -> None:
    plain, quick = layers(bias)
    given = [drawn(*shape, IN).requires_grad_() for _ in (plain, quick)]
    wanted, found = plain(given[0]), quick(given[1])
    assert found.grad_fn is not None
    assert "Product" in found.grad_fn.name()
    torch.testing.assert_close(found, wanted)
    slope = drawn(*shape, OUT, seed=9)
    wanted.backward(slope)
    found.backward(slope)
    for mine, other in zip([given[1], *quick.parameters()], [given[0], *plain.parameters()], strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


def test_the_gradient_of_a_sum_is_one_number_in_many_places() -> None:
    plain, quick = layers()
    plain(drawn(8, IN)).sum().backward()
    quick(drawn(8, IN)).sum().backward()
    torch.testing.assert_close(quick.weight.grad, plain.weight.grad)


def test_a_frozen_weight_gets_no_gradient() -> None:
    _, quick = layers()
    quick.requires_grad_(False)
    x = drawn(8, IN).requires_grad_()
    quick(x).sum().backward()
    assert quick.weight.grad is None
    assert x.grad is not None


def test_the_same_product_is_the_same_to_the_last_bit() -> None:
    _, quick = layers()
    assert all(torch.equal(quick(drawn(8, IN)), quick(drawn(8, IN))) for _ in range(20))


@pytest.mark.parametrize(
    ("rows", "dtype"), [pytest.param(5, torch.float32, id="few"), pytest.param(64, torch.bfloat16, id="another type")]
)
def test_what_would_not_be_faster_goes_the_usual_way_to_the_last_bit(rows: int, dtype: torch.dtype) -> None:
    plain, quick = (one.to(dtype) for one in layers())
    x = drawn(rows, IN).to(dtype)
    assert torch.equal(quick(x), plain(x))
    assert torch.equal(linear(x, plain.weight, plain.bias), plain(x))


def test_autocast_decides_on_the_type() -> None:
    _, quick = layers()
    with torch.autocast("cpu", torch.bfloat16):
        assert quick(drawn(8, IN)).dtype is torch.bfloat16


def test_layers_that_compute_in_fp32_on_a_cpu_are_made_quick() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT), nn.LayerNorm(OUT), nn.Sequential(nn.Linear(OUT, IN)))
    use_fast_products(model, torch.float32, CPU)
    assert [type(module) for module in model.modules()].count(OneDnnLinear) == 2


@pytest.mark.parametrize(
    ("faster", "device"), [pytest.param(False, "cpu", id="not faster"), pytest.param(True, "cuda", id="a GPU")]
)
def test_elsewhere_layers_stay_as_they_are(monkeypatch: pytest.MonkeyPatch, faster: bool, device: str) -> None:
    monkeypatch.setattr(cpu_products, "onednn_is_faster", lambda: faster)
    model = nn.Sequential(nn.Linear(IN, OUT))
    use_fast_products(model, torch.float32, torch.device(device))
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("described", "faster"),
    [
        pytest.param("vendor_id\t: GenuineIntel\n", False, id="Intel"),
        pytest.param("vendor_id\t: AuthenticAMD\n", True, id="AMD"),
    ],
)
def test_it_is_faster_where_mkl_does_not_use_all_of_avx512(
    monkeypatch: pytest.MonkeyPatch, described: str, faster: bool
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(Path, "read_text", lambda path: described)
    assert cpu_fp32.onednn_is_faster.__wrapped__() is faster
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not cpu_fp32.onednn_is_faster.__wrapped__()
