"""PPO over SFT over the base model, reward model included: what the reward model thinks of each, and what is forgotten.

    python -m tests.bench.bench_alignment [--seeds 3] [--iterations 30]

The real 135M model learns from documentation's own answers (the quickstart's data) in three jobs of `finetune run`:
SFT; a reward model, which prefers documentation's answer to each of two that the SFT model wrote; PPO from the SFT
model against it. Then each of the three models answers questions that no job has seen. Reported for each: the mean
score of its answers; their agreement with documentation's (ROUGE-L), which nobody optimised; and, as the probe for what
is forgotten, the loss on English of another kind, introductions to modules of Python that no data here has. Seeds
differ in everything that is drawn.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from finetune_trainers.rewards.metrics import rouge_l
from tests.bench.common import cache_folder, model_folder, timed_process, write_results

ROOT = Path(__file__).parents[2]
MAX_NEW_TOKENS = 48
MODELS = ("base", "sft", "ppo")
PROBES = ("turtle", "site", "pydoc", "doctest", "typing", "encodings", "pdb", "unittest", "cmd", "ftplib")


def job(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "finetune-operator.io/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": spec,
    }


def spec_of(model: str, data: Path, method: dict[str, Any], tuning: dict[str, Any], **training: Any) -> dict[str, Any]:
    return {
        "model": {"source": model},
        "data": {"train": [{"source": f"file://{data}"}]},
        "method": method,
        "tuning": tuning,
        "training": {"precision": "fp32"} | training,
    }


def finetune(arguments: Iterable[str], log: Path) -> None:
    timed_process(
        [str(Path(sys.executable).with_name("finetune")), *arguments], {"FINETUNE_CACHE": str(cache_folder())}, log
    )


def trained(folder: Path, name: str, spec: dict[str, Any]) -> Path:
    """Runs a job as a person would; the folder of the run."""
    manifest, workdir = folder / f"{name}.yaml", folder / name
    manifest.write_text(yaml.safe_dump(job(name, spec)))
    finetune(["run", str(manifest), "--workdir", str(workdir), "--quiet"], folder / f"{name}.log")
    return workdir


def answers(model: str | Path, questions: Path, to: Path, seed: int, num: int) -> list[dict[str, Any]]:
    """Rows of `questions` with `num` answers each, drawn at temperature 1."""
    options = ["--model", str(model), "--to", str(to), "-n", str(num), "--seed", str(seed)]
    finetune(
        ["data", "candidates", str(questions), *options, "--max-new-tokens", str(MAX_NEW_TOKENS)],
        to.with_suffix(".log"),
    )
    return read_rows(to)


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def make_data(folder: Path) -> None:
    """train.jsonl and eval.jsonl as conversations, and as questions with documentation's answer beside them."""
    script = ROOT / "manifests/samples/quickstart/make_data.py"
    subprocess.run([sys.executable, script, "--folder", folder], check=True, capture_output=True)
    for part in ("train", "eval"):
        turns = [row["messages"] for row in read_rows(folder / f"{part}.jsonl")]
        asked = ({"prompt": question["content"], "documented": said["content"]} for question, said in turns)
        write_rows(folder / f"{part}-questions.jsonl", asked)


def chain(data: Path, folder: Path, seed: int, iterations: int) -> dict[str, str]:
    """The three models and the reward model, by name, of one seed."""
    base = str(model_folder())
    given: dict[str, Any] = {"seed": seed, "globalBatchSize": 4}
    lora = {"lora": {"rank": 16, "alpha": 32}}
    sft = trained(
        folder,
        "sft",
        spec_of(
            f"file://{base}",
            data / "train.jsonl",
            {"sft": {"maxSeqLength": 256}},
            lora,
            **given,
            epochs=1,
            learningRate=1e-3,
        ),
    )
    whole = folder / "sft-whole"
    finetune(["export", str(sft), "--merge", "--to", str(whole)], folder / "export.log")
    written = answers(whole, data / "train-questions.jsonl", folder / "candidates.jsonl", seed, 2)
    pairs = (
        {"prompt": row["prompt"], "chosen": row["documented"], "rejected": answer}
        for row in written
        for answer in row["answers"]
        if answer != row["documented"]
    )
    preferences = write_rows(folder / "preferences.jsonl", pairs)
    reward = trained(
        folder,
        "reward",
        spec_of(
            f"file://{whole}",
            preferences,
            {"reward": {"maxSeqLength": 256}},
            {"full": {}},
            **given,
            epochs=1,
            learningRate=2e-5,
        ),
    )
    judge = artifact_of(reward)
    method = {
        "ppo": {
            "maxSeqLength": 160,
            "sampling": {"maxNewTokens": MAX_NEW_TOKENS},
            "rewards": [{"model": {"source": f"file://{judge}"}}],
            "passes": 2,
            "kl": {"coefficient": 0.02},
            "missingEosPenalty": 1.0,
        }
    }
    steps = {"maxSteps": 2 * iterations, "learningRate": 3e-4, "schedule": "constant"}
    ppo = trained(
        folder,
        "ppo",
        spec_of(
            f"file://{whole}", data / "train-questions.jsonl", method, lora, **(given | steps | {"globalBatchSize": 16})
        ),
    )
    aligned = folder / "ppo-whole"
    finetune(["export", str(ppo), "--merge", "--to", str(aligned)], folder / "export-ppo.log")
    return {"base": base, "sft": str(whole), "ppo": str(aligned), "judge": str(judge), "run": str(ppo)}


def artifact_of(workdir: Path) -> Path:
    """Of a run that is done."""
    return workdir / "artifact"


def mean_score(judge: str, rows: list[dict[str, Any]]) -> float:
    """Of all answers, by transformers alone."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(judge)
    model: Any = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()
    scores = []
    with torch.no_grad():
        for row in rows:
            for answer in row["answers"]:
                turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": answer}]
                text = tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
                given = tokenizer(text, add_special_tokens=False, return_tensors="pt")
                scores.append(float(model(**given).logits[0, 0]))
    return statistics.fmean(scores)


def agreement(rows: list[dict[str, Any]]) -> float:
    return statistics.fmean(rouge_l(answer, row["documented"]) for row in rows for answer in row["answers"])


def probe_texts() -> list[str]:
    """English that is no docstring of the data's modules, some thousand characters of each."""
    found = (inspect.getdoc(importlib.import_module(name)) for name in PROBES)
    return [text[:4000] for text in found if text]


def loss_on(model_of: str, texts: list[str]) -> float:
    """Nats per token."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_of)
    model: Any = AutoModelForCausalLM.from_pretrained(model_of, dtype=torch.float32).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for text in texts:
            ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=1024)["input_ids"]
            total += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    return total / count


def of_seed(data: Path, folder: Path, seed: int, iterations: int) -> dict[str, Any]:
    folder.mkdir()
    made = chain(data, folder, seed, iterations)
    texts = probe_texts()
    found: dict[str, Any] = {"seed": seed}
    for name in MODELS:
        rows = answers(made[name], data / "eval-questions.jsonl", folder / f"{name}-answers.jsonl", seed, 4)
        found[name] = {
            "score": round(mean_score(made["judge"], rows), 4),
            "rouge_l": round(agreement(rows), 4),
            "probe_loss": round(loss_on(made[name], texts), 4),
            "sample": rows[0]["answers"][0],
        }
    lines = map(json.loads, (Path(made["run"]) / "metrics.jsonl").read_text().splitlines())
    steps = [line["metrics"] for line in lines if "reward" in line["metrics"]]
    found["rewards"] = [round(step["reward"], 4) for step in steps]
    found["kl"] = [round(step["kl"], 5) for step in steps if "kl" in step]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=30, help="of PPO, 16 answers each")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-alignment-") as name:
        data = Path(name) / "data"
        make_data(data)
        seeds = []
        for seed in range(1, arguments.seeds + 1):
            seeds.append(of_seed(data, Path(name) / str(seed), seed, arguments.iterations))
            print(
                json.dumps({key: value for key, value in seeds[-1].items() if key not in ("rewards", "kl")}), flush=True
            )
    gains = [one["ppo"]["score"] - one["sft"]["score"] for one in seeds]
    margin, noise = statistics.fmean(gains), statistics.stdev(gains) if len(gains) > 1 else float("nan")
    mean = {
        model: {
            figure: round(statistics.fmean(one[model][figure] for one in seeds), 4)
            for figure in ("score", "rouge_l", "probe_loss")
        }
        for model in MODELS
    }
    results = {"margin": round(margin, 4), "deviation_between_seeds": round(noise, 4), "mean": mean, "seeds": seeds}
    print(f"PPO's answers score {margin:.3f} over SFT's, deviation between seeds {noise:.3f}; {mean}")
    if arguments.seeds > 1:
        write_results("alignment", {"iterations": arguments.iterations, **results})
    return int(not (min(gains) > 0 and margin > 2 * noise))


if __name__ == "__main__":
    sys.exit(main())
