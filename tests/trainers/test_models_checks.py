"""Models that cannot be trained are refused before any worker starts: one sentence, the field, what would be right."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from finetune_api.failures import Problem
from finetune_api.spec import Precision
from finetune_trainers.errors import UserError
from finetune_trainers.models import prepare_model
from tests.trainers.tiny import plan_for, tiny_model, tiny_tokenizer


def problems_of(folder: Path, changes: dict[str, Any] | None = None) -> list[Problem]:
    with pytest.raises(UserError) as caught:
        prepare_model(plan_for(folder, changes), folder.parent / "cache", lambda _percent, _text: None)
    assert "Traceback" not in caught.value.message
    return caught.value.problems


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def drop_tensor(path: Path, name: str) -> None:
    save_file({key: value for key, value in load_file(path).items() if key != name}, path, {"format": "pt"})


def resize_tensor(path: Path, name: str) -> None:
    save_file(load_file(path) | {name: torch.zeros(3, 3)}, path, {"format": "pt"})


class Fault(NamedTuple):
    """What is done to a good model folder, and what must be said of it."""

    spoil: Callable[[Path], object]
    says: str
    field: str = "spec.model.source"


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def with_remote_code(folder: Path) -> None:
    auto_map = {"AutoConfig": "configuration.Own", "AutoModelForCausalLM": "modeling.Own"}
    edit_json(folder / "config.json", model_type="own_thing", auto_map=auto_map)


FAULTS = {
    "the folder is gone": Fault(shutil.rmtree, "no such file or folder"),
    "the folder holds no model": Fault(lambda f: (f / "config.json").unlink(), "has no config.json"),
    "its config.json is not JSON": Fault(lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    "its config.json is a list": Fault(lambda f: (f / "config.json").write_text("[]"), "is not JSON"),
    "its type is unknown": Fault(
        lambda f: edit_json(f / "config.json", model_type="nosuch"), "knows no model_type nosuch"
    ),
    "its configuration makes no sense": Fault(
        lambda f: edit_json(f / "config.json", hidden_size="wide"), "cannot be used"
    ),
    "it is a classifier": Fault(
        lambda f: edit_json(f / "config.json", architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification is not a causal language model",
    ),
    "it is a translator": Fault(
        lambda f: edit_json(f / "config.json", model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "T5ForConditionalGeneration is not a causal language model",
    ),
    "it keeps a recurrent state": Fault(
        lambda f: edit_json(f / "config.json", model_type="mamba", architectures=["MambaForCausalLM"]),
        "cannot keep packed documents apart",
    ),
    "it is an encoder": Fault(
        lambda f: edit_json(f / "config.json", model_type="bert", architectures=["BertLMHeadModel"]),
        "BertLMHeadModel reads in both directions",
    ),
    "it counts positions its own way": Fault(
        lambda f: edit_json(
            f / "config.json", model_type="roberta", architectures=["RobertaForCausalLM"], is_decoder=True
        ),
        "RobertaForCausalLM counts positions its own way",
    ),
    "it needs its own code": Fault(with_remote_code, "set trustRemoteCode: true", "spec.model.trustRemoteCode"),
    "it has no weights": Fault(
        lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors and no model.safetensors.index.json"
    ),
    "its weights are pickles": Fault(pickled, "holds its weights as pickles"),
    "its weights are cut off": Fault(
        lambda f: cut(f / "model.safetensors", 20_000), "is cut off: 20000 bytes where its header promises"
    ),
    "its weights are cut off inside the header": Fault(
        lambda f: cut(f / "model.safetensors", 100), "is not a safetensors file"
    ),
    "its weights are empty": Fault(lambda f: cut(f / "model.safetensors", 0), "is not a safetensors file (0 bytes"),
    "its weights are something else": Fault(
        lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json" + bytes(99)),
        "its header cannot be read",
    ),
    "a tensor is missing": Fault(
        lambda f: drop_tensor(f / "model.safetensors", "model.norm.weight"),
        "the tensor model.norm.weight is in none of its 1 weight files",
    ),
    "a tensor has another shape": Fault(
        lambda f: resize_tensor(f / "model.safetensors", "model.layers.1.mlp.up_proj.weight"),
        "up_proj.weight in model.safetensors has the shape [3, 3], and config.json says [48, 32]",
    ),
    "it has no tokenizer": Fault(
        without_tokenizer,
        "the tokenizer is missing or broken",
    ),
    "its tokenizer is broken": Fault(
        lambda f: (f / "tokenizer.json").write_text("{}"), "the tokenizer is missing or broken"
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_model_is_refused_when(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    tiny_model(folder)
    fault = FAULTS[name]
    fault.spoil(folder)
    [problem] = problems_of(folder)
    assert problem.path == fault.field
    assert fault.says in problem.message


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model(folder, max_shard_size="30KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    [problem] = problems_of(folder)
    assert f"{shard.name}: is missing" in problem.message


def test_shards_without_their_index_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model(folder, max_shard_size="30KB")
    (folder / "model.safetensors.index.json").unlink()
    [problem] = problems_of(folder)
    assert "and no model.safetensors.index.json; copy the whole model" in problem.message


def test_an_index_that_is_not_one_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model(folder, max_shard_size="30KB")
    (folder / "model.safetensors.index.json").write_text("[1]")
    assert "is not an index" in problems_of(folder)[0].message


def test_a_shard_that_lacks_what_the_index_promises_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model(folder, max_shard_size="30KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name, shard = next((n, s) for n, s in index.items() if list(index.values()).count(s) > 1)
    drop_tensor(folder / shard, name)
    assert f"the index promises the tensor {name}" in problems_of(folder)[0].message


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    assert "neither a folder in Hugging Face layout nor a GGUF file" in problems_of(tmp_path / "notes.txt")[0].message


def test_a_broken_gguf_file_is_refused_and_leaves_nothing_behind(tmp_path: Path) -> None:
    for name, content in {"cut": b"GGUF\x03\0\0\0" + bytes(8), "other": b"ELF" + bytes(500), "empty": b""}.items():
        file = tmp_path / f"{name}.gguf"
        file.write_bytes(content)
        [problem] = problems_of(file)
        assert "is not a whole GGUF file of an architecture that transformers knows" in problem.message
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_gguf_file_of_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "new.gguf", "nosucharch")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "nosucharch" in problems_of(tmp_path / "new.gguf")[0].message


def test_a_package_that_is_not_installed_is_refused(tmp_path: Path) -> None:
    [problem] = problems_of(tmp_path, {"model.source": "package://no_such_package_at_all/model"})
    assert "no_such_package_at_all is not installed here" in problem.message


def test_a_package_without_the_resource_is_refused(tmp_path: Path) -> None:
    [problem] = problems_of(tmp_path, {"model.source": "package://json/model.gguf"})
    assert "has no such file or folder" in problem.message


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", vocab_size=100)
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    source = f"file://{tmp_path / 'tokenizer'}"
    [problem] = problems_of(tmp_path / "model", {"model.tokenizer": source})
    assert problem.path == "spec.model.tokenizer"
    assert problem.value == source
    assert "embeddings for 100" in problem.message


JOB_FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "sequences longer than the model's positions": (
        {"method.sft.maxSeqLength": 257},
        "spec.method.sft.maxSeqLength",
        "the model has 256 positions",
    ),
    "LoRA targets that are not there": (
        {"tuning": {"lora": {"targetModules": ["q_proj", "query"]}}},
        "spec.tuning.lora.targetModules[1]",
        "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    ),
    "LoRA on a tied output head": (
        {"tuning": {"lora": {"targetModules": ["lm_head"]}}},
        "spec.tuning.lora.targetModules",
        "shares its weights with the embeddings",
    ),
    "a pattern of freeze.train that matches nothing": (
        {"tuning": {"freeze": {"train": ["model.layers.1.*", "head.*"]}}},
        "spec.tuning.freeze.train[1]",
        "names look like model.embed_tokens.weight",
    ),
    "a pattern of unfreeze that matches nothing": (
        {"tuning": {"freeze": {"train": ["model.norm.*"], "unfreeze": [{"at": 0.5, "layers": ["model.layers.9.*"]}]}}},
        "spec.tuning.freeze.unfreeze[0].layers[0]",
        "matches no parameter",
    ),
    "an unfreeze step whose layers learn already": (
        {
            "tuning": {
                "freeze": {"train": ["model.layers.*"], "unfreeze": [{"at": 0.5, "layers": ["model.layers.1.*"]}]}
            }
        },
        "spec.tuning.freeze.unfreeze[0].layers",
        "learns already before 0.5",
    ),
    "an unfreeze step whose layers an earlier one opened": (
        {
            "tuning": {
                "freeze": {
                    "train": ["model.norm.*"],
                    "unfreeze": [
                        {"at": 0.6, "layers": ["model.layers.1.*"]},
                        {"at": 0.2, "layers": ["model.layers.*"]},
                    ],
                }
            }
        },
        "spec.tuning.freeze.unfreeze[0].layers",
        "learns already before 0.6",
    ),
}


@pytest.mark.parametrize("name", JOB_FAULTS)
def test_a_job_is_refused_for(tmp_path: Path, name: str) -> None:
    tiny_model(tmp_path / "model")
    changes, field, says = JOB_FAULTS[name]
    [problem] = problems_of(tmp_path / "model", changes)
    assert problem.path == field
    assert says in problem.message


def test_quantization_without_bitsandbytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    tiny_model(tmp_path / "model")
    [problem] = problems_of(tmp_path / "model", {"tuning": {"lora": {"quantization": "nf4"}}})
    assert problem.path == "spec.tuning.lora.quantization"
    assert "pip install 'finetune-operator[quantization]'" in problem.message


def test_fp16_on_a_cpu_is_refused_in_a_plan_that_was_not_made_by_planning(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    plan = plan_for(tmp_path / "model").model_copy(update={"precision": Precision.FP16})
    with pytest.raises(UserError, match=r"spec\.training\.precision: fp16 needs a GPU"):
        prepare_model(plan, tmp_path / "cache", lambda _percent, _text: None)


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    changes = {"method.sft.maxSeqLength": 1024, "tuning": {"lora": {"targetModules": ["w1", "w2"]}}}
    assert len(problems_of(tmp_path / "model", changes)) == 3
