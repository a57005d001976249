"""`finetune ckpt` as people and programs meet it: the command line, the process behind it, checkpoints on a disk."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from finetune_api import checkpoints as reports
from finetune_api.answers import Step, Told
from finetune_client.cli import asking
from finetune_client.cli.ckpt import verbs
from finetune_client.cli.exits import CKPT_MEANINGS, DAMAGED, IN_USE
from finetune_trainers.checkpoint import layout
from finetune_trainers.checkpoint.admin.__main__ import main
from finetune_trainers.checkpoint.layout import CheckpointId
from finetune_trainers.checkpoint.listing import listed
from finetune_trainers.checkpoint.pins import read_pins
from finetune_trainers.checkpoint.storage.posix import PosixStorage
from tests.client.conftest import Finetune, Finished
from tests.client.test_cli import HEAVY, imported_by
from tests.trainers.checkpoint.command import Here
from tests.trainers.checkpoint.saving import intent_of, save, start, write_all
from tests.trainers.checkpoint.synthetic import NOON

VERBS = ["ls", "inspect", "verify", "diff", "plan", "export", "import", "gc", "repair", "pin", "unpin"]


class Run:
    """A folder of `finetune run` whose job has saved steps 10, 20 and 30, a year or so ago."""

    def __init__(self, folder: Path, steps: tuple[int, ...] = (10, 20, 30), **checkpoint: Any) -> None:
        self.folder = folder
        self.root = folder / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "state.json").write_text("{}")
        (folder / "plan.json").write_text(json.dumps({"checkpoint": {"uri": None, "keepLast": 2} | checkpoint}))
        self.storage = PosixStorage(str(self.root))
        self.fence = start(self.storage)
        for step in steps:
            save(self.storage, self.fence, step, metrics={"loss": 1.0 / step}, global_batch=12)

    def there(self) -> list[int]:
        return sorted(checkpoint.step for checkpoint in listed(self.storage))

    def damage(self, step: int, at: int = 5000) -> str:
        """Flip a bit of its weights -> the file."""
        name = layout.shard(CheckpointId(1, step), 0)
        data = bytearray(self.storage.read(name))
        data[at] ^= 1
        self.storage.replace(name, bytes(data))
        return name


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs/bot/20260101-120000")


@pytest.fixture
def real_ckpt(finetune: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Finetune:
    """`finetune ckpt` with its two processes, in the folder that `runs` is in."""
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: finetune("ckpt", *arguments)


@pytest.fixture
def ckpt(real_ckpt: Finetune, monkeypatch: pytest.MonkeyPatch) -> Finetune:
    """The same in one process."""
    monkeypatch.setattr(asking, "start", Here)
    return real_ckpt


def runs_instead(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Another program takes the place of the one that is asked."""
    start = asking.start
    monkeypatch.setattr(asking, "start", lambda _, request: start((sys.executable, "-c", program), request))


def row_of(done: Finished, start_: str) -> list[str]:
    return next(line.split() for line in done.stdout.splitlines() if line.startswith(start_))


def test_a_list_shows_what_stays_and_why(real_ckpt: Finetune, run: Run) -> None:
    done = real_ckpt("ls", run.folder)
    assert done.code == 0
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["STEP", "ATTEMPT", "AGE", "SIZE", "RANKS", "ZERO", "STATE", "PINNED", "WHY"]
    assert lines[1].split()[0] == "30"
    assert lines[1].endswith("whole  no      the newest that is whole; one of the last 2")
    assert lines[3].endswith("goes: no rule keeps it"), "the rule is the job's"
    assert f"3 checkpoints at file://{run.root}: 131.3 kB" in done.stdout
    assert "A run goes on from 0000000030-e00001" in done.stdout
    assert "At work" not in done.stdout


def test_a_list_as_json_has_every_key(real_ckpt: Finetune, run: Run) -> None:
    document = real_ckpt("ls", run.folder, "-o", "json").document
    found = reports.CheckpointList.model_validate(document)
    assert [row.step for row in found.checkpoints] == [30, 20, 10]
    assert document["newest"] == "0000000030-e00001"
    assert document["checkpoints"][0]["pin"] is None


@pytest.mark.parametrize(
    "where",
    [
        "runs/bot/20260101-120000",
        "runs/bot/20260101-120000/checkpoints",
        "bot",
        "file://{root}",
        "file://{folder}",
        "{root}/ckpt/0000000030-e00001",
    ],
)
def test_a_place_has_many_names(ckpt: Finetune, run: Run, where: str) -> None:
    Run(run.folder.parent / "20251231-235959", steps=())
    place = where.format(root=run.root, folder=run.folder)
    document = ckpt("ls", place, "-o", "json").document
    assert document["uri"] == f"file://{run.root}"
    assert [row["keep"] for row in document["checkpoints"]] == [True, True, False], "the job's rule is known"


def test_a_checkpoints_own_uri_names_it(ckpt: Finetune, run: Run) -> None:
    document = ckpt("inspect", f"file://{run.root}/ckpt/0000000010-e00001", "-o", "json").document
    assert document["summary"]["step"] == 10


def test_a_run_that_saves_elsewhere_is_looked_at_there(ckpt: Finetune, run: Run, tmp_path: Path) -> None:
    other = tmp_path / "runs/other/20260101-120000"
    other.mkdir(parents=True)
    (other / "plan.json").write_text(json.dumps({"checkpoint": {"uri": f"file://{run.root}", "keepLast": 1}}))
    document = ckpt("ls", "other", "-o", "json").document
    assert [row["keep"] for row in document["checkpoints"]] == [True, False, False]


@pytest.mark.parametrize(
    ("said", "keeps"),
    [
        ({"keepLast": 1}, [True, False, False]),
        ({"keepLast": 1, "keepEvery": 20}, [True, True, False]),
        ({"keepLast": 3, "quotaBytes": 100_000}, [True, True, False]),
        ({"keepLast": 1, "keepBest": {"metric": "loss", "mode": "max", "count": 1}}, [True, False, True]),
        ({"keepLast": 1, "keepBest": {"of": "another version"}}, [True, True, True]),
        ({"keepLast": None}, [True, True, True]),
    ],
)
def test_the_rules_of_a_run_are_those_of_its_job(
    ckpt: Finetune, tmp_path: Path, said: dict[str, Any], keeps: list[bool]
) -> None:
    Run(tmp_path / "runs/bot/20260101-120000", **said)
    assert [row["keep"] for row in ckpt("ls", "bot", "-o", "json").document["checkpoints"]] == keeps


@pytest.mark.parametrize(
    ("where", "right"),
    [
        ("nosuch", "nosuch is no folder here, and there is no run of that name in runs/nosuch"),
        ("./nosuch", "./nosuch is no folder; name a run's folder"),
        ("empty", "there are no checkpoints at file:///"),
        ("several", "several holds the runs of several jobs; name one: several/a, several/b"),
        ("without", "without has no checkpoints; the run saves none: its job has no spec.checkpoint"),
        ("early", "early has no checkpoints; the run has saved none yet"),
        ("s3:/bucket", "s3:/bucket is no folder"),
        ("hf://org/name", "hf://org/name cannot be hf:// here; use one of file://, pvc://, s3://, gs://"),
        ("pvc://claim/x", "there are no checkpoints at pvc://claim/x"),
    ],
)
def test_a_place_that_is_none_is_answered_with_what_would_be_right(
    ckpt: Finetune, tmp_path: Path, where: str, right: str
) -> None:
    for name, plan in (("several/a", {}), ("several/b", {}), ("without", {}), ("early", {"checkpoint": {"uri": None}})):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "plan.json").write_text(json.dumps(plan))
    (tmp_path / "empty").mkdir()
    done = ckpt("ls", where, "-o", "json")
    assert done.code == 2
    assert right in done.stderr
    assert "Traceback" not in done.stderr
    assert done.document["error"]["exitCode"] == 2


def test_an_unknown_checkpoint_is_answered_with_those_that_are_there(ckpt: Finetune, run: Run) -> None:
    for arguments in (["inspect", "bot", "99"], ["verify", "bot", "99"], ["diff", "bot", "10", "99"]):
        done = ckpt(*arguments)
        assert done.code == 2
        assert f"there is no checkpoint 99 at file://{run.root}" in done.stderr
        assert "There are: 0000000030-e00001, 0000000020-e00001, 0000000010-e00001" in done.stderr
    assert ckpt("pin", "bot", "99", "-o", "json").document["error"]["known"][0] == "0000000030-e00001"


def test_inspect_shows_what_a_checkpoint_says_of_itself(ckpt: Finetune, run: Run) -> None:
    text = ckpt("inspect", "bot", "20").stdout
    flat = " ".join(text.split())
    assert "checkpoint 0000000020-e00001 (step 20, attempt 1 at this place)" in flat
    assert "base model hf://org/base (digest 000000000000)" in flat
    assert "metrics loss 0.05" in flat
    assert "model param F32 2 2,803 11.2 kB" in flat
    assert "shard-00001-001.safetensors" in text
    assert "weight" not in text
    assert "70 x 40" in ckpt("inspect", "bot", "--tensors").stdout


def test_whole_ones_are_said_to_be_whole(ckpt: Finetune, run: Run) -> None:
    done = ckpt("verify", "bot", "--all", "--deep")
    assert done.code == 0
    assert "3 checkpoints verified, all whole. Looked at: every byte" in done.stdout


def test_damage_is_named_and_told_by_the_exit_code(real_ckpt: Finetune, run: Run) -> None:
    file = run.damage(20)
    assert real_ckpt("verify", "bot", "--all").code == 0, "sizes and receipts are right"
    done = real_ckpt("verify", "bot", "20", "--deep")
    assert done.code == DAMAGED
    assert "0000000020-e00001  DAMAGED" in done.stdout
    assert f"  {file} model weight param [0, 1024): the bytes are not those that were saved" in done.stdout
    document = real_ckpt("verify", "bot", "--all", "--deep", "-o", "json").document
    assert [one["whole"] for one in document["checkpoints"]] == [True, False, True]
    assert document["checkpoints"][1]["damages"][0]["tensor"] == "weight"


def test_verify_looks_at_the_newest_published_one_also_when_it_is_damaged(ckpt: Finetune, run: Run) -> None:
    run.storage.delete([layout.shard(CheckpointId(1, 30), 0)])
    done = ckpt("verify", "bot")
    assert done.code == DAMAGED
    assert "0000000030-e00001" in done.stdout
    assert ckpt("inspect", "bot", "-o", "json").document["summary"]["step"] == 20, "newest is what a run goes on from"


def test_one_checkpoint_and_all_of_them_is_a_contradiction(ckpt: Finetune, run: Run) -> None:
    done = ckpt("verify", "bot", "20", "--all")
    assert done.code == 2
    assert "--all verifies every checkpoint; leave it out, or 20" in done.stderr


def test_a_comparison_names_fields_and_values(ckpt: Finetune, run: Run) -> None:
    done = ckpt("diff", "bot", "10", "20", "--values")
    assert done.code == 0
    assert row_of(done, "metrics.loss") == ["metrics.loss", "0.1", "0.05"]
    assert row_of(done, "bias")[:5] == ["bias", "param", "3", "of", "3"]
    assert "2 of 2 compared differ" in done.stdout
    assert ckpt("diff", "bot", "10", "20", "-o", "json").document["values"] is None


def test_checkpoints_of_two_places_are_compared(ckpt: Finetune, run: Run, tmp_path: Path) -> None:
    other = Run(tmp_path / "runs/other/20260101-120000", steps=(10,))
    document = ckpt("diff", "bot", "20", "10", "--other", "other", "--state", "exp_avg", "-o", "json").document
    assert document["b"] == f"file://{other.root} 0000000010-e00001"
    assert [value["state"] for value in document["values"]] == ["exp_avg"]


def test_a_plan_tells_what_each_process_reads(ckpt: Finetune, run: Run) -> None:
    done = ckpt("plan", "bot", "--world", "3", "--memory", "1GB")
    assert done.code == 0
    assert "saved by 2 processes under ZeRO 3, gone on from by 3 under ZeRO 3" in done.stdout
    assert row_of(done, "   2")[1:3] == ["7.5", "kB"]
    assert "That fits." in done.stdout
    document = ckpt("plan", "bot", "20", "--world", "4", "--zero-stage", "2", "-o", "json").document
    assert sum(rank["bytesNeeded"] for rank in document["ranks"]) == document["bytesNeeded"] == 4 * 5603
    assert ckpt("plan", "bot").code == 2, "the number of processes is what it is about"
    assert "'plenty' is not a size; write it like" in ckpt("plan", "bot", "--world", "2", "--memory", "plenty").stderr


def test_a_pin_keeps_a_checkpoint_from_every_rule(ckpt: Finetune, run: Run) -> None:
    done = ckpt("pin", "bot", "10", "--reason", "for the paper")
    assert done.code == 0
    assert done.stdout.startswith("0000000010-e00001 is pinned by ")
    assert done.stdout.endswith(": for the paper\n")
    assert "was already pinned" in ckpt("pin", "bot", "10").stdout
    assert "pinned: for the paper" in ckpt("ls", "bot").stdout
    assert ckpt("gc", "bot", "--keep-last", "1", "--yes").code == 0
    assert run.there() == [10, 30]
    assert ckpt("unpin", "bot", "10").stdout == "0000000010-e00001 is left to retention again\n"
    assert ckpt("unpin", "bot", "10").stdout == "0000000010-e00001 was not pinned\n"
    assert read_pins(run.storage) == {}


def test_a_pin_whose_checkpoint_is_gone_can_be_taken_away(ckpt: Finetune, run: Run) -> None:
    ckpt("pin", "bot", "10")
    run.storage.delete([stored.name for stored in run.storage.list(layout.folder(CheckpointId(1, 10)))])
    assert ckpt("unpin", "bot", "10").code == 2
    assert ckpt("unpin", "bot", "0000000010-e00001").code == 0
    assert read_pins(run.storage) == {}


def test_gc_says_what_it_would_do_and_does_it_when_it_is_told_to(real_ckpt: Finetune, run: Run) -> None:
    write_all(run.storage, intent_of(run.fence, 40), ranks=[0])
    said = real_ckpt("gc", "bot", "--dry-run")
    assert said.code == 0
    assert row_of(said, "deleted  0000000040")[4:] == ["it", "was", "never", "completed"]
    assert "2 checkpoints would be deleted" in said.stdout
    assert run.there() == [10, 20, 30, 40]
    done = real_ckpt("gc", "bot", "--yes", "-o", "json").document
    assert [one["id"][:10] for one in done["deleted"]] == ["0000000040", "0000000010"]
    assert done["bytes"] > 60_000
    assert run.there() == [20, 30]
    assert real_ckpt("gc", "bot", "--yes").stdout.endswith("Nothing to delete\n")


def test_gc_deletes_nothing_when_nobody_can_be_asked(ckpt: Finetune, run: Run) -> None:
    done = ckpt("gc", "bot")
    assert done.code == 2
    assert "say --yes to delete, or --dry-run to see what would be" in done.stderr
    assert run.there() == [10, 20, 30]


@pytest.mark.parametrize(("answer", "left"), [("n\n", [10, 20, 30]), ("y\n", [20, 30])])
def test_gc_asks_a_person(
    finetune: Finetune, run: Run, monkeypatch: pytest.MonkeyPatch, answer: str, left: list[int]
) -> None:
    monkeypatch.setattr(verbs, "_is_terminal", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda question, err: answer == "y\n")
    done = finetune("ckpt", "gc", run.folder)
    assert done.code == 0
    assert "1 checkpoint would be deleted" in done.stdout
    assert run.there() == left
    assert ("Nothing was deleted" in done.stderr) == (left == [10, 20, 30])


def test_gc_without_any_rule_deletes_no_checkpoint(ckpt: Finetune, run: Run) -> None:
    (run.folder / "plan.json").unlink()
    done = ckpt("gc", run.root, "--yes")
    assert done.code == 0
    assert "No rule is known here, so checkpoints stay" in done.stderr
    assert run.there() == [10, 20, 30]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (["--keep-last", "1"], [30]),
        (["--keep-every", "20"], [10, 20, 30]),
        (["--keep-last", "1", "--keep-every", "20"], [20, 30]),
        (["--keep-last", "1", "--keep-best", "loss:max"], [10, 30]),
        (["--quota", "100kB"], [20, 30]),
    ],
)
def test_rules_can_be_given(ckpt: Finetune, run: Run, options: list[str], left: list[int]) -> None:
    (run.folder / "plan.json").unlink()
    assert ckpt("gc", run.root, "--yes", *options).code == 0
    assert run.there() == left


def test_what_another_training_saved_goes_when_somebody_says_so(ckpt: Finetune, run: Run) -> None:
    save(run.storage, start(run.storage), 5, job="made again")
    assert ckpt("gc", "bot", "--keep-last", "1", "--yes").code == 0
    assert run.there() == [5, 30]
    assert "the newest that is whole; one of the last 2; of another training" in ckpt("ls", "bot").stdout
    assert ckpt("gc", "bot", "--drop-others", "--yes").code == 0
    assert run.there() == [5]


@pytest.mark.parametrize(
    ("option", "value", "right"),
    [
        ("--keep-best", "loss:smallest", "'loss:smallest' is not of the form METRIC[:min|max[:COUNT]]"),
        ("--quota", "0GB", "--quota: '0GB' is not a size"),
    ],
)
def test_rules_that_make_no_sense_are_refused(ckpt: Finetune, run: Run, option: str, value: str, right: str) -> None:
    done = ckpt("gc", "bot", "--dry-run", option, value)
    assert done.code == 2
    assert right in done.stderr


@pytest.fixture
def locked(run: Run) -> Iterator[Run]:
    """As `finetune run` holds it."""
    lock = os.open(run.folder, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    yield run
    os.close(lock)


def test_the_folder_of_a_run_at_work_is_left_alone(ckpt: Finetune, locked: Run) -> None:
    for verb in (["gc", "bot", "--yes"], ["repair", "bot"]):
        done = ckpt(*verb)
        assert done.code == IN_USE
        assert "is in use by finetune run" in done.stderr
    assert locked.there() == [10, 20, 30]
    assert ckpt("ls", "bot").code == 0, "looking is always allowed"


def test_a_place_whose_run_gave_a_sign_of_life_is_left_alone(real_ckpt: Finetune, tmp_path: Path) -> None:
    storage = PosixStorage(str(tmp_path / "shared"))
    fence = start(storage)
    now = datetime.now(UTC)
    for step in (10, 20):
        save(storage, fence, step, created=now - timedelta(minutes=5))
    write_all(storage, intent_of(fence, 30, created=now), ranks=[0])
    assert "At work: test" in real_ckpt("ls", "shared").stdout
    for verb in (["gc", "shared", "--keep-last", "1", "--yes"], ["repair", "shared"]):
        done = real_ckpt(*verb)
        assert done.code == IN_USE
        assert "test seems to be at work there" in done.stderr
        assert "--take-over" in done.stderr
    assert "without --dry-run this is refused" in real_ckpt("gc", "shared", "--keep-last", "1", "--dry-run").stdout
    assert real_ckpt("gc", "shared", "--keep-last", "1", "--yes", "--take-over").code == 0
    assert [checkpoint.step for checkpoint in listed(storage)] == [20]


def test_repair_publishes_what_lacks_only_its_manifest(ckpt: Finetune, run: Run) -> None:
    write_all(run.storage, intent_of(run.fence, 40))
    run.storage.replace(layout.HEAD, b"garbage")
    said = ckpt("repair", "bot", "--dry-run")
    assert "0000000040-e00001 would be completed: all of it was there but its manifest" in said.stdout
    assert run.storage.size(layout.manifest(CheckpointId(1, 40))) is None
    done = ckpt("repair", "bot", "-o", "json").document
    assert done["completed"] == ["0000000040-e00001"]
    assert done["head"]["a"] == "garbage"
    assert ckpt("verify", "bot", "--deep").stdout.startswith("0000000040-e00001  whole")
    assert ckpt("repair", "bot").stdout == f"Nothing to repair at file://{run.root}\n"


def test_damaged_weights_are_reported_and_left(ckpt: Finetune, run: Run) -> None:
    run.storage.delete([layout.shard(CheckpointId(1, 20), 0)])
    done = ckpt("repair", "bot")
    assert done.code == 0
    assert "0000000020-e00001 is damaged, and that cannot be mended:" in done.stdout
    assert run.there() == [10, 20, 30]


def test_an_export_is_written_by_the_format_that_is_named(ckpt: Finetune, run: Run, tmp_path: Path) -> None:
    done = ckpt("export", "bot", "20", "--to", tmp_path / "out", "--format", "gguf")
    assert done.code == 2
    assert "--format: there is no format 'gguf'; use one of hf, dcp, deepspeed" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_is_missing_to_look_at_checkpoints_is_named(
    ckpt: Finetune, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "ADMIN", replace(verbs.ADMIN, needs=("no_such_package",)))
    done = ckpt("ls", "bot")
    assert done.code == 2
    assert "finetune-operator[trainers]" in done.stderr


@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("import sys; sys.exit(7)", 7, "ended with exit code 7 and no answer"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 1, "ended with exit code -9 and no answer"),
        ("import os, signal; signal.signal(2, signal.SIG_DFL); os.kill(os.getpid(), 2)", 130, ""),
        ("print('a library says hello'); import sys; sys.exit(130)", 130, ""),
    ],
)
def test_a_process_that_dies_is_told_by_its_end(
    real_ckpt: Finetune, run: Run, monkeypatch: pytest.MonkeyPatch, program: str, code: int, said: str
) -> None:
    runs_instead(monkeypatch, program)
    done = real_ckpt("ls", "bot")
    assert done.code == code
    assert said in done.stderr
    assert done.stdout == ""


def test_progress_is_a_line_for_every_tenth_where_there_is_no_terminal(
    real_ckpt: Finetune, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    flows = [Step(what="0000000030-e00001", done=done, total=1000) for done in (5, 120, 130, 990)]
    lines = [Told(progress=flow).model_dump_json(by_alias=True) for flow in flows]
    report = reports.Verification(uri="file:///x", deep=True, whole=True, checkpoints=[], bytes_read=1000)
    lines.append(Told(report=report.model_dump(mode="json", by_alias=True)).model_dump_json(by_alias=True))
    runs_instead(monkeypatch, f"print({chr(10).join(lines)!r})")
    done = real_ckpt("verify", "bot", "--deep")
    assert done.code == 0
    assert done.stderr == "0000000030-e00001: 10 %\n0000000030-e00001: 90 %\n"


def test_a_folder_that_cannot_be_read_is_said_without_a_traceback(ckpt: Finetune, run: Run) -> None:
    (run.root / "ckpt").rename(run.root / "aside")
    (run.root / "ckpt").write_text("a file in the place of a folder")
    done = ckpt("ls", run.root)
    assert done.code == 6
    assert "Traceback" not in done.stderr
    assert "ckpt/: Not a directory" in done.stderr


def test_keys_are_in_no_message(real_ckpt: Finetune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLEEXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very/secret/indeed")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://someone:very%2Fsecret@127.0.0.1:9/")
    done = real_ckpt("ls", "s3://bucket/run", "-o", "json")
    assert done.code == 6
    for said in (done.stdout, done.stderr):
        assert "secret" not in said
        assert "AKIA" not in said
        assert "Traceback" not in said


def test_neither_side_imports_what_trains(run: Run) -> None:
    light = imported_by("ckpt", "--help")
    assert light & {"finetune_api", "yaml", "psutil", *HEAVY} == set()
    assert imported_by("ckpt", "ls", str(run.folder)) & HEAVY == set()


@pytest.mark.parametrize(
    "request_",
    [
        {"verb": "ls"},
        {"verb": "inspect", "id": "newest"},
        {"verb": "verify", "deep": True},
        {"verb": "plan", "id": "10", "world": 2},
        {"verb": "diff", "a": "10", "b": "20"},
        {"verb": "gc", "keep": {"keepLast": 1}, "by": "x"},
        {"verb": "repair", "by": "x"},
        {"verb": "pin", "id": "20", "by": "x"},
        {"verb": "unpin", "id": "20"},
    ],
    ids=lambda request: request["verb"],
)
def test_the_trainers_side_answers_without_torch(run: Run, request_: dict[str, Any]) -> None:
    text = json.dumps(request_ | {"uri": f"file://{run.root}"})
    code = (
        "import sys; from finetune_trainers.checkpoint.admin.__main__ import main; code = main(sys.argv[1:]);"
        " heavy = {'torch', 'ray', 'deepspeed', 'transformers', 'obstore', 'numpy'} & set(sys.modules);"
        " print(code, sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code, text], capture_output=True, text=True, check=True)
    *_, answer, loaded = done.stdout.splitlines()
    assert json.loads(answer)["report"] is not None, answer
    assert loaded == "0 []"


def test_a_request_that_is_none_is_refused_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["{"], ['{"verb": "ls"}'], ['{"verb": "dance"}']):
        assert main(arguments) == 2
        refusal = json.loads(capsys.readouterr().out)["refusal"]
        assert refusal["message"]
        assert refusal["exitCode"] == 2


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_every_verb_has_two_examples_and_the_exit_codes(ckpt: Finetune, verb: str) -> None:
    text = ckpt(verb, "--help").stdout
    assert text.count(f"  finetune ckpt {verb}") >= 2
    flat = " ".join(text.split())
    assert all(f"{code} {meaning}" in flat for code, meaning in CKPT_MEANINGS.items())


def test_the_help_lists_the_verbs(ckpt: Finetune) -> None:
    text = ckpt("--help").stdout
    assert all(f"│ {verb}" in text for verb in VERBS)
    assert "finetune ckpt" in text


def test_the_documented_exit_codes_are_those_of_the_contract() -> None:
    assert (DAMAGED, IN_USE) == (reports.DAMAGED, reports.IN_USE)
    assert {DAMAGED, IN_USE} <= set(CKPT_MEANINGS)


def test_the_run_is_old_enough_to_count_as_ended() -> None:
    """What the other tests here rest on."""
    assert datetime.now(UTC) - NOON > timedelta(hours=1)
