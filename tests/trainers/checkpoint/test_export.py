"""Exported weights are those that were saved, in files that others open, however many ranks saved them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors import safe_open
from safetensors.torch import load_file

from finetune_trainers.checkpoint.commit import publish
from finetune_trainers.checkpoint.exports.precision import OutOfRangeError, converted
from finetune_trainers.checkpoint.exports.streaming import of_checkpoint, write_weights
from finetune_trainers.checkpoint.manifest import Manifest, TensorRecord
from finetune_trainers.checkpoint.shards import Slice
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.checkpoint.storage.protocol import Storage
from finetune_trainers.checkpoint.write import announce, write_rank
from finetune_trainers.errors import UserError
from tests.trainers.checkpoint import synthetic
from tests.trainers.checkpoint.saving import intent_of, save, start

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
TENSORS = (
    TensorRecord(name="embed.weight", shape=(70, 40), states={"param": "F32", "exp_avg": "F32"}),
    TensorRecord(name="norm.weight", shape=(3,), states={"param": "F32"}),
    TensorRecord(name="scale", shape=(), states={"param": "F32"}),
    TensorRecord(name="empty", shape=(0, 2), states={"param": "F32"}),
)


def saved(manifest: Manifest, name: str) -> torch.Tensor:
    index = next(i for i, tensor in enumerate(manifest.intent.tensors) if tensor.name == name)
    values = torch.from_numpy(synthetic.whole(manifest.intent, index, "param").view(np.float32).copy())
    return values.reshape(manifest.intent.tensors[index].shape)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """To the bit, but for the bits of a NaN: torch itself makes others on other processors."""
    return found.shape == expected.shape and found.dtype == expected.dtype and bits(found) == bits(expected)


def bits(tensor: torch.Tensor) -> bytes:
    one_nan = torch.where(tensor.isnan(), torch.nan, tensor)
    return one_nan.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def as_tensor(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype)


@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_a_model_is_exported_to_the_bit(storage: Storage, tmp_path: Path, world: int, dtype: str) -> None:
    manifest = save(storage, start(storage), 10, world=world, tensors=TENSORS)
    files = write_weights(PosixStorage(str(tmp_path / "out")), of_checkpoint(storage, manifest, dtype=dtype))
    assert list(files) == ["model.safetensors"]
    loaded = load_file(tmp_path / "out/model.safetensors")
    assert loaded.keys() == {tensor.name for tensor in TENSORS}
    for name, tensor in loaded.items():
        assert same(tensor, saved(manifest, name).to(TORCH[dtype])), name
    content = (tmp_path / "out/model.safetensors").read_bytes()
    assert files["model.safetensors"].bytes == len(content)
    assert files["model.safetensors"].digest == blake3(content).hexdigest()


def test_large_models_are_cut_between_tensors_with_an_index(storage: Storage, tmp_path: Path) -> None:
    manifest = save(storage, start(storage), 10, tensors=TENSORS)
    files = write_weights(PosixStorage(str(tmp_path / "out")), of_checkpoint(storage, manifest), max_shard_bytes=5600)
    assert list(files) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 2 * (2800 + 3 + 1)}
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert same(opened.get_tensor(name), saved(manifest, name).to(torch.bfloat16))


def test_only_what_is_named_is_exported_under_its_new_name(storage: Storage, tmp_path: Path) -> None:
    manifest = save(storage, start(storage), 10, tensors=TENSORS)
    names = {"norm.weight": "base_model.model.norm.weight"}
    weights = of_checkpoint(storage, manifest, names)
    write_weights(PosixStorage(str(tmp_path / "out")), weights, stem="adapter_model")
    assert load_file(tmp_path / "out/adapter_model.safetensors").keys() == {"base_model.model.norm.weight"}


def test_a_bucket_takes_an_export_as_well(storage: Storage) -> None:
    manifest = save(storage, start(storage), 10, tensors=TENSORS)
    files = write_weights(storage, of_checkpoint(storage, manifest))
    assert storage.size("model.safetensors") == files["model.safetensors"].bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "I8"}, "weights cannot be exported as I8; use one of BF16, F16, F32"),
        ({"role": "critic"}, "holds no tensors of 'critic' to export"),
        ({"names": {}}, "holds no tensors of 'model' to export"),
    ],
)
def test_what_cannot_be_exported_is_said(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    storage = PosixStorage(str(tmp_path / "run"))
    manifest = save(storage, start(storage), 10, tensors=TENSORS)
    with pytest.raises(UserError, match=message):
        of_checkpoint(storage, manifest, **arguments)  # type: ignore[arg-type]


def test_a_value_beyond_float16_is_named_and_no_file_is_left(tmp_path: Path) -> None:
    storage = PosixStorage(str(tmp_path / "run"))
    manifest = save(storage, start(storage), 10, tensors=TENSORS)
    with pytest.raises(UserError, match=r"embed\.weight cannot be exported as F16: the value .* is beyond 65504"):
        write_weights(PosixStorage(str(tmp_path / "out")), of_checkpoint(storage, manifest, dtype="F16"))
    assert [file.name for file in (tmp_path / "out").rglob("*")] == []


def test_rounding_is_that_of_torch() -> None:
    corners = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-9, 3.4e38, 1e-40, float("inf"), float("nan"), 65504.0]
    random = torch.randint(-(2**31), 2**31, (100_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    for values in (torch.tensor(corners), random.view(torch.float32)):
        data = values.numpy().data.cast("B")
        rounded = as_tensor(converted(data, "F32", "BF16"), torch.bfloat16)
        assert same(rounded, values.to(torch.bfloat16))
        fits = values[~(values.abs() > 65504) | values.isinf()]
        rounded = as_tensor(converted(fits.numpy().data.cast("B"), "F32", "F16"), torch.float16)
        assert same(rounded, fits.to(torch.float16))


def test_wider_types_hold_narrower_ones_exactly() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.arange(-128, 128).to(dtype)
        name = "BF16" if dtype is torch.bfloat16 else "F16"
        data = values.view(torch.uint8).numpy().data.cast("B")
        assert bytes(converted(data, name, "F32")) == bits(values.to(torch.float32))
    whole = memoryview(b"1234")
    assert converted(whole, "I32", "BF16") is whole


def test_an_infinity_that_was_there_is_no_overflow() -> None:
    data = np.array([np.inf, -np.inf], np.float32).data.cast("B")
    assert bytes(converted(data, "F32", "F16")) == np.array([np.inf, -np.inf], np.float16).tobytes()
    with pytest.raises(OutOfRangeError, match="-70000"):
        converted(np.array([1, -70000], np.float32).data.cast("B"), "F32", "F16")


def test_memory_is_that_of_a_few_blocks_whatever_the_size(tmp_path: Path) -> None:
    """160 MB of state; and of its own the export may take half of that."""
    storage, numel = PosixStorage(str(tmp_path / "run")), 40_000_000
    fence = start(storage)
    tensor = TensorRecord(name="large", shape=(numel,), states={"param": "F32"})
    intent = intent_of(fence, 10, world=1, tensors=(tensor,))
    zeros = memoryview(bytes(numel * 4))
    announce(storage, intent)
    held = [Slice(0, "param", 0, numel)]
    write_rank(storage, intent, 0, held, lambda piece: zeros[piece.start * 4 : piece.end * 4], {})
    manifest = publish(storage, fence, intent.id)
    tracemalloc.start()
    try:
        write_weights(PosixStorage(str(tmp_path / "out")), of_checkpoint(storage, manifest))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 80_000_000
