"""What notebooks show of a job, and the sample notebook: every cell for real, while a tiny model trains here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nbformat
import pytest
from nbclient import NotebookClient

from finetune_api.job import FineTuneJob
from finetune_client import Client
from finetune_client.checks import check_plan
from finetune_client.history import Moment
from finetune_client.views import JobView
from tests.client.conftest import JOB
from tests.factories import with_changes
from tests.trainers.factories import tiny_model, write_rows

SAMPLE = Path(__file__).parents[2] / "manifests" / "samples" / "notebook" / "fine_tune.ipynb"
STEPS = 8
CHECKS = """
assert [row["step"] for row in rows] == [*range(STEPS + 1)], rows
assert rows[-1]["eval_loss"] < rows[0]["eval_loss"], rows
assert isinstance(answer, str)
"""


def status_of(figures: list[dict[str, float]]) -> dict[str, str]:
    """The last of `figures` as a status has them."""
    return {name: f"{value:.6g}" for name, value in figures[-1].items()}


def shown(
    *losses: float, name: str = "tiny", message: str = "", figures: list[dict[str, float]] | None = None
) -> ElementTree.Element:
    """A job at step 3 of 10 as a notebook shows it; parsed, for a browser forgives what this parser does not."""
    running = {"type": "Running", "status": "False", "reason": "NotStarted", "message": message}
    status = {
        "observedGeneration": 1,
        "phase": "Pending" if message else "Running",
        "progress": {"step": 3, "totalSteps": 10, "metrics": status_of(figures or [{"loss": 1.5}])},
        "conditions": [running | {"lastTransitionTime": "2026-01-01T12:00:00Z"}],
    }
    view = JobView.of(with_changes(JOB, {"metadata.name": name, "metadata.generation": 1, "status": status}))
    rows = figures or [{"loss": loss} for loss in losses]
    metrics = [{"step": float(step), **row} for step, row in enumerate(rows)]
    html = Moment(view, metrics)._repr_html_() if rows else view._repr_html_()
    return ElementTree.fromstring(f"<body>{html}</body>")


def test_a_notebook_shows_how_far_a_job_is_and_what_to_type_next() -> None:
    page = shown()
    assert "".join(page[0].itertext()) == "tiny in default: Running, step 3/10, loss 1.5"
    [bar] = page.iter("progress")
    assert (bar.get("max"), bar.get("value")) == ("10", "3")
    assert page[2].text == "Next: finetune logs -f tiny -n default"
    assert list(page.iter("polyline")) == []


def test_the_curve_fills_its_box_and_leaves_out_what_is_no_number() -> None:
    [line] = shown(4.0, float("nan"), 3.0, 2.0).iter("polyline")
    assert line.get("points") == "4.0,4.0 318.7,45.0 476.0,86.0"
    assert list(shown(4.0).iter("polyline")) == []
    [flat] = shown(2.0, 2.0).iter("polyline")
    assert flat.get("points") == "4.0,45.0 476.0,45.0"


def test_of_a_method_that_learns_from_rewards_reward_and_kl_are_drawn_and_not_its_loss() -> None:
    page = shown(figures=[{"loss": 0.0, "reward": 0.25, "kl": 0.0}, {"loss": 1e-8, "reward": 0.5, "kl": 0.125}])
    text = "".join(page.itertext())
    assert "tiny in default: Running, step 3/10, reward 0.5, kl 0.125" in text
    assert "reward 0.25 → 0.5" in text
    assert "kl 0 → 0.125" in text
    assert "loss" not in text


def test_what_a_job_says_is_text_and_no_markup() -> None:
    page = shown(name="<b>", message="<script>alert(1)</script>")
    assert list(page.iter("script")) == []
    assert "<script>alert(1)</script>" in "".join(page.itertext())


def test_a_job_is_short_where_it_is_printed() -> None:
    assert repr(JobView.of(JOB)).startswith("<tiny in default: Pending")


def sample() -> nbformat.NotebookNode:
    notebook: nbformat.NotebookNode = nbformat.read(SAMPLE, as_version=4)
    return notebook


def test_the_notebook_is_valid_and_stored_without_what_it_printed() -> None:
    notebook = sample()
    nbformat.validate(notebook)
    assert [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")] == []


def test_what_the_notebook_proposes_for_a_cluster_is_accepted() -> None:
    cells = {cell.id: cell.source for cell in sample().cells}
    [proposed] = [line for line in cells["parameters"].splitlines() if line.startswith("ROWS")]
    schemes = re.findall(r"(\w+)://", proposed.partition("#")[2])
    assert schemes
    for scheme in schemes:
        names: dict[str, Any] = {}
        exec(cells["parameters"] + "\n" + cells["job"], names)
        names["JOB"]["spec"]["data"] = {"train": [{"source": f"{scheme}://team-a/rows"}]}
        check_plan(FineTuneJob.model_validate(names["JOB"]), [], is_here=False)


def test_each_place_that_the_notebook_names_is_one_of_the_clients() -> None:
    cells = {cell.id: cell.source for cell in sample().cells}
    lines = [line.removeprefix("# ") for line in cells["submit"].splitlines() if "client = " in line]
    assert len(lines) == 4
    for line in lines:
        names: dict[str, Any] = {"Client": Client, "WORKDIR": None}
        exec(line, names)
        names["client"].close()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    tiny_model(folder / "model")
    write_rows(folder / "rows.jsonl", 32)
    write_rows(folder / "eval.jsonl", 8, seed=1)
    return folder


@pytest.mark.training
def test_every_cell_does_what_it_says(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_CACHE", str(world / "cache"))
    parameters = {
        "MODEL": f"file://{world}/model",
        "ROWS": "file://./rows.jsonl",
        "EVAL_ROWS": "file://./eval.jsonl",
        "STEPS": STEPS,
        "QUESTION": "one two cat",
        "WORKDIR": str(world / "jobs"),
    }
    notebook = sample()
    cells = {cell.id: cell for cell in notebook.cells}
    assert cells["parameters"].metadata.tags == ["parameters"]
    cells["parameters"].source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.append(nbformat.v4.new_code_cell(CHECKS))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(world)}}).execute()

    [last] = cells["follow"].outputs
    assert f"Succeeded, step {STEPS}/{STEPS}" in last.data["text/html"]
    assert "<polyline" in last.data["text/html"]
    assert "image/png" in cells["plot"].outputs[0].data
    assert cells["artifacts"].outputs[0].text.startswith("adapter ")
    assert not list((world / "jobs").glob("*/*/*.pid"))
    assert list((world / "jobs" / "default" / "notebook").glob("*/artifact/adapter_model.safetensors"))
