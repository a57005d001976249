"""DeepSpeed's own checkpoints, for comparison: one process per rank, which does what its standard input says.

    with Ranks(4, tensors=42, folder=...) as ranks:
        ranks("save", "a")              engine.save_checkpoint, then everything flushed -> seconds, of the slowest rank
        ranks("load", "a")              engine.load_checkpoint
    with Ranks(2, tensors=42, folder=..., universal=True) as ranks:
        ranks("load", "a_universal")    after `to_universal`

A ZeRO-2 engine in fp32 whose parameters are those of `state.tensors`. Run as a module it is one rank.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Answer", "Ranks", "to_universal"]


@dataclass(frozen=True)
class Answer:
    """What an act cost."""

    seconds: float
    """Of the slowest rank."""
    bytes_read: int
    """By all ranks, as the kernel counts their reads."""


class Ranks:
    """The processes of a world."""

    def __init__(self, world: int, tensors: int, folder: Path, universal: bool = False) -> None:
        port = str(_free_port())
        base = [sys.executable, "-m", "tests.bench.checkpoints.deepspeed_peer", "--world", str(world), "--port", port]
        base += ["--tensors", str(tensors), "--folder", str(folder)] + ["--universal"] * universal
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._logs = [(folder / f"deepspeed-{world}-{rank}.log").open("wb") for rank in range(world)]
        self._processes = [
            subprocess.Popen(
                [*base, "--rank", str(rank)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._logs[rank],
                text=True,
                env=environment,
            )
            for rank in range(world)
        ]

    def __enter__(self) -> Ranks:
        self._answers()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait(60)
        for log in self._logs:
            log.close()

    def __call__(self, act: str, tag: str) -> Answer:
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(f"{act} {tag}\n")
            process.stdin.flush()
        answers = self._answers()
        return Answer(max(one["seconds"] for one in answers), sum(one["bytes_read"] for one in answers))

    def _answers(self) -> list[dict[str, Any]]:
        found = []
        for process, log in zip(self._processes, self._logs, strict=True):
            assert process.stdout is not None
            line = next((line for line in process.stdout if line.startswith("{")), None)
            if line is None:
                sys.exit(f"DeepSpeed's rank has ended:\n{Path(log.name).read_text()[-2000:]}")
            found.append(json.loads(line))
        return found


def to_universal(folder: Path, tag: str) -> float:
    """DeepSpeed's conversion for other world sizes, into `<tag>_universal` -> seconds, its start included."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(folder / tag)]
    command += ["--output_folder", str(folder / f"{tag}_universal"), "--num_extract_workers", "2"]
    command += ["--num_merge_workers", "2", "--inject_missing_state"]
    done = subprocess.run(
        command, env=os.environ | {"DS_ACCELERATOR": "cpu"}, check=False, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"ds_to_universal has failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def _engine(options: argparse.Namespace) -> Any:
    import deepspeed
    import torch

    from tests.bench.checkpoints.state import WIDTH

    environment = {"RANK": options.rank, "LOCAL_RANK": options.rank, "WORLD_SIZE": options.world}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": options.port})
    deepspeed.ops.__compatible_ops__ = {}  # nothing is compiled
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(options.tensors)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "checkpoint": {"load_universal": options.universal},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    engine.backward(engine(torch.randn(1, WIDTH)).square().sum())
    engine.step()
    return engine


def _serve(options: argparse.Namespace, answers: Any) -> None:
    engine, folder = _engine(options), Path(options.folder)
    _say(answers, 0.0, 0)
    for line in sys.stdin:
        act, tag = line.split()
        engine.barrier() if hasattr(engine, "barrier") else None
        before, started = _bytes_read(), time.perf_counter()
        if act == "save":
            engine.save_checkpoint(str(folder), tag)
            for file in _own(folder / tag, options.rank):
                _flush(file)
        else:
            engine.load_checkpoint(str(folder), tag)
        _say(answers, time.perf_counter() - started, _bytes_read() - before)


def _own(folder: Path, rank: int) -> Iterator[Path]:
    """The files that this rank has written: DeepSpeed flushes none itself."""
    return (file for file in folder.iterdir() if f"rank_{rank}_" in file.name or (rank == 0 and "mp_rank" in file.name))


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _bytes_read() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def _say(answers: Any, seconds: float, bytes_read: int) -> None:
    answers.write(json.dumps({"seconds": seconds, "bytes_read": bytes_read}) + "\n")
    answers.flush()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--rank", "--world", "--tensors"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--port", required=True)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--universal", action="store_true")
    answers, sys.stdout = sys.stdout, sys.stderr  # DeepSpeed prints
    _serve(parser.parse_args(), answers)


if __name__ == "__main__":
    _main()
