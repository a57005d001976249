"""What `up` prints can be typed: the programs are found, and the files that are named are the ones that it writes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster import first_steps
from tests.cluster.nodes.layout import Layout
from tests.cluster_e2e.world import ROOT

SAYS = '#!/bin/sh\necho "$(basename "$0") of $KUBECONFIG: $*"\n'


@pytest.fixture
def programs(tmp_path: Path) -> dict[str, Path]:
    """A kubectl and a helm that say how they are called, each in a folder of its own as in the cache."""
    found = {}
    for name in ("kubectl", "helm"):
        found[name] = tmp_path / f"{name}-0123" / name
        found[name].parent.mkdir()
        found[name].write_text(SAYS)
        found[name].chmod(0o755)
    return found


def test_the_commands_find_both_programs_the_cluster_and_their_files(tmp_path: Path, programs: dict[str, Path]) -> None:
    place = Layout(tmp_path / "root", tmp_path / "run")
    shell = shutil.which("sh")
    assert shell is not None
    done = subprocess.run(
        [shell, "-eu"],
        input=first_steps.commands(place, programs),
        env={"PATH": "/usr/bin:/bin"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    install, apply, watch = done.stdout.splitlines()
    assert install.startswith(f"helm of {place.kubeconfig}: upgrade --install finetune-operator ")
    assert install.endswith(f"--values {first_steps.values_file(place)} --wait")
    assert (ROOT / install.split()[6] / "Chart.yaml").exists()
    assert apply == f"kubectl of {place.kubeconfig}: apply -f {first_steps.job_file(place)}"
    assert watch.endswith("get finetunejob first --watch")
