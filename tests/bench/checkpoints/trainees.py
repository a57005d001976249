"""The same training with one way of saving each, as processes that make steps and checkpoints when they are told to.

    with Trainee("ours", layers=3, folder=...) as ours:
        ours("steps 6")       -> {"steps": [seconds of each]}
        ours("save")          -> {"blocked": seconds, "steps": [seconds of those made until it is durable], ...}
        ours("durable")       -> {"seconds": from the call to the last byte on the disk, training standing still}

Ways: ours, dcp-thread and dcp-process (torch's distributed checkpoint, async_save), deepspeed (save_checkpoint of a
ZeRO-2 engine), ray-sync and ray-async (torch.save and ray.train.report in a Ray Train worker). All train a Llama of
random weights with our engines, in fp32, one process. Peers flush what they have written where they do not themselves;
that is counted as durable time, and not as blocked time.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from finetune_api.plan import RunPlan
from finetune_api.progress import Result
from finetune_operator.planning import plan_run
from tests.bench.checkpoints.state import flush
from tests.factories import job

__all__ = ["WAYS", "Trainee"]

WAYS = ("ours", "dcp-thread", "dcp-process", "deepspeed", "ray-sync", "ray-async")
TOKENS = 192
"""In a step."""
MOST_STEPS = 200
"""Made at most while a checkpoint is being written."""


class Trainee:
    """One process (under Ray: with its workers), from the outside."""

    def __init__(self, way: str, layers: int, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._log = (folder / "log").open("wb")
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = str(server.getsockname()[1])
            command = [sys.executable, "-m", "tests.bench.checkpoints.trainees", way, port, str(layers), str(folder)]
            self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log)
            server.settimeout(300)
            try:
                self._lines = server.accept()[0].makefile("rw")
            except TimeoutError:
                self._fail()

    def __enter__(self) -> Trainee:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(OSError):
            self._lines.close()
        try:
            self._process.wait(120)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __call__(self, told: str) -> dict[str, Any]:
        self._lines.write(told + "\n")
        self._lines.flush()
        line = self._lines.readline()
        if not line:
            self._fail()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _fail(self) -> None:
        self._process.kill()
        sys.exit(f"a way of saving has ended:\n{Path(self._log.name).read_text(errors='replace')[-3000:]}")


class Saver(Protocol):
    """A way of saving."""

    def save(self, step: int) -> None:
        """Returns when training may go on."""
        ...

    def is_durable(self) -> bool:
        """Nothing of the last checkpoint is left to be done. Flushes what its library has not."""
        ...


class Ours:
    def __init__(self, training: Training) -> None:
        from finetune_trainers.saving import Checkpoints

        assert training.plan.checkpoint is not None
        self._checkpoints = Checkpoints(
            training.plan,
            training.plan.checkpoint,
            training.prepared,
            training.engine,
            training.context,
            training.folder,
        )
        self._checkpoints.resume()
        self._step = 0

    def save(self, step: int) -> None:
        from finetune_trainers.loop import LoopMemory
        from finetune_trainers.saving import Votes

        self._step = step
        self._checkpoints.votes(step)
        self._checkpoints.after_step(step, Votes(due=1.0), LoopMemory)

    def is_durable(self) -> bool:
        from finetune_trainers.loop import LoopMemory

        sums = self._checkpoints.votes(self._step)
        if sums.failed:
            raise RuntimeError(f"{self._checkpoints.after_step(self._step, sums, LoopMemory)}")
        published = self._checkpoints.after_step(self._step, sums._replace(due=0.0), LoopMemory).checkpoint
        return published is not None and published.step == self._step


class Dcp:
    def __init__(self, training: Training, way: str) -> None:
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        self._training = training
        self._kind = AsyncCheckpointerType.PROCESS if way == "dcp-process" else AsyncCheckpointerType.THREAD
        if not torch.distributed.is_initialized():
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"})
            with socket.create_server(("127.0.0.1", 0)) as free:
                os.environ["MASTER_PORT"] = str(free.getsockname()[1])
            torch.distributed.init_process_group("gloo", rank=0, world_size=1)
        self._future: Future[Any] | None = None

    def save(self, step: int) -> None:
        from torch.distributed.checkpoint.state_dict_saver import async_save

        if self._future is not None:
            self._future.result()
        found: Any = async_save(
            self._training.state(),
            checkpoint_id=self._training.folder / f"dcp-{step % 2}",
            async_checkpointer_type=self._kind,
        )
        self._future = getattr(found, "upload_completion", found)

    def is_durable(self) -> bool:
        return self._future is None or self._future.done()


class DeepSpeed:
    def __init__(self, training: Training) -> None:
        self._training = training
        self._folder = training.folder / "deepspeed"
        self._tag = ""

    def save(self, step: int) -> None:
        self._tag = f"step-{step % 2}"
        self._training.engine.ds.save_checkpoint(str(self._folder), self._tag)

    def is_durable(self) -> bool:
        flush(self._folder / self._tag)
        return True


class Ray:
    def __init__(self, training: Training, way: str) -> None:
        from ray.train import CheckpointUploadMode

        self._training = training
        self._mode = CheckpointUploadMode.SYNC if way == "ray-sync" else CheckpointUploadMode.ASYNC
        self._count = 0

    def save(self, step: int) -> None:
        import ray.train

        folder = Path(tempfile.mkdtemp(dir=self._training.folder))
        torch.save(self._training.state(), folder / "state.pt")
        checkpoint = ray.train.Checkpoint.from_directory(str(folder))
        ray.train.report(
            {"step": step},
            checkpoint=checkpoint,
            checkpoint_upload_mode=self._mode,
            delete_local_checkpoint_after_upload=True,
        )
        self._count += 1

    def is_durable(self) -> bool:
        import ray.train

        try:
            done = ray.train.get_all_reported_checkpoints(
                consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED, timeout_s=0.01
            )
        except TimeoutError:
            return False
        if not done:
            return False
        flush(Path(done[-1].checkpoint.path))
        return True


class Training:
    """A model, its engine, and data that is always the same."""

    def __init__(self, way: str, layers: int, folder: Path, context: Any = None) -> None:
        from finetune_trainers.context import SingleProcessContext
        from finetune_trainers.launch import check
        from finetune_trainers.prepared import PreparedRun
        from finetune_trainers.worker import load

        self.folder = folder
        self.plan = plan_of(way, layers, folder)
        outcome = check(self.plan, folder, folder / "cache")
        if outcome.result is not Result.SUCCEEDED:
            sys.exit(f"preparing has failed: {outcome.failure}")
        self.prepared = PreparedRun.model_validate_json((folder / "prepared.json").read_bytes())
        self.context = context or SingleProcessContext(self.plan, folder)
        tuned, engine = load(self.plan, self.prepared, self.context)
        self.engine: Any = engine
        self.model = tuned.model
        self._tokens = torch.randint(0, 300, (1, TOKENS))
        self.step_number = 0

    def step(self) -> float:
        """Seconds of an optimizer step."""
        started = time.perf_counter()
        self.step_number += 1
        self.engine.begin_step(1e-5, 0.5)
        loss = self.engine.module(input_ids=self._tokens, labels=self._tokens).loss
        self.engine.backward(loss * TOKENS, TOKENS)
        self.engine.step()
        return time.perf_counter() - started

    def state(self) -> dict[str, Any]:
        """What a resume needs, as torch has it."""
        return {"model": self.model.state_dict(), "optimizer": self.engine.adamw.state_dict()}


def plan_of(way: str, layers: int, folder: Path) -> RunPlan:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": "the cat", "completion": f"sees {n}"}) + "\n" for n in range(64)))
    changes: dict[str, Any] = {
        "model.source": f"file://{model_of(layers, folder / 'model')}",
        "data": {"train": [{"source": f"file://{rows}"}]},
        "method": {"sft": {"maxSeqLength": 128}},
        "tuning": {"full": {}},
        "training": {"maxSteps": 1000, "globalBatchSize": 1, "learningRate": 1e-5, "precision": "fp32"},
        "cluster": {"workers": {"cpus": 2}},
        "checkpoint": {"everySteps": 1_000_000, "keepLast": 2},
    }
    if way == "deepspeed":
        changes["deepspeed"] = {"zeroStage": 2, "config": {"wall_clock_breakdown": False}}
    return plan_run(job(changes))


def model_of(layers: int, folder: Path) -> Path:
    """About 13 million parameters a layer: 154 MB of fp32 masters and moments."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.trainers.factories import tiny_model

    tiny_model(folder)  # its tokenizer
    config = LlamaConfig.from_pretrained(folder)
    config.update({"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": layers, "head_dim": 64})
    config.update({"num_attention_heads": 16, "num_key_value_heads": 16})
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def saver(way: str, training: Training) -> Saver:
    if way == "ours":
        return Ours(training)
    if way.startswith("dcp"):
        return Dcp(training, way)
    return DeepSpeed(training) if way == "deepspeed" else Ray(training, way)


def serve(way: str, port: int, layers: int, folder: Path) -> None:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    training = Training(way, layers, folder)
    training.step()  # makes the moments
    saving = saver(way, training)
    acts: dict[str, Callable[[str], dict[str, Any]]] = {
        "steps": lambda count: {"steps": [training.step() for _ in range(int(count))]},
        "save": lambda _: _save_and_go_on(training, saving),
        "durable": lambda _: _save_and_wait(training, saving),
    }
    with socket.create_connection(("127.0.0.1", port)) as connection, connection.makefile("rw") as lines:
        for line in lines:
            act, _, argument = line.strip().partition(" ")
            lines.write(json.dumps(acts[act](argument)) + "\n")
            lines.flush()


def _save_and_go_on(training: Training, saving: Saver) -> dict[str, Any]:
    started = time.perf_counter()
    saving.save(training.step_number)
    blocked = time.perf_counter() - started
    steps: list[float] = []
    while len(steps) < MOST_STEPS:
        steps.append(training.step())
        if saving.is_durable():
            break
    return {"blocked": blocked, "steps": steps}


def _save_and_wait(training: Training, saving: Saver) -> dict[str, Any]:
    training.step()
    started = time.perf_counter()
    saving.save(training.step_number)
    while not saving.is_durable():
        time.sleep(0.005)
    return {"seconds": time.perf_counter() - started}


def _in_ray(way: str, port: int, layers: int, folder: Path) -> None:
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    os.environ["RAY_TRAIN_V2_ENABLED"] = "1"
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": str(Path.cwd())}})
    trainer = TorchTrainer(
        lambda: serve(way, port, layers, folder),
        scaling_config=ScalingConfig(num_workers=1, resources_per_worker={"CPU": 2}),
        run_config=RunConfig(name="bench", storage_path=str(folder / "storage")),
    )
    trainer.fit()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("port", type=int)
    parser.add_argument("layers", type=int)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    act = _in_ray if given.way.startswith("ray") else serve
    act(given.way, given.port, given.layers, given.folder)


if __name__ == "__main__":
    main()
