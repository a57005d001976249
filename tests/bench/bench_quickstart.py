"""Seconds from a fresh clone to the tuned model's answer, by part, and how far the loss on held-out rows falls.

    python -m tests.bench.bench_quickstart [--runs 1] [--uv-cache DIR]

Each run clones the last commit into a folder of its own and types `make quickstart` there, with an empty home: no
package, model or row that another run left behind is found. With --uv-cache packages come from that folder, as on a
machine that has installed torch before; the results say which it was. The run tells its stages itself; when the other
parts ended is told by the times of their files. Exit code 1 when the slowest run took longer than the goal, or the loss
fell by less.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from finetune_api.progress import Outcome
from tests.bench.common import busy, timed_process, write_results

GOAL_SECONDS = 360
GOAL_FALL = 0.10
ROOT = Path(__file__).parents[2]


def git(*arguments: str | Path) -> str:
    done = subprocess.run(["git", *map(str, arguments)], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def quickstart(folder: Path, uv_cache: Path | None) -> dict[str, Any]:
    """One run in `folder`, which is empty."""
    project, home, log = folder / "project", folder / "home", folder / "make.log"
    home.mkdir()
    git("clone", "--quiet", "--no-hardlinks", ROOT, project)
    load = busy()
    environment = {"HOME": str(home), "FINETUNE_CACHE": "", "UV_CACHE_DIR": str(uv_cache or home / "uv")}
    started = timed_process(["make", "-C", str(project), "quickstart"], environment, log)
    ended = time.time()
    [outcome_file] = project.glob("runs/quickstart/*/outcome.json")
    outcome = Outcome.model_validate_json(outcome_file.read_bytes())
    assert outcome.eval is not None, "the quickstart evaluates"
    assert outcome.eval.loss_before is not None
    assert outcome.eval.loss_after is not None
    installed = (project / ".venv" / ".installed").stat().st_mtime
    data = max(file.stat().st_mtime for file in (project / "manifests/samples/quickstart/data").iterdir())
    trained = outcome_file.stat().st_mtime
    parts = {"installation": installed - started, "data": data - installed, "run": trained - data}
    return {
        "commit": git("-C", project, "rev-parse", "HEAD"),
        "load_before": load,
        "seconds": round(ended - started, 1),
        "seconds_by_part": {name: round(taken, 1) for name, taken in (parts | {"answer": ended - trained}).items()},
        "seconds_of_the_run": {stage: round(taken, 1) for stage, taken in outcome.seconds.items()},
        "steps": outcome.step,
        "eval_loss": {"before": outcome.eval.loss_before, "after": outcome.eval.loss_after},
        "fall": round(1 - outcome.eval.loss_after / outcome.eval.loss_before, 4),
        "said": log.read_text(errors="replace").partition("--- base ---")[2].splitlines(),
    }


def main() -> int:
    """0 when the goals are met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--uv-cache", type=Path, help="packages that were fetched before; else all are fetched")
    options = parser.parse_args()
    runs = []
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory(prefix="bench-quickstart-") as name:
            runs.append(quickstart(Path(name), options.uv_cache))
        print({name: value for name, value in runs[-1].items() if name != "said"}, flush=True)
    slowest, least = max(run["seconds"] for run in runs), min(run["fall"] for run in runs)
    goals = {"seconds": GOAL_SECONDS, "fall": GOAL_FALL}
    write_results("quickstart", {"goals": goals, "packages_cached": options.uv_cache is not None, "runs": runs})
    print(
        f"from clone to answer {slowest:.0f} s (goal {GOAL_SECONDS}), loss down by {least:.1%} (goal {GOAL_FALL:.0%})"
    )
    return int(slowest > GOAL_SECONDS or least < GOAL_FALL)


if __name__ == "__main__":
    sys.exit(main())
