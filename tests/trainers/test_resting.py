"""The weights of a frozen model lie in its files while nobody asks it, and are the same ones when somebody does."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from finetune_trainers.errors import StorageError
from finetune_trainers.resting import RestingWeights


def frozen(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model whose file holds its weights as `dtype`, and the second of two biases with other values."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).requires_grad_(False)
    stored = {name: value.to(dtype) for name, value in module.state_dict().items()}
    module.load_state_dict(stored)
    save_file(stored | {"1.bias": stored["1.bias"] + 1}, folder / "model.safetensors")
    return module


def in_memory(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.numel()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_in_memory_while_the_model_is_asked_and_bit_for_bit_the_same(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    module = frozen(tmp_path, dtype)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    resting = RestingWeights(module, tmp_path)
    for _ in range(2):
        assert in_memory(module) == {"1.bias"}, "what is not in the file as it is in memory stays"
        with resting.at_work():
            found = module.state_dict()
            assert all(value.dtype is torch.float32 for value in found.values())
            assert all(torch.equal(found[name], value) for name, value in before.items())
    assert resting.num_resting_bytes == 4 * (12 + 4 + 8)


def test_they_rest_again_when_asking_fails(tmp_path: Path) -> None:
    module = frozen(tmp_path)
    resting = RestingWeights(module, tmp_path)
    with pytest.raises(ZeroDivisionError), resting.at_work():
        _ = 1 / 0
    assert in_memory(module) == {"1.bias"}


def test_a_model_without_such_files_stays_in_memory(tmp_path: Path) -> None:
    module = nn.Linear(2, 2).requires_grad_(False)
    assert RestingWeights(module, tmp_path).num_resting_bytes == 0
    assert in_memory(module) == {"weight", "bias"}


def test_what_learns_never_rests(tmp_path: Path) -> None:
    module = frozen(tmp_path).requires_grad_(True)
    assert RestingWeights(module, tmp_path).num_resting_bytes == 0


def test_a_file_put_in_its_place_is_not_read(tmp_path: Path) -> None:
    module = frozen(tmp_path)
    weight = module.get_parameter("0.weight").clone()
    resting = RestingWeights(module, tmp_path)
    save_file({"0.weight": weight + 1}, tmp_path / "other.safetensors")
    (tmp_path / "other.safetensors").replace(tmp_path / "model.safetensors")
    with resting.at_work():
        assert torch.equal(module.get_parameter("0.weight"), weight)


def test_a_file_that_was_changed_or_cut_ends_the_run_and_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    resting = RestingWeights(frozen(tmp_path), tmp_path)
    was = file.stat()
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns + 1))
    with pytest.raises(StorageError, match=r"model\.safetensors was changed while a run reads"), resting.at_work():
        pass
    os.truncate(file, 100)
    with pytest.raises(StorageError, match=r"model\.safetensors was changed"), resting.at_work():
        pass
