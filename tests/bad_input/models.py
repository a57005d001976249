"""Models that cannot be trained, and jobs that do not fit theirs. A row spoils a good folder, or changes the job."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.data_sets import write_job
from tests.bad_input.rows import MODEL, Row
from tests.trainers.tiny import tiny_model, tiny_tokenizer

__all__ = ["MODELS"]

SOURCE = "spec.model.source"
Spoil = Callable[[Path], object]


def bad(
    what: str,
    spoil: Spoil,
    right: str,
    path: str = SOURCE,
    value: str | None = f"file://./{MODEL}",
    changes: Mapping[str, Any] | None = None,
) -> Row:
    """`spoil` is given the model's folder."""
    return Row(what, partial(write, spoil, changes or {}), right, path=path, value=value, found_by_looking=True)


def unfit(what: str, changes: Mapping[str, Any], path: str, value: str | None, right: str) -> Row:
    """The model is good, and the job asks for something that it has not."""
    return bad(what, lambda folder: None, right, path, value, changes)


def write(spoil: Spoil, changes: Mapping[str, Any], folder: Path) -> None:
    spoil(folder / MODEL)
    (folder / "train.jsonl").write_text('{"text": "one two"}\n')
    write_job(folder, changes)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(**changes: Any) -> Spoil:
    return lambda folder: edit_json(folder / "config.json", **changes)


def cut(size: int) -> Spoil:
    def spoil(folder: Path) -> None:
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:size])

    return spoil


def drop_tensor(path: Path, name: str) -> None:
    save_file({key: value for key, value in load_file(path).items() if key != name}, path, {"format": "pt"})


def resize_tensor(path: Path, name: str) -> None:
    save_file(load_file(path) | {name: torch.zeros(3, 3)}, path, {"format": "pt"})


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def without_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def with_remote_code(folder: Path) -> None:
    auto_map = {"AutoConfig": "configuration.Own", "AutoModelForCausalLM": "modeling.Own"}
    edit_json(folder / "config.json", model_type="own_thing", auto_map=auto_map)


def sharded(spoil: Spoil) -> Spoil:
    """The same model in several files, before it is spoilt."""

    def both(folder: Path) -> None:
        shutil.rmtree(folder)
        tiny_model(folder, max_shard_size="30KB")
        spoil(folder)

    return both


def without_second_shard(folder: Path) -> None:
    sorted(folder.glob("model-*.safetensors"))[1].unlink()


def without_what_the_index_promises(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    name, shard = next((name, shard) for name, shard in index.items() if list(index.values()).count(shard) > 1)
    drop_tensor(folder / shard, name)


def with_few_embeddings(folder: Path) -> None:
    shutil.rmtree(folder)
    tiny_model(folder, vocab_size=100)
    tiny_tokenizer().save_pretrained(folder.parent / "tokenizer")


def of_unknown_architecture(folder: Path) -> None:
    writer = gguf.GGUFWriter(folder.parent / "new.gguf", "nosucharch")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def file(name: str, content: bytes, what: str, right: str) -> Row:
    """A single file in the place of the model."""
    source = f"file://./{name}"
    value = f"./{name}" if name.endswith(".gguf") else source  # as it was looked for
    return bad(
        what,
        lambda folder: (folder.parent / name).write_bytes(content),
        right,
        value=value,
        changes={"model.source": source},
    )


UNFREEZE = {"tuning": {"freeze": {"train": ["model.norm.*"]}}}
NO_GGUF = "is not a whole GGUF file of an architecture that transformers knows"

MODELS = [
    # Folders
    bad("the folder is gone", shutil.rmtree, "no such file or folder; correct the path"),
    bad(
        "the folder holds no model",
        lambda f: (f / "config.json").unlink(),
        "has no config.json; name the folder of a model",
    ),
    bad("its config.json is not JSON", lambda f: (f / "config.json").write_text("{"), "; copy it again"),
    bad(
        "its config.json is a list",
        lambda f: (f / "config.json").write_text("[]"),
        "is not JSON: not an object; copy it again",
    ),
    bad(
        "its type is unknown",
        config(model_type="nosuch"),
        "knows no model_type nosuch; use a model of a type that it knows",
    ),
    bad(
        "its configuration makes no sense",
        config(hidden_size="wide"),
        "cannot be used: Validation error for field 'hidden_size'; copy it again",
    ),
    bad(
        "it is a classifier",
        config(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification is not a causal language model; its config.json must name one",
    ),
    bad(
        "it is a translator",
        config(model_type="t5", architectures=["T5ForConditionalGeneration"]),
        "T5ForConditionalGeneration is not a causal language model; its config.json must name one",
    ),
    bad(
        "it keeps a recurrent state",
        config(model_type="mamba", architectures=["MambaForCausalLM"]),
        "cannot keep packed documents apart; use a model with plain causal attention",
    ),
    bad(
        "it is an encoder",
        config(model_type="bert", architectures=["BertLMHeadModel"]),
        "BertLMHeadModel reads in both directions; use a model with plain causal attention",
    ),
    bad(
        "it counts positions its own way",
        config(model_type="roberta", architectures=["RobertaForCausalLM"], is_decoder=True),
        "RobertaForCausalLM counts positions its own way, which cannot keep packed documents apart; use",
    ),
    bad("it needs its own code", with_remote_code, "set trustRemoteCode: true", "spec.model.trustRemoteCode", "false"),
    # Weights
    bad(
        "it has no weights",
        lambda f: (f / "model.safetensors").unlink(),
        "has no model.safetensors and no model.safetensors.index.json; copy the whole model",
    ),
    bad(
        "its weights are pickles",
        pickled,
        "holds its weights as pickles, which can run code when read; convert them where you trust them",
    ),
    bad(
        "its weights are cut off",
        cut(20_000),
        "is cut off: 20000 bytes where its header promises 105072; copy it again",
    ),
    bad(
        "its weights are cut off inside the header",
        cut(100),
        "is not a safetensors file (100 bytes, header of 2024 bytes); copy it again",
    ),
    bad("its weights are empty", cut(0), "is not a safetensors file (0 bytes, header of 0 bytes); copy it again"),
    bad(
        "its weights are something else",
        lambda f: (f / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json" + bytes(99)),
        "its header cannot be read; copy it again",
    ),
    bad(
        "a tensor is missing",
        lambda f: drop_tensor(f / "model.safetensors", "model.norm.weight"),
        "the tensor model.norm.weight is in none of its 1 weight files; copy all of them",
    ),
    bad(
        "a tensor has another shape",
        lambda f: resize_tensor(f / "model.safetensors", "model.layers.1.mlp.up_proj.weight"),
        "up_proj.weight in model.safetensors has the shape [3, 3], and config.json says [48, 32]; copy both again",
    ),
    bad(
        "a shard is missing",
        sharded(without_second_shard),
        "model-00002-of-00004.safetensors: is missing; model.safetensors.index.json lists 4 shards; copy",
    ),
    bad(
        "the index of its shards is missing",
        sharded(lambda f: (f / "model.safetensors.index.json").unlink()),
        "and no model.safetensors.index.json; copy the whole model",
    ),
    bad(
        "the index of its shards is a list",
        sharded(lambda f: (f / "model.safetensors.index.json").write_text("[1]")),
        "is not an index: JSON with a weight_map from tensor to shard; copy it again",
    ),
    bad("a shard lacks a tensor", sharded(without_what_the_index_promises), "which is not in it; copy the whole model"),
    # Tokenizers
    bad(
        "it has no tokenizer", without_tokenizer, "the tokenizer is missing or broken: the folder needs tokenizer.json"
    ),
    bad(
        "its tokenizer is broken",
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "the tokenizer is missing or broken: the folder needs tokenizer.json",
    ),
    bad(
        "its tokenizer is a larger model's",
        with_few_embeddings,
        "embeddings for 100; name the tokenizer that belongs to the model",
        "spec.model.tokenizer",
        "file://./tokenizer",
        {"model.tokenizer": "file://./tokenizer"},
    ),
    # Other sources
    file(
        "notes.txt",
        b"hello",
        "a file of words",
        "neither a folder in Hugging Face layout nor a GGUF file; name one of these",
    ),
    file("cut.gguf", b"GGUF\x03\0\0\0" + bytes(8), "a GGUF file that is cut off", NO_GGUF),
    file("other.gguf", b"ELF" + bytes(500), "a GGUF file that is a program", NO_GGUF),
    file("empty.gguf", b"", "an empty GGUF file", NO_GGUF),
    bad(
        "a GGUF file of an unknown architecture",
        of_unknown_architecture,
        "nosucharch",
        value="./new.gguf",
        changes={"model.source": "file://./new.gguf"},
    ),
    unfit(
        "a model's package that is not installed",
        {"model.source": "package://no_such_package_at_all/model"},
        SOURCE,
        "package://no_such_package_at_all/model",
        "no_such_package_at_all is not installed here; pip install it",
    ),
    unfit(
        "a model's package without the model",
        {"model.source": "package://json/model.gguf"},
        SOURCE,
        "package://json/model.gguf",
        "has no such file or folder; correct the path",
    ),
    # What the job asks of the model
    unfit(
        "sequences longer than the model's positions",
        {"method.sft.maxSeqLength": 257},
        "spec.method.sft.maxSeqLength",
        "257",
        "the model has 256 positions; set at most that",
    ),
    unfit(
        "LoRA targets that match nothing",
        {"tuning": {"lora": {"targetModules": ["q_proj", "query"]}}},
        "spec.tuning.lora.targetModules[1]",
        "query",
        "it has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
    ),
    unfit(
        "LoRA on a tied output head",
        {"tuning": {"lora": {"targetModules": ["lm_head"]}}},
        "spec.tuning.lora.targetModules",
        "lm_head",
        "shares its weights with the embeddings; leave it out",
    ),
    unfit(
        "a pattern of freeze.train that matches nothing",
        {"tuning": {"freeze": {"train": ["model.layers.1.*", "head.*"]}}},
        "spec.tuning.freeze.train[1]",
        "head.*",
        "names look like model.embed_tokens.weight",
    ),
    unfit(
        "a pattern of unfreeze that matches nothing",
        UNFREEZE | {"tuning.freeze.unfreeze": [{"at": 0.5, "layers": ["model.layers.9.*"]}]},
        "spec.tuning.freeze.unfreeze[0].layers[0]",
        "model.layers.9.*",
        "matches no parameter of the model; names look like",
    ),
    unfit(
        "an unfreeze step whose layers learn already",
        {
            "tuning": {
                "freeze": {"train": ["model.layers.*"], "unfreeze": [{"at": 0.5, "layers": ["model.layers.1.*"]}]}
            }
        },
        "spec.tuning.freeze.unfreeze[0].layers",
        "model.layers.1.*",
        "learns already before 0.5; remove the step or name other layers",
    ),
    unfit(
        "an unfreeze step whose layers an earlier one opened",
        UNFREEZE
        | {
            "tuning.freeze.unfreeze": [
                {"at": 0.6, "layers": ["model.layers.1.*"]},
                {"at": 0.2, "layers": ["model.layers.*"]},
            ]
        },
        "spec.tuning.freeze.unfreeze[0].layers",
        "model.layers.1.*",
        "learns already before 0.6; remove the step or name other layers",
    ),
]
