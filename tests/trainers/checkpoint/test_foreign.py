"""Checkpoints go to torch DCP and to DeepSpeed and come back: what those load, and what they saved, is the same to the
bit."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from finetune_api.spec import Precision
from finetune_trainers.checkpoint.exports import ExportOptions, export_checkpoint
from finetune_trainers.checkpoint.imports import ImportOptions, import_checkpoint
from finetune_trainers.checkpoint.manifest import Manifest
from finetune_trainers.checkpoint.slices import even_slice
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from finetune_trainers.errors import UserError
from tests.trainers.checkpoint.trained import NOON, RATE, STATES, Training, contents
from tests.trainers.foreign_warnings import WHEN_TRAINING

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    *WHEN_TRAINING,
]
ALLOWED = ImportOptions(allow_pickle=True)


def imported(
    source: Path, to: Path, format_name: str, options: ImportOptions = ALLOWED
) -> tuple[Manifest, dict[tuple[str, str], bytes]]:
    storage = PosixStorage(str(to))
    manifest = import_checkpoint(source, storage, format_name, options, NOON)
    return manifest, contents(storage, manifest)


def steps(manifest: Manifest) -> set[Any]:
    return {count for group in manifest.intent.param_groups for count in group.options["steps"]}  # type: ignore[union-attr]


def exported(training: Training, folder: Path, format_name: str, **options: Any) -> Path:
    storage, manifest = training.save(folder / "run", 3)
    artifact = export_checkpoint(storage, manifest, str(folder / "out"), format_name, ExportOptions(**options))
    assert artifact.kind == format_name
    assert (folder / "out" / "digests.json").is_file()
    return folder / "out"


def other_training(decayed: bool = True) -> Training:
    """Of the same shapes, and other values in each of its tensors."""
    other = Training(decayed)
    for parameter in other.network.parameters():
        parameter.data.add_(1.0)
    return other


def test_torch_loads_what_goes_to_dcp_and_trains_on(tmp_path: Path) -> None:
    training, other = Training(), other_training()
    training.step(3)
    out = exported(training, tmp_path, "dcp")
    model, optimizer = get_state_dict(other.network, other.adamw)
    loaded: dict[str, Any] = {"model": model, "optimizer": optimizer}
    load(loaded, checkpoint_id=str(out), no_dist=True)
    set_state_dict(other.network, other.adamw, model_state_dict=model, optim_state_dict=loaded["optimizer"])
    assert other.contents() == training.contents()
    assert [group["weight_decay"] for group in other.adamw.param_groups] == [0.1, 0.0]
    for group in other.adamw.param_groups:
        assert group["lr"] == 0.0
        group["lr"] = RATE
    training.step()
    other.step()
    assert other.contents() == training.contents()


def test_long_tensors_go_to_dcp_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainers.checkpoint.exports.dcp._PIECE_BYTES", 3 * 13 * 4)
    training = Training()
    training.step(3)
    _, found = imported(exported(training, tmp_path, "dcp"), tmp_path / "back", "dcp")
    assert found == training.contents()
    pieces = {"0.weight": 3, "0.bias": 1, "1.weight": 1, "1.bias": 1, "2.weight": 1}
    assert len(list((tmp_path / "out").glob("*.distcp"))) >= 3 * sum(pieces.values())


def test_dcp_comes_back_as_it_went(tmp_path: Path) -> None:
    training = Training()
    training.step(3)
    manifest, found = imported(exported(training, tmp_path, "dcp"), tmp_path / "back", "dcp")
    assert found == training.contents()
    assert (manifest.intent.step, steps(manifest)) == (3, {3})


def test_what_torch_saves_is_read_whatever_wraps_it(tmp_path: Path) -> None:
    training = Training()
    training.step(2)
    model, optimizer = get_state_dict(training.network, training.adamw)
    state = {"app": {"model": model, "optim": optimizer}, "epoch": 4}
    save(state, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    manifest, found = imported(tmp_path / "dcp", tmp_path / "back", "dcp")
    assert found == training.contents()
    assert manifest.intent.step == 2


def test_safetensors_of_dcp_need_no_pickle(tmp_path: Path) -> None:
    training = Training()
    training.step()
    writer = HuggingFaceStorageWriter(str(tmp_path / "hf"), save_distributed=True)
    save(dict(training.named), storage_writer=writer, no_dist=True)
    manifest, found = imported(tmp_path / "hf", tmp_path / "back", "dcp", ImportOptions(step=7))
    assert found == {key: value for key, value in training.contents().items() if key[1] == "param"}
    assert (manifest.intent.step, steps(manifest)) == (7, {0})


def test_torch_reads_an_exported_model_without_a_pickle(tmp_path: Path) -> None:
    training, other = Training(), other_training()
    training.step()
    storage, manifest = training.save(tmp_path / "run", 1)
    export_checkpoint(storage, manifest, str(tmp_path / "out"), "hf", ExportOptions(dtype=Precision.FP32))
    loaded = {name: parameter.detach() for name, parameter in other.named.items()}
    load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path / "out")), no_dist=True)
    assert all(torch.equal(loaded[name], training.state(name, "param")) for name in loaded)


class Spy:
    """A pickle that would leave a file when it is executed."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("format_name", ["dcp", "deepspeed"])
def test_pickles_are_read_only_when_that_is_allowed(tmp_path: Path, format_name: str) -> None:
    training = Training()
    training.step(3)
    out = exported(training, tmp_path, format_name)
    with pytest.raises(UserError, match=r"a pickle can run any program when it is read; .* say so with --allow-pickle"):
        imported(out, tmp_path / "back", format_name, ImportOptions())
    assert not (tmp_path / "back").exists()


def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    training, mark = Training(), tmp_path / "mark"
    training.step(3)
    out = exported(training, tmp_path, "dcp")
    (out / ".metadata").write_bytes(pickle.dumps(Spy(mark)))
    with pytest.raises(
        UserError, match=r"it asks for .*touch, which no list of pieces needs|it asks for builtins\.getattr"
    ):
        imported(out, tmp_path / "back", "dcp")
    torch.save(Spy(mark), tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    torch.save({}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(UserError, match="is not read"):
        imported(tmp_path, tmp_path / "back", "deepspeed")
    assert not mark.exists()


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real one, with a group of one process."""
    from finetune_trainers.context import SingleProcessContext
    from finetune_trainers.engine_deepspeed import join_group
    from tests.trainers.factories import tiny_plan

    folder = tmp_path_factory.mktemp("group")
    join_group(SingleProcessContext(tiny_plan(folder, folder / "rows.jsonl"), folder))
    import deepspeed

    return deepspeed


def engine(deepspeed: Any, training: Training, stage: int, **config: Any) -> Any:
    settings = {"train_batch_size": 1, "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    made, *_ = deepspeed.initialize(model=training.network, optimizer=training.adamw, config=settings | config)
    return made


def train(made: Any, training: Training, count: int) -> None:
    for _ in range(count):
        made.backward(training.loss(made))
        made.step()


def masters(training: Training) -> dict[str, bytes]:
    """The parameters as DeepSpeed's engine holds them."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = training.named.items()
    return {name: safe_get_full_fp32_param(parameter).detach().numpy().tobytes() for name, parameter in named}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_loads_what_goes_to_it_and_trains_on(deepspeed: Any, tmp_path: Path, stage: int) -> None:
    two_groups = stage < 3  # see exports.deepspeed: ZeRO 3 gives all its groups one tensor for the step
    training, other = Training(two_groups), other_training(two_groups)
    training.step(3)
    out = exported(training, tmp_path, "deepspeed")
    made = engine(deepspeed, other, stage, checkpoint={"load_universal": True})
    made.load_checkpoint(str(out), load_lr_scheduler_states=False)
    assert made.global_steps == 3
    for more in (0, 1):
        train(made, other, more)
        training.step(more)
        found = training.contents()
        assert masters(other) == {name: found[name, "param"] for name in training.named}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_trains_on_from_what_it_saved_and_we_have_read(deepspeed: Any, tmp_path: Path, stage: int) -> None:
    training, other = Training(stage < 3), other_training(stage < 3)
    made = engine(deepspeed, training, stage)
    train(made, training, 3)
    counts = {int(state["step"]) for state in training.adamw.state.values()}
    made.save_checkpoint(str(tmp_path / "ds"))
    storage = PosixStorage(str(tmp_path / "ours"))
    manifest = import_checkpoint(tmp_path / "ds", storage, "deepspeed", ALLOWED, NOON)
    assert (manifest.intent.step, steps(manifest)) == (3, counts)
    export_checkpoint(storage, manifest, str(tmp_path / "out"), "deepspeed")
    again = engine(deepspeed, other, stage, checkpoint={"load_universal": True})
    again.load_checkpoint(str(tmp_path / "out"), load_lr_scheduler_states=False)
    for more in (0, 2):
        train(made, training, more)
        train(again, other, more)
        assert masters(other) == masters(training)


def test_a_universal_checkpoint_comes_back_as_it_went(tmp_path: Path) -> None:
    training = Training()
    training.step(3)
    for optimizer in ("torch", "deepspeed"):
        out = exported(training, tmp_path / optimizer, "deepspeed", optimizer=optimizer)
        manifest, found = imported(out, tmp_path / optimizer / "back", "deepspeed")
        assert found == training.contents()
        assert (manifest.intent.step, steps(manifest)) == (3, {3})


def rank_files(folder: Path, training: Training, world: int) -> None:
    """As ZeRO 3 lays them out for so many ranks: slices of equal length, the last ones padded."""
    folder.mkdir()
    shapes = [OrderedDict((name, training.named[name].shape) for name in names) for names, _ in training.groups]
    torch.save({"param_shapes": shapes, "global_steps": 3}, folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    for rank in range(world):
        flat = {
            state: [_padded(training, names, state, rank, world) for names, _ in training.groups] for state in STATES
        }
        moments = {group: {"step": torch.tensor(3.0), **{s: flat[s][group] for s in STATES[1:]}} for group in range(2)}
        state = {
            "zero_stage": 3,
            "partition_count": world,
            "fp32_flat_groups": flat["param"],
            "optimizer_state_dict": {"state": moments},
        }
        torch.save({"optimizer_state_dict": state}, folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


def _padded(training: Training, names: list[str], state: str, rank: int, world: int) -> torch.Tensor:
    pieces = []
    for name in names:
        whole = training.state(name, state).reshape(-1)
        start, end = even_slice(whole.numel(), rank, world)
        padding = -(-whole.numel() // world) - (end - start)
        pieces.append(torch.cat([whole[start:end], torch.full((padding,), torch.nan)]))
    return torch.cat(pieces)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_files_of_many_ranks_are_put_together(tmp_path: Path, world: int) -> None:
    training = Training()
    training.step(3)
    rank_files(tmp_path / "ds", training, world)
    _, found = imported(tmp_path / "ds", tmp_path / "back", "deepspeed")
    assert found == training.contents()


def test_files_of_a_rank_that_are_missing_are_missed(tmp_path: Path) -> None:
    training = Training()
    training.step(3)
    rank_files(tmp_path / "ds", training, 3)
    (tmp_path / "ds" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(UserError, match="does not have the files of all ranks"):
        imported(tmp_path / "ds", tmp_path / "back", "deepspeed")


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "another format": ("onnx", "out", {}, "there is no format 'onnx'; use one of hf, dcp, deepspeed"),
    "a bucket for dcp": ("dcp", "s3://bucket/place", {}, "is written to a folder of this machine"),
    "merging for dcp": ("dcp", "out", {"merge": True}, "--merge: the format dcp does not have it"),
    "another optimizer": ("deepspeed", "out", {"optimizer": "lion"}, "--optimizer: 'lion' is none"),
    "a role that it lacks": ("dcp", "out", {"role": "critic"}, "holds no parameters of 'critic'"),
    "merging a whole model": ("hf", "out", {"merge": True}, "of a whole model and has nothing to merge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_refused(tmp_path: Path, case: str) -> None:
    format_name, to, options, message = REFUSED[case]
    training = Training()
    training.step(3)
    storage, manifest = training.save(tmp_path / "run", 3)
    place = to if "://" in to else str(tmp_path / to)
    with pytest.raises(UserError, match=message):
        export_checkpoint(storage, manifest, place, format_name, ExportOptions(**options))
    assert not (tmp_path / "out").exists()
