"""A trainer that speaks the real protocol and trains nothing: the double of `python -m finetune_trainers`.

It reads plan.json, writes progress.jsonl and outcome.json, and answers SIGINT. What it does at step 3 is chosen by
the environment variable FAKE_TRAINER; it reaches maxSteps when nothing is chosen. "killed then " is a choice for each
attempt in turn; the last one holds for those after it too.
"""

from __future__ import annotations

import argparse
import http.server
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import NoReturn

from finetune_api.failures import EXIT_CODES, INTERRUPTED, Failure, FailureClass, Problem
from finetune_api.plan import RunPlan
from finetune_api.progress import Artifact, EvalSummary, Outcome, Progress, Result, SavedCheckpoint, Stage

STEP_OF_TROUBLE = 3


class FakeTrainer:
    """One run."""

    def __init__(self, plan: RunPlan, workdir: Path, behaviour: str) -> None:
        self.plan, self.workdir, self.behaviour = plan, workdir, behaviour
        self.total = plan.optimization.max_steps or 5
        self.saved = workdir / "checkpoints" / "newest.json"
        self.checkpoint = self.found()
        self.resumed = self.checkpoint.step if self.checkpoint else None
        self.step = self.resumed or 0
        self.reports = (workdir / "progress.jsonl").open("a", buffering=1)

    def run(self) -> int:
        print("the fake trainer starts", flush=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN if self.behaviour == "deaf" else self.interrupted)
        for stage in (Stage.CHECKING_MODEL, Stage.PREPARING_DATA, Stage.STARTING_WORKERS, Stage.LOADING_MODEL):
            self.report(stage, f"{stage} as asked")
        while self.step < self.total:
            self.step += 1
            every = self.plan.checkpoint.every_steps if self.plan.checkpoint else None
            if every and self.step % every == 0:
                self.save()
            self.report(Stage.TRAINING)
            if self.step == STEP_OF_TROUBLE:
                self.misbehave()
        self.report(Stage.EVALUATING)
        self.write_artifact()
        return 0

    def found(self) -> SavedCheckpoint | None:
        goes_on = self.plan.checkpoint is not None and self.plan.checkpoint.resume and self.saved.exists()
        return SavedCheckpoint.model_validate_json(self.saved.read_bytes()) if goes_on else None

    def save(self) -> None:
        self.saved.parent.mkdir(exist_ok=True)
        uri = (self.saved.parent / f"step-{self.step}").as_uri()
        self.checkpoint = SavedCheckpoint(
            uri=uri, step=self.step, saved_at=datetime.now(UTC), world_size=1, bytes=1_500_000
        )
        self.saved.write_text(self.checkpoint.model_dump_json(by_alias=True))

    def report(self, stage: Stage, message: str | None = None) -> None:
        progress = Progress(
            stage=stage,
            step=self.step,
            total_steps=self.total,
            epoch=self.step / self.total,
            percent=100 * self.step / self.total,
            eta_seconds=float(self.total - self.step),
            tokens_per_second=1234.5,
            metrics={"loss": 2.0 - 0.1 * self.step, "eval_loss": 2.5},
            message=message,
            resumed_from_step=self.resumed,
            checkpoint=self.checkpoint,
            updated_at=datetime.now(UTC),
        )
        self.reports.write(progress.model_dump_json(by_alias=True) + "\n")

    def misbehave(self) -> None:
        match self.behaviour:
            case "crash":
                raise RuntimeError("the fake trainer broke")
            case "killed-among-workers":
                print("gloo: Connection reset by peer", flush=True)  # as a worker does when its driver is gone
                os.kill(os.getpid(), signal.SIGKILL)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "data-error":
                self.fail(FailureClass.DATA_ERROR)
            case "non-finite":
                self.fail(FailureClass.NON_FINITE_LOSS)
            case "killed-with-children":
                start_grandchildren(self.workdir)
                time.sleep(1.5)  # as a real one, it trains a while before it dies
                os.kill(os.getpid(), signal.SIGKILL)
            case "killed-with-writer":
                start_writer(self.workdir)
                time.sleep(1.5)
                os.kill(os.getpid(), signal.SIGKILL)
            case "leaves-children":
                start_grandchildren(self.workdir)
            case "noise":
                self.reports.write("this is not a report\n")
            case "waits" | "deaf" | "waits-with-children" | "waits-with-writer":
                if self.behaviour == "waits-with-writer":
                    start_writer(self.workdir)
                elif self.behaviour != "waits":
                    start_grandchildren(self.workdir)
                self.report(Stage.TRAINING, "waiting")
                while True:
                    time.sleep(0.05)

    def fail(self, kind: FailureClass) -> NoReturn:
        problem = Problem(file="rows.jsonl:17", path="messages", value="[]", message="must hold a message")
        failure = Failure(failure_class=kind, message="it cannot go on", problems=[problem], step=self.step)
        self.end(Outcome(result=Result.FAILED, failure=failure, step=self.step))
        sys.exit(EXIT_CODES[kind])

    def interrupted(self, _signal: int, _frame: FrameType | None) -> None:
        if self.plan.checkpoint is not None and self.step:
            self.save()
            self.report(Stage.TRAINING)
        self.end(Outcome(result=Result.CANCELLED, step=self.step, total_steps=self.total))
        sys.exit(INTERRUPTED)

    def write_artifact(self) -> None:
        folder = self.workdir / "artifact"
        folder.mkdir()
        kind = "adapter" if self.plan.tuning.lora else "model"
        (folder / ("adapter_config.json" if kind == "adapter" else "config.json")).write_text("{}")
        outcome = Outcome(
            result=Result.SUCCEEDED,
            step=self.total,
            total_steps=self.total,
            eval=EvalSummary(loss_before=2.5, loss_after=2.0),
            artifacts=[Artifact(uri=folder.as_uri(), kind=kind, digest="b3", bytes=1_500_000)],
            metrics={"loss": 1.5},
            seconds={"Training": 3.25, "Exporting": 0.5},
        )
        self.end(outcome)

    def end(self, outcome: Outcome) -> None:
        (self.workdir / "outcome.json").write_text(outcome.model_dump_json(by_alias=True))


def start_grandchildren(workdir: Path) -> None:
    """As Ray does: a process in a session of its own whose parent is gone, and one that is deaf to SIGTERM."""
    sleeper = "import time; time.sleep(600)"
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    orphan = f"""
import subprocess, sys
quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # not to hold the pipe that is read below
print(subprocess.Popen([sys.executable, "-c", {sleeper!r}], start_new_session=True, **quiet).pid)
"""
    started = subprocess.run([sys.executable, "-c", orphan], capture_output=True, check=True)
    stubborn = subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
    (workdir / "children.json").write_text(json.dumps([int(started.stdout), stubborn.pid]))


def start_writer(workdir: Path) -> None:
    """What writes a checkpoint after the trainer's death, for longer than others have to go."""
    writes = f"import pathlib, time; time.sleep(8); pathlib.Path({str(workdir / 'written')!r}).touch()"
    command = [sys.executable, "-c", writes, "finetune_trainers.checkpoint.writer"]
    writer = subprocess.Popen(command, start_new_session=True)
    (workdir / "children.json").write_text(json.dumps([writer.pid]))


def serve(arguments: list[str], behaviour: str) -> int:
    """A server that is well, and knows no model."""
    asked = dict(itertools.pairwise(arguments))
    print("the fake trainer was asked: serve", *arguments, file=sys.stderr, flush=True)
    print(json.dumps({"say": "the fake trainer prepares"}), flush=True)
    if behaviour == "refuses":
        print("--port: is taken", file=sys.stderr)
        return EXIT_CODES[FailureClass.USER_ERROR]
    if behaviour == "never-ready":
        time.sleep(600)
    server = Server((asked["--host"], int(asked["--port"])), Health)
    where = {"model": asked["--name"], "host": asked["--host"], "port": server.server_port}
    if behaviour == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    print(json.dumps({"serving": {"engine": "fake", **where}}), flush=True)
    if behaviour == "dies":
        threading.Thread(target=die_after, args=(server.asked,), daemon=True).start()
    server.serve_forever()
    return 0


def die_after(asked: threading.Event) -> None:
    """A server that is killed when it has been found well; the answer is out by then."""
    asked.wait()
    os.kill(os.getpid(), signal.SIGKILL)


class Server(http.server.ThreadingHTTPServer):
    """Knows whether it was asked."""

    def __init__(self, address: tuple[str, int], handler: type[Health]) -> None:
        super().__init__(address, handler)
        self.asked = threading.Event()


class Health(http.server.BaseHTTPRequestHandler):
    """Answers /health."""

    server: Server

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.flush()
        self.server.asked.set()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("command", choices=["run", "check", "export", "chat", "serve"])
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--no-ray", action="store_true")
    arguments, others = parser.parse_known_args()
    behaviours = os.environ.get("FAKE_TRAINER", "").split(" then ")
    behaviour = behaviours[min(int(os.environ.get("FINETUNE_ATTEMPT", "1")), len(behaviours)) - 1]
    if arguments.command == "serve":
        return serve(others, behaviour)
    if arguments.command in ("export", "chat"):
        print("the fake trainer was asked:", arguments.command, *others, file=sys.stderr)
        if arguments.command == "chat":
            print(json.dumps({"prompt": "?", "tuned": "a tuned \u00e4nswer", "base": None}))
            return 0
        print(Artifact(uri="file:///exported", kind="model", digest="b3", bytes=2_500).model_dump_json(by_alias=True))
        return 0
    trainer = FakeTrainer(RunPlan.model_validate_json(arguments.plan.read_bytes()), arguments.workdir, behaviour)
    if arguments.command == "check":
        if behaviour == "data-error":
            trainer.fail(FailureClass.DATA_ERROR)
        return 0
    return trainer.run()


if __name__ == "__main__":
    sys.exit(main())
